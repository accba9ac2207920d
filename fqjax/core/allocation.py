"""Which layers get 4 bits.

FlattenQuant computes 48.29 % of the linear layers' multiply-accumulates in INT4 and the rest in INT8.  Which layers those
are follows from what each costs: the divergence it causes in the model's output (:mod:`fqjax.drivers.trial`), or, as in the
paper, the Kullback-Leibler divergence of its own output's histogram (:func:`histogram_divergence`).  Layers are ranked by it
(:func:`select_low_bits`), or, where every layer has more than two ways to be quantized and the bytes count too, the
cheapest combination is looked for (:func:`choose`).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

HISTOGRAM_BINS = 2048
"""Bins of :func:`histogram_divergence`."""
PAIRED_CHANGES_LIMIT = 2500
"""Changes of one layer, beyond which they are not tried in pairs."""


def select_low_bits(errors: Sequence[float], macs: Sequence[int], needed: float) -> list[bool]:
    """Chooses the layers that are computed in the lower precision.

    Layers are taken in the order of rising error per multiply-accumulate until they hold ``needed``
    multiply-accumulates; then those that turn out not to be needed for it are given back, the costliest first.

    Args:
      errors: what each layer costs in the lower precision, in any additive measure.
      macs: multiply-accumulates of each layer; 0 for one that is never used, and so never chosen.
      needed: least number of multiply-accumulates in the lower precision.

    Returns:
      For each layer, whether it was chosen.  No layer if ``needed`` is 0, every used one if it is the sum of ``macs``.
    """
    order = sorted((i for i in range(len(errors)) if macs[i]), key=lambda i: errors[i] / macs[i])
    chosen: list[int] = []
    total = 0
    for i in order:
        if total >= needed:
            break
        chosen.append(i)
        total += macs[i]
    for i in sorted(chosen, key=lambda i: -errors[i]):
        if total - macs[i] >= needed:
            chosen.remove(i)
            total -= macs[i]
    return [i in chosen for i in range(len(errors))]


def choose(
    errors: Sequence[Sequence[float]],
    low_macs: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    *,
    least_macs: float,
    most_bytes: float,
) -> list[int]:
    """Chooses one of several options for every layer: least error in all, within two bounds on their sums.

    A Lagrangian: with prices for multiply-accumulates and for bytes every layer can choose for itself.  Prices on a grid are
    tried, and the best choice within the bounds is then improved by changing layers, one or two at a time.

    Args:
      errors: what each option of each layer costs, in any additive measure.
      low_macs: multiply-accumulates that the option computes in the lower precision.
      sizes: bytes of the option.
      least_macs, most_bytes: bounds on the sums.  Where no choice meets both, the one that misses the bytes by least.

    Returns:
      The number of the option of each layer.
    """
    width = max(map(len, errors))
    e, a, b = (
        np.array([[*row, *[fill] * (width - len(row))] for row in table], float)
        for table, fill in ((errors, np.inf), (low_macs, 0), (sizes, 0))
    )
    layers = np.arange(len(e))
    typical = max(e[np.isfinite(e)].max(), 1e-30)
    prices = np.concatenate([[0], np.geomspace(1e-7, 1e3, 81)]) * typical

    def key(option: np.ndarray) -> tuple[float, float, float]:
        missing = max(0.0, least_macs - a[layers, option].sum()) / max(least_macs, 1)
        excess = max(0.0, b[layers, option].sum() - most_bytes)
        return missing, excess, e[layers, option].sum()

    a_unit, b_unit = max(a.max(), 1), max(b.max(), 1)
    tried = (np.argmin(e - p * a / a_unit + q * b / b_unit, axis=1) for p in prices for q in prices)
    best = min(tried, key=key)
    moved, option = np.nonzero(np.isfinite(e))
    while True:
        # What every change of one layer adds to the sums; the last changes nothing.
        changes = [np.append(t[moved, option] - t[moved, best[moved]], 0.0) for t in (e, a, b)]
        sums = [t[layers, best].sum() for t in (e, a, b)]
        pairs = len(moved) if len(moved) <= PAIRED_CHANGES_LIMIT else 0
        first, second = np.arange(len(moved) + 1)[:, None], np.arange(len(moved) - pairs, len(moved) + 1)[None]
        error, share, size = (total + c[first] + c[second] for total, c in zip(sums, changes, strict=True))
        places = np.append(moved, -1)
        same = (places[first] == places[second]) & (places[first] >= 0)
        missing = np.maximum(0.0, least_macs - share) / max(least_macs, 1)
        excess = np.maximum(0.0, size - most_bytes)
        missing[same] = np.inf
        i, j = np.unravel_index(_first_of(missing, excess, error), missing.shape)
        better = best.copy()
        for move in (int(first[i, 0]), int(second[0, j])):
            if move < len(moved):
                better[moved[move]] = option[move]
        if key(better) >= key(best):
            return [int(o) for o in best]
        best = better


def _first_of(*keys: np.ndarray) -> int:
    """Where the first key is least, of these where the second is, and so on."""
    left = np.arange(keys[0].size)
    for values in keys:
        chosen = values.reshape(-1)[left]
        left = left[chosen <= chosen.min() + 1e-12 * abs(chosen.min())]
    return int(left[0])


def histogram_divergence(exact: Float[Array, "..."], approximate: Float[Array, "..."]) -> Float32[Array, ""]:
    """The divergence of the values' distribution from that of the exact ones, in nats.

    Both are histograms of :data:`HISTOGRAM_BINS` equal bins over the range of the exact values; what lies outside counts to
    the outermost bins, and every bin holds 1e-10 at least.
    """
    low, high = jnp.min(exact), jnp.max(exact)
    width = jnp.where(high > low, high - low, 1.0) / HISTOGRAM_BINS

    def histogram(values: Array) -> Array:
        places = jnp.clip(((values - low) / width).astype(jnp.int32), 0, HISTOGRAM_BINS - 1).reshape(-1)
        share = jnp.zeros(HISTOGRAM_BINS).at[places].add(1.0) / places.size + 1e-10
        return share / jnp.sum(share)

    p, q = histogram(exact), histogram(approximate)
    return jnp.sum(p * jnp.log(p / q))
