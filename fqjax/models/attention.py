"""Attention over the tokens at hand, or over a cache: what the model families share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from fqjax.models.cache import LayerCache, write


def attend(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads dim"],
    cache: LayerCache | None,
    lengths: Int32[Array, " batch"] | None,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "batch length heads dim"], LayerCache | None]:
    """Causal attention; query heads share key-value heads in groups where there are fewer of the latter.

    Args:
      q, k, v: projections of the tokens at hand.
      cache: this layer's keys and values of earlier tokens; None attends among the tokens at hand alone.
      lengths: tokens each sequence already has in the cache.
      scale: what scores are multiplied with; 1 / sqrt(dim) by default.
      window: how many tokens a query sees, its own and those right before it; None for all (arXiv 2310.06825, section 2).

    Returns:
      The attended values, and the cache with the new keys and values in it.
    """
    if cache is None:
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale, local_window_size=local), None
    assert lengths is not None
    keys, values = write(cache[0], k, lengths), write(cache[1], v, lengths)
    # Token i of sequence b stands at position lengths[b] + i and sees no position behind its own.
    position = lengths[:, None] + jnp.arange(q.shape[1])
    distance = position[:, None, :, None] - jnp.arange(keys.shape[1])
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    out = jax.nn.dot_product_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask=visible, scale=scale)
    return out, (keys, values)
