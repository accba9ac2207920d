"""Matmuls that the benchmark of kernels times, each with its operands.

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

A call takes another copy of the weights each time, so that they come from memory rather than from the cache.  Values are
normally distributed, as those of models are: with few different ones a GPU needs less power, and its clock stays higher.
"""

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import DTypeLike

from pallas_kernels import grouped_int4_matmul, int4_matmul, int8_matmul, pack_int4, weight_only_int4_matmul
from pallas_kernels.timing import copies_beyond_cache

GROUPED = ("grouped_float", "grouped_integer", "grouped_folded", "weight_only_int4")
OURS = ("int8_matmul", "int4_matmul", *GROUPED)
KERNELS = ("xla_bf16", "xla_int8", "cublaslt_int8", "cublaslt_fp8", *OURS)
GROUP_SIZE = 128
"""Input channels that share a scale."""
WEIGHT_BITS = {"xla_bf16": 16, "int4_matmul": 4}
"""Bits of a weight, with its share of a group's scale; 8 for all other kernels."""
WEIGHT_BITS |= {k: 4 + (16 if k in ("grouped_integer", "grouped_folded") else 32) / GROUP_SIZE for k in GROUPED}


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


def kernel_cases(n: int, k: int, rows: list[int]) -> list[Case]:
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
            Case("xla_bf16", m, n, k, jax.jit(bf16_matmul), [(real, w) for w in bf16]),
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


def bf16_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """XLA's product of bfloat16 inputs (M, K) and weights (N, K)."""
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


def compiled(cases: list[Case]) -> Iterator[Case]:
    """The cases with their functions compiled, several at a time."""
    jitted = [case for case in cases if hasattr(case.call, "lower")]
    lowered = [cast(Any, case.call).lower(*case.arguments[0]) for case in jitted]
    with ThreadPoolExecutor(8) as pool:
        programs = dict(zip(map(id, jitted), pool.map(lambda stage: stage.compile(), lowered), strict=True))
    for case in cases:
        yield dataclasses.replace(case, call=programs.get(id(case), case.call))
