"""Attention over the tokens at hand, or over a cache, for all model families.

There are three cases, told apart when the program is traced:

- no cache, or one that is known to be empty: causal attention among the tokens at hand, by cuDNN where it can;
- several tokens a sequence over a cache (a piece of a long prompt): block after block of the cache, as far as it is filled;
- one token a sequence over a cache (decoding): a kernel that reads the filled part alone, or XLA with a mask.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from fqjax.models.cache import LayerCache
from fqjax.models.rotary import Rotation, rotate
from pallas_kernels import decode_attention
from pallas_kernels.device import NO_GPU, capability, say

ResultT = TypeVar("ResultT")

BLOCK = 1024
"""Positions of a cache that several tokens attend to at once, which bounds the memory that scores take."""


def attend(
    qkv: Float[Array, "batch length all_heads dim"],
    kv_heads: int,
    cache: LayerCache | None,
    lengths: Int32[Array, " batch"] | None,
    *,
    rotation: Rotation | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "batch length heads dim"], LayerCache | None]:
    """Causal attention; query heads share key-value heads in groups where there are fewer of the latter.

    Args:
      qkv: projections of the tokens at hand: all heads' queries, then ``kv_heads`` keys, then as many values.
      kv_heads: how many key-value heads there are.
      cache: this layer's keys and values of earlier tokens; None attends among the tokens at hand alone.
      lengths: tokens each sequence already has in the cache; None says that it is empty, so that nothing is read from it.
      rotation: what queries and keys are turned by first, at the tokens' positions.
      scale: what scores are multiplied with; 1 / sqrt(dim) by default.
      window: how many tokens a query sees, its own and those right before it; None for all (arXiv 2310.06825, section 2).

    Returns:
      The attended values, and the cache with the new keys and values in it.  Every query sees keys and values as the cache
      holds them, its own among them, also where they are not read from it.
    """
    if cache is not None and decodes(qkv, cache, lengths):
        out, arrays = decode_step(decode_attention, qkv, cache, lengths, rotation=rotation, scale=scale, window=window)
        return out[:, None], cache.holding(arrays)
    heads = qkv.shape[2] - 2 * kv_heads
    q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    if cache is None:
        return causal_attention(q, k, v, scale, window), None
    new = cache.write(k, v, lengths)
    if lengths is None:
        return causal_attention(q, *cache.rounded(k, v), scale, window), new
    if new.pages is not None or new.capacity > BLOCK:
        return attend_in_blocks(q, new, lengths, scale, window), new
    # Token i of sequence b stands at position lengths[b] + i and sees no position after its own.
    visible = _visible(lengths, q.shape[1], jnp.arange(new.capacity), window)
    return jax.nn.dot_product_attention(q, *new.read(q.dtype), mask=visible[:, None], scale=scale), new


def decodes(qkv: Array, cache: LayerCache | None, lengths: Array | None) -> bool:
    """Whether there is one token a sequence, and what it attends to is read from a cache."""
    return cache is not None and lengths is not None and qkv.shape[1] == 1


def decode_step(
    attention: Callable[..., ResultT],
    qkv: Float[Array, "batch one all_heads dim"],
    cache: LayerCache | None,
    lengths: Int32[Array, " batch"] | None,
    *operands: Array,
    rotation: Rotation | None,
    scale: float | None = None,
    window: int | None,
) -> ResultT:
    """Attention of such a token, by :func:`pallas_kernels.decode_attention` or one that takes further operands."""
    assert cache is not None and lengths is not None
    here = None if rotation is None else tuple(part[:, 0] for part in rotation)
    held = cache.keys, cache.values, lengths, cache.key_scales, cache.value_scales
    paged = {} if cache.pages is None else {"pages": cache.pages}
    return attention(qkv[:, 0], *held, *operands, rotation=here, scale=scale, window=window, **paged)


def causal_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    scale: float | None = None,
    window: int | None = None,
) -> Float[Array, "batch length heads dim"]:
    """Attention among the tokens at hand: by cuDNN on an NVIDIA GPU that has it and for operands it takes, else by XLA.

    What comes after a token does not reach it, so sequences may be padded on the right.
    """
    local = None if window is None else (window - 1, 0)
    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True, scale=scale, local_window_size=local)
    xla, cudnn = functools.partial(causal, implementation="xla"), functools.partial(causal, implementation="cudnn")
    reason = _cannot_use_cudnn(cudnn, q, k, v)
    say("attention among the tokens at hand", q.shape, "xla" if reason else "cudnn", reason or "")
    return xla(q, k, v) if reason else lax.platform_dependent(q, k, v, cuda=cudnn, default=xla)


def attend_in_blocks(
    q: Float[Array, "batch length heads dim"],
    cache: LayerCache,
    lengths: Int32[Array, " batch"],
    scale: float | None = None,
    window: int | None = None,
    block: int = BLOCK,
) -> Float[Array, "batch length heads dim"]:
    """Attention of several tokens over a cache that holds them and those before them, in bounded memory.

    The softmax is taken online (arXiv 1805.02867) over blocks of positions, up to the last that any query sees.

    Args:
      q: queries of the tokens at positions ``lengths`` and on.
      cache: with their keys and values in it.
      lengths: tokens each sequence had before these.
      scale: what scores are multiplied with; 1 / sqrt(dim) by default.
      window: how many tokens a query sees; None for all.
      block: positions taken at once.
    """
    batch, length, heads, dim = q.shape
    capacity, kv_heads = cache.capacity, cache.keys.shape[2]
    block = min(block, capacity)
    if cache.pages is not None:
        page = cache.keys.shape[1]
        block = max(block // page, 1) * page
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    factor = 1 / math.sqrt(dim) if scale is None else scale

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, out = carry
        start = jnp.minimum(i * block, capacity - block)
        keys, values = cache.block(start, block).read(q.dtype)
        scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32) * factor
        positions = start + jnp.arange(block)
        # The last block may have been moved to the left; what it shares with the one before has been counted.
        visible = _visible(lengths, length, positions, window) & (positions >= i * block)
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        higher = jnp.maximum(best, jnp.max(scores, axis=-1))
        finite = jnp.where(jnp.isfinite(higher), higher, 0)  # A query may see nothing of the first blocks.
        weights, kept = jnp.exp(scores - finite[..., None]), jnp.exp(best - finite)
        added = jnp.einsum("bkgts,bskd->bkgtd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        return higher, total * kept + jnp.sum(weights, axis=-1), out * kept[..., None] + added

    rows = (batch, kv_heads, heads // kv_heads, length)
    start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, dim)))
    blocks = jnp.minimum(-(-(jnp.max(lengths) + length) // block), -(-capacity // block))
    first = 0 if window is None else jnp.maximum(jnp.min(lengths) + 1 - window, 0) // block
    _, total, out = lax.fori_loop(first, blocks, body, start)
    return jnp.moveaxis(out / total[..., None], 3, 1).reshape(q.shape).astype(q.dtype)


def _visible(lengths: Array, length: int, positions: Array, window: int | None) -> Array:
    """Whether each of ``length`` queries after each sequence's length sees each position: (batch, length, positions)."""
    distance = (lengths[:, None] + jnp.arange(length))[:, :, None] - positions
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def _cannot_use_cudnn(attention: Callable[..., Array], *operands: Array) -> str | None:
    """Why cuDNN cannot take these operands; None if it can."""
    if capability() < (8, 0):
        return NO_GPU
    if operands[0].shape[1] == 1:
        return "there is one token alone"
    try:
        jax.eval_shape(attention, *operands)  # JAX's own conditions: dtypes, head dimensions, whether cuDNN is there.
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None
