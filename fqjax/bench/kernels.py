"""Times of the integer matmuls beside XLA's and cuBLAS's, in one run, with the ceilings of the device.

The kernels and their operands are those of :mod:`fqjax.bench.kernel_cases`.  Times are the device's (CUPTI), all kernels of
a call added up.  Results of this library are compared with XLA's, bit for bit; where floats are added up, to within what the
order of the sum and rounding to bfloat16 change.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from fqjax.bench import activations
from fqjax.bench.environment import Environment, describe, environment
from fqjax.bench.kernel_cases import KERNELS, WEIGHT_BITS, bf16_matmul, compiled, kernel_cases
from fqjax.bench.spread import Spread, mark, shown, spread_of, verdict
from fqjax.runtime.errors import InputError
from pallas_kernels.device import hopper_device
from pallas_kernels.shapes import ROWS, SHAPES
from pallas_kernels.timing import microseconds, rounds

CPU_SHAPES = {"Llama-3-8B": {"o": SHAPES["Llama-3-8B"]["o"]}}, (1, 16)
"""Shapes and rows that are measured where there is no GPU."""


class KernelRow(TypedDict):
    """One measured case: microseconds of a call, and with XLA's result to compare with, whether the results agree.

    Microseconds are the median of several rounds.
    """

    kernel: str
    M: int
    N: int
    K: int
    microseconds: float
    spread: NotRequired[Spread]
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
        for case in compiled(kernel_cases(n, k, sorted(rows))):
            spread = spread_of(rounds(case.call, case.arguments))
            us = spread["median"]
            bf16 = us if case.kernel == "xla_bf16" else bf16
            xla_int8 = case.call if case.kernel == "xla_int8" else xla_int8
            row: KernelRow = {
                "kernel": case.kernel,
                "M": case.m,
                "N": case.n,
                "K": case.k,
                "microseconds": us,
                "spread": spread,
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


def close(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """Whether no difference is more than one part in 128 of the largest value."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.abs(found - wanted).max() <= jnp.abs(wanted).max() / 128


def ceilings() -> dict[str, float]:
    """The most that the device reaches: ``bf16_tflops``, ``int8_tops``, ``copy_tb_per_s``.

    bf16 is a large product by XLA; int8 the tensor cores alone on a Hopper GPU, elsewhere a large product by XLA; the copy
    counts bytes read and written.
    """
    gpu = jax.default_backend() == "gpu"
    size, gigabytes = (8192, 2.0) if gpu else (1024, 0.1)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    bf16 = 2e-6 * size**3 / microseconds(jax.jit(bf16_matmul), [(a, b)])
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
        f"{row['kernel']:16}{row['M']:6} x {row['N']} x {row['K']}  {row['microseconds']:9.2f} us"
        f"{shown(row, 2)}  {row['tops']:7.4g} TOPS  {row['tb_per_s']:6.3g} TB/s  {row['ratio_to_bf16']:5.2f} x bf16"
        f"{mark(row)}{wrong}"
    )


def summary(result: KernelResult) -> str:
    """Device, versions and ceilings, which the rows are to be seen beside, and whether they are noisy."""
    ceiling = result["ceilings"]
    ceilings = (
        f"ceilings: {ceiling['bf16_tflops']:.3g} TFLOP/s bf16, {ceiling['int8_tops']:.4g} TOPS int8, "
        f"copy {ceiling['copy_tb_per_s']:.3g} TB/s"
    )
    return "\n".join([describe(result), ceilings, *verdict(result["rows"])])


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
