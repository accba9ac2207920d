"""Looks for the smoothing exponent and the two thresholds that serve a layer best, rather than following a rule.

A lower threshold makes the scale finer and adds channels.  Or it adds none, and what lies beyond it is cut off: a few
values are then wrong by much, all others by less.  For every exponent alpha on a grid, and for thresholds at several
quantiles of the channel maxima, with channels cut into pieces or cut off, the error that rounding the activations, or the
weights, causes in the layer's output is measured on sampled rows,

    e_x(T_x) = |(round(x) - x) W|^2,     e_w(T_w) = |x (round(W) - W)|^2,

and of all pairs whose K'/K is within the budget the one with the least e_x + e_w is taken.  The two errors add up, since
the one's sign knows nothing of the other's; so a pair costs no matrix product of its own.

A sample may miss the rare token with the largest activations; so activations are cut off at no less than half of the
largest value that calibration met.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from fqjax.core.channels import MAX_PIECES, count_pieces
from fqjax.core.codes import absmax_scale, qmax
from fqjax.core.transforms.diagonal import smoothing_factors

SMOOTHING_EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Candidates for the smoothing strength alpha."""
THRESHOLD_QUANTILES = (0.99, 0.97, 0.95, 0.92, 0.89, 0.85, 0.8, 0.74)
"""Of the channel maxima: thresholds that a few channels pass, by little."""
THRESHOLD_FRACTIONS = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12)
"""Of the largest value: thresholds between a few large channels and the others."""
CLIPPING_FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Thresholds beyond which values are cut off, as fractions of the largest value."""
CHANNEL_SCALE_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Candidates for the scale of an output channel of a weight, relative to that of its largest entry."""


class Found(NamedTuple):
    """The choice of :func:`search`.

    Attributes:
      smoothing: what activations are divided by, (K,).
      x_threshold, w_threshold: of the smoothed operands, scalars.
      x_pieces, w_pieces: pieces of each channel, (K,).
      error: squared error of the output on the samples that it expects.
    """

    smoothing: Float32[Array, " k"]
    x_threshold: Float32[Array, ""]
    w_threshold: Float32[Array, ""]
    x_pieces: Int32[Array, " k"]
    w_pieces: Int32[Array, " k"]
    error: Float32[Array, ""]


class _Cuts(NamedTuple):
    """Ways to cut one operand: thresholds (C,), and pieces of each channel (C, K)."""

    thresholds: Float32[Array, " c"]
    pieces: Int32[Array, "c k"]


def search(
    weight: Float32[Array, "n k"],
    x_max: Float32[Array, " k"],
    samples: Float32[Array, "s k"],
    *,
    x_bits: int,
    w_bits: int,
    alphas: tuple[float, ...] | None = SMOOTHING_EXPONENTS,
    flatten_activations: bool = True,
    flatten_weights: bool = True,
    budgets: Float32[Array, " b"],
) -> Found:
    """Chooses smoothing and thresholds of one layer.

    Args:
      weight: (N, K).
      x_max: largest magnitude of each input channel.
      samples: rows of the input to measure errors on.
      x_bits, w_bits: 4 or 8.
      alphas: smoothing exponents to try; None for no smoothing.
      flatten_activations, flatten_weights: which operand may be flattened.
      budgets: most that K'/K may be, at least 1; several to choose for at once.

    Returns:
      One choice for each budget: every attribute has a leading axis for them.
    """
    w_max = jnp.max(jnp.abs(weight), axis=0)

    def at(smoothing: Float32[Array, " k"]) -> Found:
        x, w = samples / smoothing, weight * smoothing
        x_cuts = _cuts(x_max / smoothing, x_bits, flatten_activations)
        w_cuts = _cuts(w_max * smoothing, w_bits, flatten_weights)
        x_errors = lax.map(lambda cut: jnp.sum(((_rounded(x, cut, x_bits) - x) @ w.T) ** 2), x_cuts)
        w_errors = lax.map(lambda cut: jnp.sum((x @ (_rounded(w, cut, w_bits) - w).T) ** 2), w_cuts)
        expansion = (x_cuts.pieces.astype(jnp.float32) @ w_cuts.pieces.T.astype(jnp.float32)) / weight.shape[1]
        errors = x_errors[:, None] + w_errors

        def within(budget: Array) -> Found:
            allowed = jnp.where(expansion <= budget, errors, jnp.inf)
            i, j = jnp.unravel_index(jnp.argmin(allowed), allowed.shape)
            cut = (x_cuts.thresholds[i], w_cuts.thresholds[j], x_cuts.pieces[i], w_cuts.pieces[j])
            return Found(smoothing, *cut, allowed[i, j])

        return jax.vmap(within)(budgets)

    if alphas is None:
        return at(jnp.ones_like(x_max))
    tried = lax.map(lambda alpha: at(smoothing_factors(x_max, w_max, alpha)), jnp.asarray(alphas))
    best = jnp.argmin(tried.error, axis=0)
    return Found(*(leaf[best, jnp.arange(len(budgets))] for leaf in tried))


def channel_scales(weight: Float32[Array, "n k"], importance: Float32[Array, " k"], bits: int) -> Float32[Array, " n"]:
    """One scale for every output channel: of several fractions of the largest weight the one that rounds best.

    Args:
      weight: (N, K), smoothed.
      importance: mean square of every input channel; errors are weighted with it.
      bits: 4 or 8.
    """
    whole = absmax_scale(jnp.max(jnp.abs(weight), axis=1), bits)

    def error(shrink: Array) -> Float32[Array, " n"]:
        scale = (whole * shrink)[:, None]
        rounded = jnp.clip(jnp.round(weight / scale), -qmax(bits), qmax(bits)) * scale
        return jnp.sum((rounded - weight) ** 2 * importance, axis=1)

    shrinks = jnp.asarray(CHANNEL_SCALE_FRACTIONS)
    return whole * shrinks[jnp.argmin(lax.map(error, shrinks), axis=0)]


def _cuts(channel_max: Float32[Array, " k"], bits: int, flatten: bool) -> _Cuts:
    largest = jnp.where(jnp.max(channel_max) > 0, jnp.max(channel_max), 1.0)
    whole = jnp.ones(channel_max.shape, jnp.int32)
    thresholds = largest * jnp.asarray((1.0, *CLIPPING_FRACTIONS))
    pieces = jnp.tile(whole, (len(thresholds), 1))
    if flatten:
        quantiles = jnp.quantile(channel_max, jnp.asarray(THRESHOLD_QUANTILES))
        lower = jnp.concatenate([quantiles, largest * jnp.asarray(THRESHOLD_FRACTIONS)])
        lower = jnp.maximum(lower, largest / MAX_PIECES)
        more = jax.vmap(lambda t: count_pieces(channel_max, t, qmax(bits)))(lower)
        thresholds, pieces = jnp.concatenate([thresholds, lower]), jnp.concatenate([pieces, more])
    return _Cuts(thresholds, pieces)


def _rounded(values: Array, cut: _Cuts, bits: int) -> Array:
    scale, limit = cut.thresholds / qmax(bits), cut.pieces * qmax(bits)
    return jnp.clip(jnp.round(values / scale), -limit, limit) * scale
