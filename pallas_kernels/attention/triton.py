"""The kernel for attention of one new token a sequence over a cache of keys and values, whose filled part alone is read.

The cache is (batch, capacity, kv_heads, head_dim) as a model writes it, in floating point or as INT8 codes with a scale
for each token and head, and is neither transposed nor converted in memory.  The kernel (Pallas Triton) takes the output of
the query, key and value projections as it is, turns queries and keys by their position, writes the new key and value into
the cache and attends, all at once.  It divides each sequence's own length, or its window, among several programs per
key-value head, so that a small batch fills the GPU too and none of them looks at positions behind the length; every program
takes its softmax online, the first of them beginning with the new token, and what they found is put together by the
logarithms of their sums (Flash-Decoding).  The query heads that share a key-value head are the rows of one matrix product.

INT8 codes are not dequantized: the key's scale goes onto the score, and the value's onto the weight.  Where there are many
sequences, queries become integers too, and keys need not be converted to be multiplied.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.attention import codes as attention_codes
from pallas_kernels.attention.codes import Recipe
from pallas_kernels.matmul.dispatch import has_triton
from pallas_kernels.matmul.reference import quantize_per_token, rotated
from pallas_kernels.quantize.triton import rounded

PROGRAMS = 132
"""Programs that are wanted on a GPU at least: one for each multiprocessor of an H100 or H200."""
MANY = 3 * PROGRAMS
"""Key-value heads of all sequences from which on every multiprocessor has several programs at once."""
LOW = 128
"""What the upper of a query's two codes counts, each of which fits into int8."""
LOWEST = -1e30
"""Below every score, and still finite."""
LEAST_ROWS = 16
"""Of a matrix product on tensor cores; fewer query heads are filled up."""
LIGHT_DIM = 128
"""Of a head whose output for the least rows fits into the registers of one warp, at most."""
FEWEST_WHOLE, SHORT = 112, 1024
"""Key-value heads from which on, and the capacity up to which, one program for each finds its output whole."""
LEAST_CODES = 32
"""That a matrix product of integers adds up on tensor cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How the work is cut up.

    Attributes:
      splits: programs for each key-value head of a sequence; None for so many that the GPU is filled.
      block: positions that a program reads at once.
      warps, stages: of a program, and blocks that it has on their way.
      integers: whether queries are multiplied with a cache's INT8 codes as integers, of 15 bits in two parts.
    """

    splits: int | None = None
    block: int = 64
    warps: int = 4
    stages: int = 3
    integers: bool = False

    def programs(self, heads: int, capacity: int) -> int:
        """For each of so many key-value heads of all sequences together, with a cache of that capacity."""
        return self.splits or min(-(-PROGRAMS // heads), -(-capacity // self.block))


def best_cut(heads: int, group: int, dim: int, codes: bool, *, whole: bool = False) -> Cut:
    """The fastest of those tried on an H200 in November 2026; ``scripts/tune_decoding.py`` tries them again.

    Args:
      heads: key-value heads of all sequences together.
      group: query heads that share one.
      dim: of a head.
      codes: whether the cache is INT8.
      whole: whether what comes out is to be quantized with fixed scales, which one program for each key-value head can do
        itself, and the cache is so short that one is enough.
    """
    if group > LEAST_ROWS or dim > LIGHT_DIM:  # One warp or two cannot hold the output.
        return Cut()
    if heads >= MANY:
        return Cut(block=32, warps=1, integers=codes and dim >= LEAST_CODES)
    if whole and FEWEST_WHOLE <= heads:
        return Cut(splits=1, block=128, integers=codes and dim >= LEAST_CODES)
    return Cut() if codes or heads < PROGRAMS // 2 else Cut(warps=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What a kernel is made for: sizes, what scores are multiplied with, and how the work is cut up.

    Where one program finds all of a head's output, it can quantize it: then ``qmax`` is the largest code, and ``extra`` how
    many channels there are for large ones to continue in.
    """

    batch: int
    capacity: int
    kv_heads: int
    group: int
    dim: int
    dtype: Any
    cache_dtype: Any
    codes: bool
    rotates: bool
    scale: float
    window: int | None
    cut: Any
    qmax: int = 0
    extra: int = 0

    @classmethod
    def of(
        cls, qkv: Any, rotation: Sequence[Any], cache: Sequence[Any], scale: float, window: int | None, cut: Any
    ) -> "Problem":
        """For such operands."""
        (batch, heads, dim), (_, capacity, kv_heads, _) = qkv.shape, cache[0].shape
        sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "group": heads // kv_heads - 2, "dim": dim}
        kinds = {"dtype": qkv.dtype, "cache_dtype": cache[0].dtype, "codes": len(cache) > 2, "rotates": bool(rotation)}
        return cls(**sizes, **kinds, scale=scale, window=window, cut=cut)

    def quantizing(self, recipe: Recipe) -> "Problem":
        """The same for a kernel that quantizes what it finds."""
        return dataclasses.replace(self, qmax=recipe.qmax, extra=len(recipe.source))

    @property
    def splits(self) -> int:
        return self.cut.programs(self.batch * self.kv_heads, self.capacity)

    @property
    def rows(self) -> int:
        return max(LEAST_ROWS, pl.next_power_of_2(self.group))


def reference(
    qkv: Array,
    lengths: Array,
    rotation: Sequence[Array],
    cache: Sequence[Array],
    *,
    scale: float,
    window: int | None,
) -> tuple[Array, tuple[Array, ...]]:
    """The same by XLA, over the whole capacity with a mask."""
    (batch, _, dim), (_, capacity, kv_heads, _) = qkv.shape, cache[0].shape
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=1)
    if rotation:
        cos, sin = (part[:, None] for part in rotation)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    if len(cache) > 2:
        (k, k_scale), (v, v_scale) = (quantize_per_token(x, jnp.ones(dim), 127, dim) for x in (k, v))
        new = (k, v, k_scale, v_scale)
    else:
        new = (k, v)
    at = jnp.arange(batch), jnp.minimum(lengths, capacity - 1)
    cache = tuple(old.at[at].set(entry.astype(old.dtype)) for old, entry in zip(cache, new, strict=True))
    keys, values, *scales = cache
    key_scales, value_scales = (jnp.swapaxes(s, 1, 2)[:, :, None] for s in scales) if scales else (1, 1)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bkgd,bskd->bkgs", grouped, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    before = lengths[:, None] + 1 - jnp.arange(capacity)
    visible = (before > 0) if window is None else (before > 0) & (before <= window)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores * key_scales * scale, LOWEST), axis=-1)
    weights = (weights * value_scales).astype(q.dtype)
    out = jnp.einsum("bkgs,bskd->bkgd", weights, values.astype(q.dtype), preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), cache


def cannot_use(qkv: Any, keys: Any, values: Any) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        return f"qkv is {qkv.dtype}, not bfloat16 or float16"
    for name, operand in (("keys", keys), ("values", values)):
        if operand.dtype not in (qkv.dtype, jnp.int8):
            return f"{name} are {operand.dtype}, not {qkv.dtype} or int8"
    if not has_triton():
        return "this version of JAX has no Triton backend of Pallas"
    dim, group = qkv.shape[2], qkv.shape[1] // keys.shape[2] - 2
    if dim not in (16, 32, 64, 128, 256):
        return f"head_dim is {dim}, not a power of 2 from 16 to 256"
    if group > 64:
        return f"{group} heads share a key-value head, more than 64"
    if math.prod(keys.shape) >= 2**31:
        return "keys have 2^31 elements or more"
    return None


def run(
    qkv: Array,
    lengths: Array,
    rotation: Sequence[Array],
    cache: Sequence[Array],
    *,
    scale: float,
    window: int | None,
    finish: Callable[[Array, Array | None], Any],
    recipe: Recipe | None = None,
    cut: Cut | None = None,
    interpret: bool = False,
) -> tuple[Any, tuple[Array, ...]]:
    """The kernel, and what puts together the parts.

    Args:
      qkv, lengths, rotation: as :func:`pallas_kernels.decode_attention` takes them; no rotation is an empty tuple.
      cache: its arrays.
      scale: what scores are multiplied with.
      window: as there.
      finish: what is made of the parts, (batch, kv_heads, parts, group, dim), and the logarithms of their sums, None if there
        is one part.
      recipe: if there is one part, the kernel itself quantizes it so, and the result is the codes, in a tuple.
      cut: how the work is cut up; by default :func:`best_cut`.
      interpret: whether to run on the CPU.
    """
    (batch, heads, dim), (_, capacity, kv_heads, _) = qkv.shape, cache[0].shape
    heads -= 2 * kv_heads
    whole = recipe is not None and capacity <= SHORT
    cut = cut or best_cut(batch * kv_heads, heads // kv_heads, dim, len(cache) > 2, whole=whole)
    p = Problem.of(qkv, rotation, cache, scale, window, cut)
    if recipe is not None and p.splits == 1:
        p = p.quantizing(recipe)
        how = recipe[1:] if p.extra else recipe[1:2]
        *written, _, _, codes = _call(p, interpret)(lengths, qkv, qkv, qkv, *rotation, *cache, *how)
        return (codes,), tuple(written)
    *written, out, log_sum = _call(p, interpret)(lengths, qkv, qkv, qkv, *rotation, *cache)
    return finish(out, log_sum if p.splits > 1 else None), tuple(written)


def _call(p: Problem, interpret: bool) -> Any:
    from jax.experimental.pallas import triton as plgpu

    heads = p.kv_heads * p.group
    half = pl.BlockSpec((None, p.dim // 2), lambda b, h, s: (b, 0))
    cache = [pl.BlockSpec((None, p.capacity, None, p.dim), lambda b, h, s: (b, 0, h, 0))] * 2
    shape = (p.batch, p.capacity, p.kv_heads, p.dim)
    arrays = [jax.ShapeDtypeStruct(shape, p.cache_dtype)] * 2
    if p.codes:
        cache += [pl.BlockSpec((None, p.capacity, None), lambda b, h, s: (b, 0, h))] * 2
        arrays += [jax.ShapeDtypeStruct(shape[:3], jnp.float32)] * 2
    parts = (p.batch, p.kv_heads, p.splits, p.group)
    first = 4 + 2 * p.rotates  # of the cache among the operands
    channels = heads * p.dim
    recipe = [channels, *([p.extra] * 2 if p.extra else [])] if p.qmax else []
    row = pl.BlockSpec((None, channels + p.extra), lambda b, h, s: (b, 0))
    codes = [row] if p.qmax else []
    return pl.pallas_call(
        functools.partial(_kernel, p, interpret),
        grid=(p.batch, p.kv_heads, p.splits),
        in_specs=[
            pl.BlockSpec((p.batch,), lambda b, h, s: (0,)),
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


def _kernel(p: Problem, interpret: bool, lengths: Any, q_ref: Any, k_ref: Any, v_ref: Any, *rest: Any) -> None:
    """One program: a share of one sequence's filled positions, for the heads that share one key-value head."""
    arrays = 4 if p.codes else 2
    rotation, rest = rest[: 2 * p.rotates], rest[2 * p.rotates :]
    (keys, values, *scale_refs), rest = rest[:arrays], rest[arrays:]
    count = (3 if p.extra else 1) if p.qmax else 0
    recipe, rest = rest[:count], rest[count:]
    written, (out_ref, log_sum_ref, *codes_ref) = rest[:arrays], rest[arrays:]
    length = lengths[pl.program_id(0)]
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
    new: list[Any] = [k, v]
    if p.codes:
        sizes = [jnp.maximum(jnp.max(jnp.abs(x)), 1e-8) / 127 for x in (k, v)]
        new = [rounded(x / size, 127, interpret) for x, size in zip((k, v), sizes, strict=True)]
        k, v = (x * size for x, size in zip(new, sizes, strict=True))
        new += sizes

    @pl.when(pl.program_id(2) == 0)
    def write() -> None:
        place = jnp.minimum(length, p.capacity - 1)
        for ref, entry in zip(written[:2], new[:2], strict=True):
            ref[place, :] = entry.astype(p.cache_dtype)
        for ref, entry in zip(written[2:], new[2:], strict=True):
            ref[place] = entry

    def body(i: Any, carry: Sequence[Array]) -> Sequence[Array]:
        best, total, out = carry
        position = i * block + jnp.arange(block)
        at = jnp.maximum(jnp.minimum(position, length - 1), 0)
        if query is not None:
            upper, lower, size = query
            codes = keys[at, :].T
            scores = _dot(upper, codes, jnp.int32) * LOW + _dot(lower, codes, jnp.int32)
            scores = scores.astype(jnp.float32) * (size * p.scale)[:, None]
        else:
            scores = _dot(q, keys[at, :].astype(p.dtype).T) * p.scale
        if p.codes:
            scores = scores * scale_refs[0][at][None, :]
        visible = (position < length) & (position >= oldest)
        scores = jnp.where(visible[None, :], scores, LOWEST)
        higher = jnp.maximum(best, jnp.max(scores, axis=1))
        weights, kept = jnp.exp(scores - higher[:, None]), jnp.exp(best - higher)
        total = total * kept + jnp.sum(weights, axis=1)
        if p.codes:
            weights = weights * scale_refs[1][at][None, :]
        out = out * kept[:, None] + _dot(weights.astype(p.dtype), values[at, :].astype(p.dtype))
        return higher, total, out

    channels = (
        attention_codes.channels(p, recipe) if recipe else []
    )  # Read before the loop: behind it, it would have to be waited for.
    # The first program begins with the new token, the others with nothing.
    leads = pl.program_id(2) == 0
    score = jnp.sum(q.astype(jnp.float32) * k[None, :], axis=1) * p.scale
    best = jnp.where(leads, score, LOWEST)
    total = jnp.where(leads, jnp.ones(p.rows), jnp.zeros(p.rows))
    out = jnp.broadcast_to(jnp.where(leads, v, 0.0)[None, :], (p.rows, p.dim))
    best, total, out = lax.fori_loop(start, jnp.minimum(start + share, end), body, (best, total, out))
    # Rows that repeat the last one write it again.
    out_ref[row, :] = (out / jnp.where(total > 0, total, 1)[:, None]).astype(out_ref.dtype)
    log_sum_ref[row] = jnp.where(total > 0, best + jnp.log(total), -jnp.inf)
    if recipe:
        attention_codes.write(p, interpret, out_ref, channels, codes_ref[0])


def _two_codes(x: Array, interpret: bool) -> tuple[Array, Array, Array]:
    """Rows as ``(LOW * upper + lower) * size``: two int8 codes for each element, and a size for each row."""
    x = x.astype(jnp.float32)
    size = jnp.maximum(jnp.max(jnp.abs(x), axis=1), 1e-8) / (127 * LOW)
    whole = rounded(x / size[:, None], 127 * LOW, interpret)
    upper = rounded(whole * (1 / LOW), 127, interpret)
    return upper.astype(jnp.int8), (whole - LOW * upper).astype(jnp.int8), size


def _dot(a: Array, b: Array, dtype: Any = jnp.float32) -> Array:
    return jnp.dot(a, b, preferred_element_type=dtype)
