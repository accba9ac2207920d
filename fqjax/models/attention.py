"""Attention over the tokens at hand, or over a cache, and rotary positions: what the model families share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fqjax.models.cache import LayerCache, write


def attend(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    cache: LayerCache | None,
    lengths: Int32[Array, " batch"] | None,
    scale: float | None = None,
) -> tuple[Float[Array, "batch length heads dim"], LayerCache | None]:
    """Causal attention; query heads share key-value heads in groups where there are fewer of the latter.

    Args:
      q, k, v: projections of the tokens at hand.
      cache: this layer's keys and values of earlier tokens; None attends among the tokens at hand alone.
      lengths: tokens each sequence already has in the cache.
      scale: what scores are multiplied with; 1 / sqrt(dim) by default.

    Returns:
      The attended values, and the cache with the new keys and values in it.
    """
    if cache is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale), None
    assert lengths is not None
    keys, values = write(cache[0], k, lengths), write(cache[1], v, lengths)
    # Token i of sequence b stands at position lengths[b] + i and sees every position up to its own.
    position = lengths[:, None] + jnp.arange(q.shape[1])
    visible = jnp.arange(keys.shape[1]) <= position[:, None, :, None]
    out = jax.nn.dot_product_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask=visible, scale=scale)
    return out, (keys, values)


def rotate(
    x: Float[Array, "batch length heads dim"], positions: Int32[Array, "..."], inverse: Float32[Array, " half"]
) -> Float[Array, "batch length heads dim"]:
    """Rotary position embedding (arXiv 2104.09864), pairs taken from the two halves of a head.

    Args:
      x: queries or keys.
      positions: (length,) or (batch, length).
      inverse: angle per position of each pair, (dim / 2,).
    """
    angles = positions[..., None].astype(jnp.float32) * inverse
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
