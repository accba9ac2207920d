"""Attention of one token a sequence over a cache of keys and values, of which only the filled part is read.

The cache is (batch, capacity, kv_heads, head_dim) as a model writes it, in floating point or as INT8 codes with a scale
for each token and head, and is neither transposed nor converted in memory.  The kernel (Pallas Triton) divides each
sequence's own length, or its window, among several programs per key-value head, so that a small batch fills the GPU too
and none of them looks at positions behind the length; every program takes its softmax online, and what they found is put
together by the logarithms of their sums (Flash-Decoding).  The query heads that share a key-value head are the rows of one
matrix product.

INT8 codes are multiplied as they are: the key's scale goes onto the score, and the value's onto the weight.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int8, Int32

from pallas_kernels.dispatch import capability, say

BLOCK = 64
"""Positions that a program reads at once."""
PROGRAMS = 264
"""Programs that are wanted on a GPU at least: two for each multiprocessor of an H100 or H200."""
LOWEST = -1e30
"""Below every score, and still finite."""
LEAST_ROWS = 16
"""Of a matrix product on tensor cores; fewer query heads are filled up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """What a kernel is made for: sizes, and what scores are multiplied with."""

    batch: int
    capacity: int
    kv_heads: int
    group: int
    dim: int
    dtype: Any
    codes: bool
    scale: float
    window: int | None
    splits: int

    @property
    def rows(self) -> int:
        return max(LEAST_ROWS, pl.next_power_of_2(self.group))


def decode_attention(
    q: Float[Array, "batch heads dim"],
    keys: Float[Array, "batch capacity kv_heads dim"] | Int8[Array, "batch capacity kv_heads dim"],
    values: Float[Array, "batch capacity kv_heads dim"] | Int8[Array, "batch capacity kv_heads dim"],
    lengths: Int32[Array, " batch"],
    key_scales: Float32[Array, "batch capacity kv_heads"] | None = None,
    value_scales: Float32[Array, "batch capacity kv_heads"] | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    implementation: Literal["triton", "xla"] | None = None,
) -> Float[Array, "batch heads dim"]:
    """``softmax(q @ keys.T * scale) @ values`` over the first ``lengths`` positions of each sequence.

    Args:
      q: one query a sequence and head; neighbouring heads share a key-value head where there are fewer of those.
      keys, values: of the cache, in the dtype of ``q``, or another floating one, or int8.
      lengths: filled positions, at least 1, the query's own being the last.
      key_scales, value_scales: what int8 codes are multiplied with.
      scale: 1 / sqrt(dim) by default.
      window: only so many of the last positions; None for all.
      implementation: None takes the kernel on an NVIDIA GPU of compute capability 8.0 or more where it can be used, and XLA,
        which looks at the whole capacity, elsewhere.

    Raises:
      ValueError: if shapes do not fit together, or codes and scales do not come together.
      NotImplementedError: if the named implementation cannot take the call.
    """
    operands = [x for x in (q, keys, values, lengths, key_scales, value_scales) if x is not None]
    _check(q, keys, values, lengths, key_scales, value_scales)
    if implementation not in (None, "triton", "xla"):
        raise NotImplementedError(f"implementation {implementation!r} is not one of: triton, xla")
    kinds = {"scale": 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale), "window": window}
    xla = functools.partial(reference, **kinds)
    if implementation == "xla":
        return xla(*operands)
    reason = NO_GPU if capability() < (8, 0) else cannot_use(q, keys, values)
    if reason and implementation == "triton":
        raise NotImplementedError(
            f"decode_attention: implementation 'triton' cannot take q {q.shape} {q.dtype}: {reason}"
        )
    say("decode_attention", (*q.shape, keys.shape[1]), "xla" if reason else "triton", reason or "")
    if reason:
        return xla(*operands)
    triton = functools.partial(run, **kinds)
    return triton(*operands) if implementation else lax.platform_dependent(*operands, cuda=triton, default=xla)


def reference(
    q: Array, keys: Array, values: Array, lengths: Array, *scales: Array, scale: float, window: int | None
) -> Array:
    """The same by XLA, over the whole capacity with a mask."""
    key_scales, value_scales = (jnp.swapaxes(s, 1, 2)[:, :, None] for s in scales) if scales else (1, 1)
    batch, heads, dim = q.shape
    kv_heads = keys.shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bkgd,bskd->bkgs", grouped, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    before = lengths[:, None] - jnp.arange(keys.shape[1])
    visible = (before > 0) if window is None else (before > 0) & (before <= window)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores * key_scales * scale, LOWEST), axis=-1)
    weights = (weights * value_scales).astype(q.dtype)
    out = jnp.einsum("bkgs,bskd->bkgd", weights, values.astype(q.dtype), preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


NO_GPU = "it needs an NVIDIA GPU of compute capability 8.0 or more"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def cannot_use(q: Any, keys: Any, values: Any) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype}, not bfloat16 or float16"
    for name, operand in (("keys", keys), ("values", values)):
        if operand.dtype not in (q.dtype, jnp.int8):
            return f"{name} are {operand.dtype}, not {q.dtype} or int8"
    if not _has_triton():
        return "this version of JAX has no Triton backend of Pallas"
    dim, group = q.shape[2], q.shape[1] // keys.shape[2]
    if dim not in (16, 32, 64, 128, 256):
        return f"head_dim is {dim}, not a power of 2 from 16 to 256"
    if group > 64:
        return f"{group} heads share a key-value head, more than 64"
    if math.prod(keys.shape) >= 2**31:
        return "keys have 2^31 elements or more"
    return None


def run(
    q: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    *scales: Array,
    scale: float,
    window: int | None,
    splits: int | None = None,
    interpret: bool = False,
) -> Array:
    """The kernel, and what puts together the parts.

    Args:
      q, keys, values, lengths, scales: as :func:`decode_attention` takes them.
      scale: what scores are multiplied with.
      window: as there.
      splits: programs for each key-value head of a sequence; by default so many that the GPU is filled.
      interpret: whether to run on the CPU.
    """
    (batch, heads, dim), (_, capacity, kv_heads, _) = q.shape, keys.shape
    wanted = min(-(-PROGRAMS // (batch * kv_heads)), -(-capacity // BLOCK)) if splits is None else splits
    sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "group": heads // kv_heads, "dim": dim}
    p = _Problem(**sizes, dtype=q.dtype, codes=bool(scales), scale=scale, window=window, splits=wanted)
    out, log_sum = _call(p, interpret)(lengths, q.reshape(batch, kv_heads, p.group, dim), keys, values, *scales)
    largest = jnp.max(log_sum, axis=2, keepdims=True)
    share = jnp.exp(log_sum - jnp.where(jnp.isfinite(largest), largest, 0))  # A program without a position has none.
    total = jnp.sum(share, axis=2)[..., None]
    mixed = jnp.sum(jnp.where(share[..., None] > 0, out, 0) * share[..., None], axis=2) / total
    return mixed.reshape(q.shape).astype(q.dtype)


def _call(p: _Problem, interpret: bool) -> Any:
    from jax.experimental.pallas import triton as plgpu

    cache = pl.BlockSpec((None, p.capacity, None, p.dim), lambda b, h, s: (b, 0, h, 0))
    scales = pl.BlockSpec((None, p.capacity, None), lambda b, h, s: (b, 0, h))
    shape = (p.batch, p.kv_heads, p.splits, p.group)
    return pl.pallas_call(
        functools.partial(_kernel, p),
        grid=(p.batch, p.kv_heads, p.splits),
        in_specs=[
            pl.BlockSpec((p.batch,), lambda b, h, s: (0,)),
            pl.BlockSpec((None, None, p.group, p.dim), lambda b, h, s: (b, h, 0, 0)),
            cache,
            cache,
            *([scales, scales] if p.codes else []),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, p.group, p.dim), lambda b, h, s: (b, h, s, 0, 0)),
            pl.BlockSpec((None, None, None, p.group), lambda b, h, s: (b, h, s, 0)),
        ],
        out_shape=[jax.ShapeDtypeStruct((*shape, p.dim), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )


def _kernel(p: _Problem, lengths: Any, q_ref: Any, k_ref: Any, v_ref: Any, *rest: Any) -> None:
    """One program: a share of one sequence's filled positions, for the heads that share one key-value head."""
    scale_refs, (out_ref, log_sum_ref) = rest[:-2], rest[-2:]
    length = lengths[pl.program_id(0)]
    oldest = jnp.int32(0) if p.window is None else jnp.maximum(length - p.window, 0)
    first, last = oldest // BLOCK, (length + (BLOCK - 1)) // BLOCK
    share = (last - first + (p.splits - 1)) // p.splits
    start = first + pl.program_id(2) * share
    # Rows beyond the group repeat its last, positions beyond the length the last position: nothing else is read.
    row = jnp.minimum(jnp.arange(p.rows), p.group - 1)
    q = q_ref[row, :]

    def body(i: Any, carry: Sequence[Array]) -> Sequence[Array]:
        best, total, out = carry
        position = i * BLOCK + jnp.arange(BLOCK)
        at = jnp.maximum(jnp.minimum(position, length - 1), 0)
        scores = _dot(q, k_ref[at, :].astype(p.dtype).T) * p.scale
        if p.codes:
            scores = scores * scale_refs[0][at][None, :]
        visible = (position < length) & (position >= oldest)
        scores = jnp.where(visible[None, :], scores, LOWEST)
        higher = jnp.maximum(best, jnp.max(scores, axis=1))
        weights, kept = jnp.exp(scores - higher[:, None]), jnp.exp(best - higher)
        total = total * kept + jnp.sum(weights, axis=1)
        if p.codes:
            weights = weights * scale_refs[1][at][None, :]
        out = out * kept[:, None] + _dot(weights.astype(p.dtype), v_ref[at, :].astype(p.dtype))
        return higher, total, out

    zero = jnp.zeros(p.rows, jnp.float32), jnp.zeros((p.rows, p.dim), jnp.float32)
    begin = (jnp.full(p.rows, LOWEST, jnp.float32), *zero)
    best, total, out = lax.fori_loop(start, jnp.minimum(start + share, last), body, begin)
    # Rows that repeat the last one write it again.
    out_ref[row, :] = out / jnp.where(total > 0, total, 1)[:, None]
    log_sum_ref[row] = jnp.where(total > 0, best + jnp.log(total), -jnp.inf)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _check(
    q: Array, keys: Array, values: Array, lengths: Array, key_scales: Array | None, value_scales: Array | None
) -> None:
    if q.ndim != 3 or keys.ndim != 4 or keys.shape[::3] != q.shape[::2] or q.shape[1] % keys.shape[2]:
        raise ValueError(
            f"decode_attention: q (batch, heads, dim) and keys (batch, capacity, kv_heads, dim) do not fit together: "
            f"{q.shape} and {keys.shape}"
        )
    if values.shape != keys.shape or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"decode_attention: keys {keys.shape} need values of that shape and lengths {q.shape[:1]}, got {values.shape} "
            f"and {lengths.shape}"
        )
    for name, operand, scales in (("key", keys, key_scales), ("value", values, value_scales)):
        if (operand.dtype == jnp.int8) != (scales is not None):
            raise ValueError(f"decode_attention: {name}s are {operand.dtype}; int8 codes and scales come together")
        if scales is not None and scales.shape != keys.shape[:3]:
            raise ValueError(f"decode_attention: {name}_scales must be {keys.shape[:3]}, got {scales.shape}")
    if (keys.dtype == jnp.int8) != (values.dtype == jnp.int8):
        raise ValueError("decode_attention: keys and values must both be codes, or neither")
