"""Times of the integer matmuls beside XLA's and cuBLAS's, in one run, with the ceilings of the device.

  xla_bf16          bfloat16 weights and activations, what everything is a ratio to
  xla_int8          int8 codes through XLA, with the scales applied
  cublaslt_int8     torch._int_mm: int8 codes, bare int32 results (more than 16 rows only)
  cublaslt_fp8      torch._scaled_mm: float8 weights and activations, fast accumulation
  int8_matmul       this library, int8 weights
  int4_matmul       this library, 4-bit weights
  grouped_float     4-bit weights with a float32 scale for every group of 128 input channels
  grouped_integer   the same with int16 scales, all sums in int32
  grouped_folded    the same scales, promised to be from 1 to 15
  weight_only_int4  such weights with float32 scales, and bfloat16 activations

Times are the device's (CUPTI), all kernels of a call added up.  A call takes another copy of the weights each time, so
that they come from memory rather than from the cache.  Values are normally distributed, as those of models are: with
few different ones a GPU needs less power, and its clock stays higher.  Results of this library are compared with XLA's,
bit for bit; where floats are added up, to within what the order of the sum and rounding to bfloat16 change.
"""

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NotRequired, TypedDict, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import DTypeLike

from fqjax.bench import activations
from fqjax.bench.environment import Environment, describe, environment
from fqjax.runtime.errors import InputError
from pallas_kernels import grouped_int4_matmul, int4_matmul, int8_matmul, pack_int4, weight_only_int4_matmul
from pallas_kernels.device import hopper_device
from pallas_kernels.shapes import ROWS, SHAPES
from pallas_kernels.timing import copies_beyond_cache, microseconds

GROUPED = ("grouped_float", "grouped_integer", "grouped_folded", "weight_only_int4")
OURS = ("int8_matmul", "int4_matmul", *GROUPED)
KERNELS = ("xla_bf16", "xla_int8", "cublaslt_int8", "cublaslt_fp8", *OURS)
GROUP_SIZE = 128
"""Input channels that share a scale."""
WEIGHT_BITS = {"xla_bf16": 16, "int4_matmul": 4}
"""Bits of a weight, with its share of a group's scale; 8 for all other kernels."""
WEIGHT_BITS |= {k: 4 + (16 if k in ("grouped_integer", "grouped_folded") else 32) / GROUP_SIZE for k in GROUPED}
CPU_SHAPES = {"Llama-3-8B": {"o": SHAPES["Llama-3-8B"]["o"]}}, (1, 16)
"""Shapes and rows that are measured where there is no GPU."""


class KernelRow(TypedDict):
    """One measured case: microseconds of a call, and with XLA's result to compare with, whether the results agree."""

    kernel: str
    M: int
    N: int
    K: int
    microseconds: float
    tops: float
    tb_per_s: float
    ratio_to_bf16: float
    exact: NotRequired[bool]
    close: NotRequired[bool]


class KernelResult(Environment):
    """All measured cases, with the ceilings of the device and the times of quantizing activations."""

    ceilings: dict[str, float]
    activations: list[activations.ActivationRow]
    rows: list[KernelRow]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark: a function, and arguments for one round of calls."""

    kernel: str
    m: int
    n: int
    k: int
    call: Callable[..., Any]
    arguments: Sequence[tuple[object, ...]]
    check: tuple[object, ...] = ()
    """With these arguments ``reference``, or else ``xla_int8``, gives what the first of ``arguments`` should."""
    reference: Callable[..., jax.Array] | None = None
    exact: bool = True
    """Whether in every bit, or nearly."""


def run(
    shapes: Iterable[tuple[int, int]], rows: Iterable[int], report: Callable[[KernelRow], None] = lambda row: None
) -> KernelResult:
    """Measures every kernel on every shape (N, K) and number of rows M.

    Args:
      shapes, rows: what to measure.
      report: called with every row of the result as it comes.

    Returns:
      ``device``, ``versions``, ``date``, ``ceilings``, ``rows`` and ``activations``, as the command's ``--json`` writes them.
    """
    sizes = () if jax.default_backend() == "gpu" else (256, 512)
    result: KernelResult = {
        **environment(),
        "ceilings": ceilings(),
        "activations": activations.measure(*sizes),
        "rows": [],
    }
    for n, k in shapes:
        xla_int8, bf16 = None, float("nan")
        for case in _compiled(_cases(n, k, sorted(rows))):
            us = microseconds(case.call, case.arguments)
            bf16 = us if case.kernel == "xla_bf16" else bf16
            xla_int8 = case.call if case.kernel == "xla_int8" else xla_int8
            row: KernelRow = {
                "kernel": case.kernel,
                "M": case.m,
                "N": case.n,
                "K": case.k,
                "microseconds": us,
                "tops": 2e-6 * case.m * n * k / us,
                "tb_per_s": n * k * WEIGHT_BITS.get(case.kernel, 8) / 8e6 / us,
                "ratio_to_bf16": bf16 / us,
            }
            checked_by = case.reference or xla_int8
            if case.check and checked_by is not None:
                found, wanted = case.call(*case.arguments[0]), checked_by(*case.check)
                row["exact" if case.exact else "close"] = bool(
                    (jnp.array_equal if case.exact else close)(found, wanted)
                )
            result["rows"].append(row)
            report(row)
    return result


def _cases(n: int, k: int, rows: list[int]) -> list[Case]:
    """All rows of the benchmark for one shape; for every M bf16 first, then XLA's int8."""
    keys = (jax.random.fold_in(jax.random.key(n + k), i) for i in itertools.count())

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: jax.Array, rows: int, bits: int) -> jax.Array:
        values = jax.random.normal(key, (rows, k), jnp.bfloat16)
        if bits == 16:
            return values
        low, high, unit = {4: (-8, 7, 3), 8: (-127, 127, 32)}[bits]
        return jnp.clip(jnp.round(values * unit), low, high).astype(jnp.int8)

    def weights(bits: int) -> list[jax.Array]:
        return [normal(next(keys), n, bits) for _ in range(copies_beyond_cache(n * k * bits // 8))]

    codes, eight, bf16 = weights(4), weights(8), weights(16)
    packed = [jax.jit(pack_int4)(w) for w in codes]
    one, folded, *groups = jnp.float32(0.37), *_grouped_weights(codes, next(keys))
    scales = one, jax.random.uniform(next(keys), (n,), minval=0.5, maxval=1.5) / 4096
    cases, int8_by_xla = [], jax.jit(functools.partial(int8_matmul, implementation="xla"))
    for m in rows:
        x, real = normal(next(keys), m, 8), normal(next(keys), m, 16)
        cases += [
            Case("xla_bf16", m, n, k, jax.jit(_bf16), [(real, w) for w in bf16]),
            Case(
                "xla_int8",
                m,
                n,
                k,
                int8_by_xla,
                [(x, w, *scales) for w in eight],
            ),
            *_torch_cases(m, n, k, len(eight)),
            Case(
                "int8_matmul", m, n, k, jax.jit(int8_matmul), [(x, w, *scales) for w in eight], (x, eight[0], *scales)
            ),
            Case(
                "int4_matmul", m, n, k, jax.jit(int4_matmul), [(x, w, *scales) for w in packed], (x, codes[0], *scales)
            ),
            *_grouped_cases(m, n, k, x, packed, groups, scales, (x, folded, *scales)),
            _weight_only_case(m, n, k, real, packed, groups, scales[1]),
        ]
    return cases


def _grouped_weights(codes: list[jax.Array], key: jax.Array) -> list[jax.Array]:
    """The first weight times its groups' scales, which fit into int8, and such scales for every weight."""
    n, k = codes[0].shape
    scales = [jax.random.randint(jax.random.fold_in(key, i), (k // GROUP_SIZE, n), 1, 16) for i in range(len(codes))]
    each = jax.jit(lambda w, s: w * jnp.repeat(s.astype(jnp.int8).T, GROUP_SIZE, axis=1))
    return [each(codes[0], scales[0]), *scales]


def _grouped_cases(
    m: int,
    n: int,
    k: int,
    x: jax.Array,
    packed: list[jax.Array],
    groups: list[jax.Array],
    scales: tuple[jax.Array, jax.Array],
    check: tuple[object, ...],
) -> list[Case]:
    """The same product with every kind of scales of groups."""

    def case(kernel: str, folded: bool, dtype: DTypeLike) -> Case:
        call = jax.jit(lambda x, w, s, g, t: grouped_int4_matmul(x, w, s, g, t, folded=folded))
        arguments = [(x, w, scales[0], g.astype(dtype), scales[1]) for w, g in zip(packed, groups, strict=True)]
        return Case(kernel, m, n, k, call, arguments, check, exact=dtype != jnp.float32)

    kinds = ((False, jnp.float32), (False, jnp.int16), (True, jnp.int16))
    return [case(kernel, *kind) for kernel, kind in zip(GROUPED[:3], kinds, strict=True)]


def _weight_only_case(
    m: int, n: int, k: int, x: jax.Array, packed: list[jax.Array], groups: list[jax.Array], scale: jax.Array
) -> Case:
    arguments = [(x, w, g.astype(jnp.float32), scale) for w, g in zip(packed, groups, strict=True)]
    by_xla = jax.jit(functools.partial(weight_only_int4_matmul, implementation="xla"))
    call = jax.jit(weight_only_int4_matmul)
    return Case("weight_only_int4", m, n, k, call, arguments, arguments[0], by_xla, exact=False)


def close(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """Whether no difference is more than one part in 128 of the largest value."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.abs(found - wanted).max() <= jnp.abs(wanted).max() / 128


def _bf16(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def _torch_cases(m: int, n: int, k: int, copies: int) -> list[Case]:
    """Products by cuBLASLt through torch, where that is installed and sees the GPU."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return []
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return []
    cases = []
    x, *weights = (
        (32 * torch.randn((rows, k), dtype=torch.bfloat16, device="cuda")).round().clip(-127, 127)
        for rows in [m] + [n] * copies
    )
    if m > 16:
        arguments = [(x.to(torch.int8), w.to(torch.int8).t()) for w in weights]
        cases.append(Case("cublaslt_int8", m, n, k, _synchronized(torch._int_mm), arguments))
    if m >= 16:
        one = torch.tensor(1.0, device="cuda")

        def fp8(x: object, w: object) -> object:
            return torch._scaled_mm(x, w, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        x8, w8 = x.to(torch.float8_e4m3fn), [w.to(torch.float8_e4m3fn).t() for w in weights]
        cases.append(Case("cublaslt_fp8", m, n, k, _synchronized(fp8), [(x8, w) for w in w8]))
    return cases


def _synchronized(f: Callable[..., object]) -> Callable[..., None]:
    """``f`` of torch, finished when it returns, so that its kernels fall into the measurement."""
    torch: Any = importlib.import_module("torch")

    def call(*arguments: object) -> None:
        f(*arguments)
        torch.cuda.synchronize()

    return call


def _compiled(cases: list[Case]) -> Iterator[Case]:
    """The cases with their functions compiled, several at a time."""
    jitted = [case for case in cases if hasattr(case.call, "lower")]
    lowered = [cast(Any, case.call).lower(*case.arguments[0]) for case in jitted]
    with ThreadPoolExecutor(8) as pool:
        compiled = dict(zip(map(id, jitted), pool.map(lambda stage: stage.compile(), lowered), strict=True))
    for case in cases:
        yield dataclasses.replace(case, call=compiled.get(id(case), case.call))


def ceilings() -> dict[str, float]:
    """The most that the device reaches: ``bf16_tflops``, ``int8_tops``, ``copy_tb_per_s``.

    bf16 is a large product by XLA; int8 the tensor cores alone on a Hopper GPU, elsewhere a large product by XLA; the copy
    counts bytes read and written.
    """
    gpu = jax.default_backend() == "gpu"
    size, gigabytes = (8192, 2.0) if gpu else (1024, 0.1)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    bf16 = 2e-6 * size**3 / microseconds(jax.jit(_bf16), [(a, b)])
    if hopper_device():
        from pallas_kernels.matmul.hopper import ceiling

        int8 = 1e-6 * ceiling.operations() / microseconds(jax.jit(ceiling.build()), [ceiling.operands()])
    else:
        whole = [w.astype(jnp.int8) for w in (a, b)]
        dot = jax.jit(lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32))
        int8 = 2e-6 * size**3 / microseconds(dot, [tuple(whole)])
    words = jnp.ones(int(gigabytes * 2**28), jnp.int32)
    copy = 2e-6 * words.nbytes / microseconds(jax.jit(lambda v: v + 1), [(words,)])
    return {"bf16_tflops": bf16, "int8_tops": int8, "copy_tb_per_s": copy}


def default_shapes() -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Shapes and rows that are measured by default: those of well-known models, or few where there is no GPU."""
    models, rows = (SHAPES, ROWS) if jax.default_backend() == "gpu" else CPU_SHAPES
    return list(dict.fromkeys(shape for layers in models.values() for shape in layers.values())), rows


def parse_shape(text: str) -> tuple[int, int]:
    """``"4096x14336"`` to (N, K).

    Raises:
      InputError: if it is not two positive numbers, or K is not a multiple of 256.
    """
    n, cross, k = text.partition("x")
    if not (cross and n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise InputError(f"--shape {text}: must be output x input channels, such as 4096x14336")
    if int(k) % 256:
        raise InputError(f"--shape {text}: input channels must be a multiple of 256")
    return int(n), int(k)


def line(row: KernelRow) -> str:
    """One row of the result, to be read as it comes."""
    wrong = "" if row.get("exact", row.get("close", True)) else "  DIFFERS FROM XLA"
    return (
        f"{row['kernel']:16}{row['M']:6} x {row['N']} x {row['K']}  {row['microseconds']:9.2f} us  "
        f"{row['tops']:7.4g} TOPS  {row['tb_per_s']:6.3g} TB/s  {row['ratio_to_bf16']:5.2f} x bf16{wrong}"
    )


def summary(result: KernelResult) -> str:
    """Device, versions and ceilings, which the rows are to be seen beside."""
    ceiling = result["ceilings"]
    return (
        f"{describe(result)}\nceilings: {ceiling['bf16_tflops']:.3g} TFLOP/s bf16, {ceiling['int8_tops']:.4g} TOPS int8, "
        f"copy {ceiling['copy_tb_per_s']:.3g} TB/s"
    )


def markdown(result: KernelResult) -> str:
    """The result as a table."""
    ceiling = result["ceilings"]
    lines = [
        "# Integer matmuls",
        "",
        "Written by `scripts/benchmark_kernels.py`. Microseconds of the device, all kernels of a call added up; in brackets",
        "the speed-up over XLA's bf16 product, and the share of the ceiling: of the int8 tensor cores alone where there are",
        "256 rows or more, of the bandwidth of a copy below. Weights come from memory, not from the cache; all values are",
        "normally distributed.",
        "",
        f"{describe(result)}. Ceilings in this run: {ceiling['bf16_tflops']:.3g} TFLOP/s bf16, "
        f"{ceiling['int8_tops']:.4g} TOPS int8, copy {ceiling['copy_tb_per_s']:.3g} TB/s.",
    ]
    names = {shape: f"{model} {layer}" for model, layers in SHAPES.items() for layer, shape in layers.items()}
    kernels = [kernel for kernel in KERNELS if any(row["kernel"] == kernel for row in result["rows"])]
    for (n, k), group in itertools.groupby(result["rows"], key=lambda row: (row["N"], row["K"])):
        lines += ["", f"## {names.get((n, k), 'shape')}: N = {n}, K = {k}", ""]
        lines += ["| M | " + " | ".join(kernels) + " |", "|---:" * (1 + len(kernels)) + "|"]
        for m, cells in itertools.groupby(group, key=lambda row: row["M"]):
            found = {row["kernel"]: row for row in cells}
            lines.append("| ".join([f"| {m} "] + [_cell(found.get(kernel), ceiling) for kernel in kernels]) + "|")
    if "activations" in result:
        lines += ["", *activations.markdown(result["activations"])]
    wrong = [row for row in result["rows"] if row.get("exact") is False or row.get("close") is False]
    lines += [
        "",
        f"Results that differ from XLA's in any bit, or, with float scales, by more than rounding: {len(wrong)}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(row: KernelRow | None, ceiling: dict[str, float]) -> str:
    if row is None:
        return "- "
    if row["kernel"] == "xla_bf16":
        return f"{row['microseconds']:.1f} "
    if row["M"] >= 256:
        share = row["tops"] / ceiling["int8_tops"]
    else:
        share = row["tb_per_s"] / ceiling["copy_tb_per_s"]
    return f"{row['microseconds']:.1f} ({row['ratio_to_bf16']:.2f} x, {share:.0%}) "
