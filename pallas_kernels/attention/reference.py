"""Attention over a key-value cache, written in jax.numpy: the definition of the result, and the fallback of the kernels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.quantize.reference import quantize_per_token

LOWEST_SCORE = -1e30
"""Below every score, and still finite."""


def together(out: Float32[Array, "*heads parts group dim"], sums: Float32[Array, "*heads parts group"]) -> Array:
    """Attention over all positions, (..., group, dim), from attention over parts of them.

    Args:
      out: the weighted means of the values in every part.
      sums: logarithms of the sums of the weights; -inf for a part without positions.
    """
    largest = jnp.max(sums, axis=-2, keepdims=True)
    share = jnp.exp(sums - jnp.where(jnp.isfinite(largest), largest, 0))
    total = jnp.sum(share, axis=-2)[..., None]
    return jnp.sum(jnp.where(share[..., None] > 0, out, 0) * share[..., None], axis=-3) / total


def rotated(
    x: Float[Array, "*batch heads dim"], cos: Float32[Array, "*#batch 1 half"], sin: Float32[Array, "*#batch 1 half"]
) -> Float[Array, "*batch heads dim"]:
    """Pairs of channels, taken from the two halves of a head, turned by an angle (arXiv 2104.09864)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def decode_attention(
    qkv: Array,
    lengths: Array,
    rotation: Sequence[Array],
    cache: Sequence[Array],
    *,
    scale: float,
    window: int | None,
    pages: Array | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """Appends a token to every sequence and attends, over the whole capacity with a mask.

    Args:
      qkv, lengths: as :func:`pallas_kernels.decode_attention` takes them.
      rotation: cosines and sines, or nothing.
      cache: keys and values, and their scales if they are codes.
      scale: factor of the scores.
      window: number of last positions that are visible; None for all.
      pages: of each sequence, where the cache has pages; they are gathered to rows first.

    Returns:
      (batch, heads, dim) and the cache.
    """
    if pages is not None:
        rows = tuple(pool[pages].reshape(len(pages), -1, *pool.shape[2:]) for pool in cache)
        out, rows = decode_attention(qkv, lengths, rotation, rows, scale=scale, window=window)
        size, batch = cache[0].shape[1], jnp.arange(len(pages))
        last = jnp.minimum(lengths, pages.shape[1] * size - 1)
        at = pages[batch, last // size], last % size
        return out, tuple(pool.at[at].set(row[batch, last]) for pool, row in zip(cache, rows, strict=True))
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
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores * key_scales * scale, LOWEST_SCORE), axis=-1)
    weights = (weights * value_scales).astype(q.dtype)
    out = jnp.einsum("bkgs,bskd->bkgd", weights, values.astype(q.dtype), preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), cache
