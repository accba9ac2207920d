"""Attention of one new token a sequence over a cache of keys and values, whose filled part alone is read.

The cache is (batch, capacity, kv_heads, head_dim) as a model writes it, in floating point or as INT8 codes with a scale
for each token and head, and is neither transposed nor converted in memory.  The kernel (Pallas Triton) takes the output of
the query, key and value projections as it is, turns queries and keys by their position, writes the new key and value into
the cache and attends, all at once.  It divides each sequence's own length, or its window, among several programs per
key-value head, so that a small batch fills the GPU too and none of them looks at positions after the length; every program
takes its softmax online, the first of them beginning with the new token, and their outputs are put together by the
logarithms of their sums (Flash-Decoding).  The query heads that share a key-value head are the rows of one matrix product.

INT8 codes are not dequantized: the key's scale goes onto the score, and the value's onto the weight.  Where there are many
sequences, queries become integers too, and keys need not be converted to be multiplied.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, DTypeLike

from pallas_kernels import device
from pallas_kernels.attention import codes as attention_codes
from pallas_kernels.attention.codes import Recipe
from pallas_kernels.attention.problem import (
    MOST_ELEMENTS,
    UPPER_CODE_UNIT,
    WHOLE_CAPACITY,
    Cut,
    Problem,
    best_cut,
    capacity_of,
)
from pallas_kernels.attention.reference import LOWEST_SCORE
from pallas_kernels.mosaic.math import rounded
from pallas_kernels.mosaic.types import Ref, Scalar


def cannot_use(qkv: Array, keys: Array, values: Array) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        return f"qkv is {qkv.dtype}, not bfloat16 or float16"
    for name, operand in (("keys", keys), ("values", values)):
        if operand.dtype not in (qkv.dtype, jnp.int8):
            return f"{name} are {operand.dtype}, not {qkv.dtype} or int8"
    if not device.has_triton():
        return "this version of JAX has no Triton backend of Pallas"
    dim, group = qkv.shape[2], qkv.shape[1] // keys.shape[2] - 2
    if dim not in (16, 32, 64, 128, 256):
        return f"head_dim is {dim}, not a power of 2 from 16 to 256"
    if group > 64:
        return f"{group} heads share a key-value head, more than 64"
    if math.prod(keys.shape) > MOST_ELEMENTS:
        return "keys have 2^31 elements or more"
    return None


Result = TypeVar("Result")
Finish = Callable[[Array, Array | None], Result]
"""Makes the result of an attention from its parts and their sums."""


def run(
    qkv: Array,
    lengths: Array,
    rotation: Sequence[Array],
    cache: Sequence[Array],
    *,
    scale: float,
    window: int | None,
    finish: Finish[Result],
    recipe: Recipe | None = None,
    pages: Array | None = None,
    cut: Cut | None = None,
    interpret: bool = False,
) -> tuple[Result, tuple[Array, ...]]:
    """The kernel, and the function that puts together the parts.

    Args:
      qkv, lengths, rotation: as :func:`pallas_kernels.decode_attention` takes them; no rotation is an empty tuple.
      cache: its arrays.
      scale: factor of the scores.
      window: as there.
      finish: function of the parts, (batch, kv_heads, parts, group, dim), and the logarithms of their sums, None if there
        is one part.
      recipe: if there is one part, the kernel itself quantizes it so, and the result is the codes, in a tuple.
      pages: of each sequence, (batch, n), where the cache's arrays are (pool, page_size, ...).
      cut: how the work is cut up; by default :func:`best_cut`.
      interpret: whether to run on the CPU.
    """
    (batch, heads, dim), kv_heads = qkv.shape, cache[0].shape[2]
    heads -= 2 * kv_heads
    whole = recipe is not None and capacity_of(cache, pages) <= WHOLE_CAPACITY
    cut = cut or best_cut(batch * kv_heads, heads // kv_heads, dim, len(cache) > 2, whole=whole)
    p = Problem.of(qkv, rotation, cache, scale, window, cut, pages)
    how = ()
    if recipe is not None and p.splits == 1:
        p = p.quantizing(recipe)
        how = recipe[1:] if p.extra else recipe[1:2]
    table = () if pages is None else (pages,)
    # Pages one after the other are a row that all sequences share, in which a table says where their positions are.
    held = [array.reshape(_one_row(p, array)) for array in cache]
    found = _call(p, interpret)(lengths, *table, qkv, qkv, qkv, *rotation, *held, *how)
    written = tuple(new.reshape(old.shape) for new, old in zip(found, cache, strict=False))
    out, log_sum, *codes = found[len(cache) :]
    if codes:
        return tuple(codes), written  # pyright: ignore[reportReturnType]
    return finish(out, log_sum if p.splits > 1 else None), written


def _one_row(p: Problem[Cut], array: Array) -> tuple[int, ...]:
    """The shape that the kernel takes of one of the cache's arrays."""
    return (1, p.pool * p.page, *array.shape[2:]) if p.page else array.shape


def _call(p: Problem[Cut], interpret: bool) -> Callable[..., list[Array]]:
    from jax.experimental.pallas import triton as plgpu

    heads = p.kv_heads * p.group
    half = pl.BlockSpec((None, p.dim // 2), lambda b, h, s: (b, 0))
    shape = (1, p.pool * p.page, p.kv_heads, p.dim) if p.page else p.cache_shape

    def row(b: Scalar) -> Scalar:
        return 0 if p.page else b

    cache = [pl.BlockSpec((None, shape[1], None, p.dim), lambda b, h, s: (row(b), 0, h, 0))] * 2
    arrays = [jax.ShapeDtypeStruct(shape, p.cache_dtype)] * 2
    if p.codes:
        cache += [pl.BlockSpec((None, shape[1], None), lambda b, h, s: (row(b), 0, h))] * 2
        arrays += [jax.ShapeDtypeStruct(shape[:3], jnp.float32)] * 2
    parts = (p.batch, p.kv_heads, p.splits, p.group)
    first = 4 + bool(p.page) + 2 * p.rotates  # of the cache among the operands
    channels = heads * p.dim
    recipe = [channels, *([p.extra] * 2 if p.extra else [])] if p.qmax else []
    codes = [pl.BlockSpec((None, channels + p.extra), lambda b, h, s: (b, 0))] if p.qmax else []
    return pl.pallas_call(
        functools.partial(_kernel, p, interpret),
        grid=(p.batch, p.kv_heads, p.splits),
        in_specs=[
            pl.BlockSpec((p.batch,), lambda b, h, s: (0,)),
            *([pl.BlockSpec((None, p.table), lambda b, h, s: (b, 0))] if p.page else []),
            pl.BlockSpec((None, p.group, p.dim), lambda b, h, s: (b, h, 0)),
            pl.BlockSpec((None, None, p.dim), lambda b, h, s: (b, heads + h, 0)),
            pl.BlockSpec((None, None, p.dim), lambda b, h, s: (b, heads + p.kv_heads + h, 0)),
            *([half, half] if p.rotates else []),
            *cache,
            *(pl.BlockSpec((n,), lambda b, h, s: (0,)) for n in recipe),
        ],
        out_specs=[
            *cache,
            pl.BlockSpec((None, None, None, p.group, p.dim), lambda b, h, s: (b, h, s, 0, 0)),
            pl.BlockSpec((None, None, None, p.group), lambda b, h, s: (b, h, s, 0)),
            *codes,
        ],
        out_shape=[
            *arrays,
            jax.ShapeDtypeStruct((*parts, p.dim), jnp.float32 if p.splits > 1 else p.dtype),
            jax.ShapeDtypeStruct(parts, jnp.float32),
            *(jax.ShapeDtypeStruct((p.batch, channels + p.extra), jnp.int8) for _ in codes),
        ],
        input_output_aliases={first + i: i for i in range(len(arrays))},
        compiler_params=plgpu.CompilerParams(num_warps=p.cut.warps, num_stages=p.cut.stages),
        interpret=interpret,
        name="decode_attention",
    )


def _kernel(p: Problem[Cut], interpret: bool, lengths: Ref, *rest: Ref) -> None:
    """One program: a share of one sequence's filled positions, for the heads that share one key-value head."""
    (*table, q_ref, k_ref, v_ref), rest = rest[: 3 + bool(p.page)], rest[3 + bool(p.page) :]
    arrays = 4 if p.codes else 2
    rotation, rest = rest[: 2 * p.rotates], rest[2 * p.rotates :]
    (keys, values, *scale_refs), rest = rest[:arrays], rest[arrays:]
    count = (3 if p.extra else 1) if p.qmax else 0
    recipe, rest = rest[:count], rest[count:]
    written, (out_ref, log_sum_ref, *codes_ref) = rest[:arrays], rest[arrays:]
    length = lengths[pl.program_id(0)]

    def place(position: Array) -> Array:
        """Where a position, or several, lies in the cache."""
        return table[0][position // p.page] * p.page + position % p.page if table else position

    oldest = jnp.int32(0) if p.window is None else jnp.maximum(length + 1 - p.window, 0)
    block = p.cut.block
    begin, end = oldest // block, (length + (block - 1)) // block
    share = (end - begin + (p.splits - 1)) // p.splits
    start = begin + pl.program_id(2) * share
    channel = jnp.arange(p.dim)
    # Rows beyond the group repeat its last, positions beyond the length the last position: nothing else is read.
    row = jnp.minimum(jnp.arange(p.rows), p.group - 1)
    q, k, v = q_ref[row, :].astype(jnp.float32), k_ref[:].astype(jnp.float32), v_ref[:].astype(jnp.float32)
    if p.rotates:
        cos, sin = (part[channel % (p.dim // 2)] for part in rotation)
        sin = jnp.where(channel < p.dim // 2, -sin, sin)
        other = (channel + p.dim // 2) % p.dim
        q = q * cos[None, :] + q_ref[row[:, None], other[None, :]].astype(jnp.float32) * sin[None, :]
        k = k * cos + k_ref[other].astype(jnp.float32) * sin
    q = q.astype(p.dtype)
    query = _two_codes(q, interpret) if p.codes and p.cut.integers else None
    k, v = k.astype(p.dtype).astype(jnp.float32), v.astype(p.dtype).astype(jnp.float32)
    new = [k, v]
    if p.codes:
        sizes = [jnp.maximum(jnp.max(jnp.abs(x)), 1e-8) / 127 for x in (k, v)]
        new = [rounded(x / size, 127, interpret) for x, size in zip((k, v), sizes, strict=True)]
        k, v = (x * size for x, size in zip(new, sizes, strict=True))
        new += sizes

    @pl.when(pl.program_id(2) == 0)
    def write() -> None:
        at = place(jnp.minimum(length, p.capacity - 1))
        for ref, entry in zip(written[:2], new[:2], strict=True):
            ref[at, :] = entry.astype(p.cache_dtype)
        for ref, entry in zip(written[2:], new[2:], strict=True):
            ref[at] = entry

    def body(i: Scalar, carry: Sequence[Array]) -> Sequence[Array]:
        best, total, out = carry
        position = i * block + jnp.arange(block)
        at = place(jnp.maximum(jnp.minimum(position, length - 1), 0))
        if query is not None:
            upper, lower, size = query
            codes = keys[at, :].T
            scores = _dot(upper, codes, jnp.int32) * UPPER_CODE_UNIT + _dot(lower, codes, jnp.int32)
            scores = scores.astype(jnp.float32) * (size * p.scale)[:, None]
        else:
            scores = _dot(q, keys[at, :].astype(p.dtype).T) * p.scale
        if p.codes:
            scores = scores * scale_refs[0][at][None, :]
        visible = (position < length) & (position >= oldest)
        scores = jnp.where(visible[None, :], scores, LOWEST_SCORE)
        higher = jnp.maximum(best, jnp.max(scores, axis=1))
        weights, kept = jnp.exp(scores - higher[:, None]), jnp.exp(best - higher)
        total = total * kept + jnp.sum(weights, axis=1)
        if p.codes:
            weights = weights * scale_refs[1][at][None, :]
        out = out * kept[:, None] + _dot(weights.astype(p.dtype), values[at, :].astype(p.dtype))
        return higher, total, out

    # Read before the loop: after it, they would have to be waited for.
    channels = attention_codes.channels(p, recipe) if recipe else []
    # The first program begins with the new token, the others with nothing.
    leads = pl.program_id(2) == 0
    score = jnp.sum(q.astype(jnp.float32) * k[None, :], axis=1) * p.scale
    best = jnp.where(leads, score, LOWEST_SCORE)
    total = jnp.where(leads, jnp.ones(p.rows), jnp.zeros(p.rows))
    out = jnp.broadcast_to(jnp.where(leads, v, 0.0)[None, :], (p.rows, p.dim))
    best, total, out = lax.fori_loop(start, jnp.minimum(start + share, end), body, (best, total, out))
    # Rows that repeat the last one write it again.
    out_ref[row, :] = (out / jnp.where(total > 0, total, 1)[:, None]).astype(out_ref.dtype)
    log_sum_ref[row] = jnp.where(total > 0, best + jnp.log(total), -jnp.inf)
    if recipe:
        attention_codes.write(p, interpret, out_ref, channels, codes_ref[0])


def _two_codes(x: Array, interpret: bool) -> tuple[Array, Array, Array]:
    """Rows as ``(UPPER_CODE_UNIT * upper + lower) * size``: two int8 codes for each element, and a size for each row."""
    x = x.astype(jnp.float32)
    size = jnp.maximum(jnp.max(jnp.abs(x), axis=1), 1e-8) / (127 * UPPER_CODE_UNIT)
    whole = rounded(x / size[:, None], 127 * UPPER_CODE_UNIT, interpret)
    upper = rounded(whole * (1 / UPPER_CODE_UNIT), 127, interpret)
    return upper.astype(jnp.int8), (whole - UPPER_CODE_UNIT * upper).astype(jnp.int8), size


def _dot(a: Array, b: Array, dtype: DTypeLike = jnp.float32) -> Array:
    return jnp.dot(a, b, preferred_element_type=dtype)
