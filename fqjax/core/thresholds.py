"""Where to cut: the truncation threshold T of a tensor, from the largest magnitude of each of its channels.

The published description does not fix the rule, so two are offered; both look at the distribution of channel maxima
``m`` and treat channels beyond the bulk as the ones to flatten.

    tukey   T = min(max(m), Q3 + strength * (Q3 - Q1))             the upper whisker of a box plot
    mean    T = strength * mean(m[m <= Q3 + 1.5 (Q3 - Q1)])        a multiple of the bulk's mean

A smaller T means a finer scale for every channel and more extra channels.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from fqjax.core.channels import MAX_PIECES, count_pieces

Rule = Literal["tukey", "mean"]


def threshold(channel_max: Float[Array, " k"], rule: Rule, strength: float) -> Float32[Array, ""]:
    """Applies ``rule`` to the channel maxima; at least ``max / MAX_PIECES``, at most ``max``, and positive."""
    m = channel_max.astype(jnp.float32)
    q1, q3 = jnp.percentile(m, 25), jnp.percentile(m, 75)
    if rule == "tukey":
        t = q3 + strength * (q3 - q1)
    else:
        bulk = m <= q3 + 1.5 * (q3 - q1)
        t = strength * jnp.sum(jnp.where(bulk, m, 0)) / jnp.maximum(jnp.sum(bulk), 1)
    largest = jnp.max(m)
    t = jnp.clip(t, largest / MAX_PIECES, largest)
    return jnp.where(t > 0, t, 1.0)


def within_budget(
    x_max: Float[Array, " k"],
    w_max: Float[Array, " k"],
    x_threshold: Float32[Array, ""],
    w_threshold: Float32[Array, ""],
    limits: tuple[int, int],
    max_expansion: float | Array,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Raises both thresholds by one common factor, the smallest for which K'/K stays within ``max_expansion``.

    ``limits`` are the largest codes of both operands.

    The factor is found by bisection in its logarithm, to one part in 10**4.  A threshold never passes its tensor's
    maximum, at which no channel is flattened and K' = K; so a budget of at least 1 can always be met.
    """
    top = jnp.maximum(jnp.max(x_max) / x_threshold, jnp.max(w_max) / w_threshold)

    def scaled(factor: Array) -> tuple[Array, Array]:
        return (
            jnp.minimum(x_threshold * factor, jnp.maximum(jnp.max(x_max), x_threshold)),
            jnp.minimum(w_threshold * factor, jnp.maximum(jnp.max(w_max), w_threshold)),
        )

    def fits(factor: Array) -> Array:
        tx, tw = scaled(factor)
        return jnp.mean(count_pieces(x_max, tx, limits[0]) * count_pieces(w_max, tw, limits[1])) <= max_expansion

    def halve(_: Array, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = jnp.sqrt(low * high)
        ok = fits(middle)
        return jnp.where(ok, low, middle), jnp.where(ok, middle, high)

    one = jnp.float32(1)
    _, high = jax.lax.fori_loop(0, 20, halve, (one, jnp.maximum(top, one)))
    return scaled(jnp.where(fits(one), one, high))
