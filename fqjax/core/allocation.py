"""Which layers get 4 bits.

FlattenQuant computes 48.29 % of the linear layers' multiply-accumulates in INT4 and the rest in INT8.  Which layers those
are follows from what each costs: the divergence it causes in the model's output (:mod:`fqjax.drivers.trial`), or, as in the
paper, the Kullback-Leibler divergence of its own output's histogram (:func:`histogram_divergence`).  Layers are ranked by it
(:func:`select_low_bits`), or, where every layer has more than two ways to be quantized and the bytes count too, the
cheapest combination is looked for (:func:`choose`).
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

HISTOGRAM_BINS = 2048
"""Bins of :func:`histogram_divergence`."""
LARGEST_COST = 1e3
"""The largest cost, as the solver sees it, which looks no closer than 1e-6."""
RELATIVE_GAP = 1e-6
"""How near the solver comes to the least cost, relative to it: of two choices as near as that either will do."""
FIRST_OPTIONS = 200
"""Options looked at first, besides one for each layer."""


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

    By integer programming, exact up to :data:`RELATIVE_GAP`; the same choice each time.

    Args:
      errors: what each option of each layer costs, in any additive measure.
      low_macs: multiply-accumulates that the option computes in the lower precision.
      sizes: bytes of the option.
      least_macs, most_bytes: bounds on the sums.  Where no choice meets both, as many multiply-accumulates as there can be
        come first, up to the bound, and then as few bytes.

    Returns:
      The number of the option of each layer.
    """
    table = _Options.of(errors, low_macs, sizes)
    least_macs = min(least_macs, float(sum(map(max, low_macs))))
    found = table.cheapest(table.errors, least_macs, most_bytes)
    if found is None:
        smallest = table.cheapest(table.sizes, least_macs, np.inf)
        assert smallest is not None  # The options with the most multiply-accumulates would do.
        found = table.cheapest(table.errors, least_macs, float(table.sizes[smallest].sum()))
        found = smallest if found is None else found
    return [int(option) for option in table.number[found]]


Bounds = list[tuple[np.ndarray, float]]
"""Rows over all options, and the most that the sum of each over the chosen ones may be."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """All layers' options in one row.

    Attributes:
      layer, number: whose option each is, and which of them.
      errors, macs, sizes: of each option.
    """

    layer: np.ndarray
    number: np.ndarray
    errors: np.ndarray
    macs: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, *tables: Sequence[Sequence[float | int]]) -> "_Options":
        layer = np.repeat(np.arange(len(tables[0])), [len(row) for row in tables[0]])
        number = np.concatenate([np.arange(len(row)) for row in tables[0]])
        return cls(layer, number, *(np.concatenate([np.asarray(row, float) for row in table]) for table in tables))

    def cheapest(self, costs: np.ndarray, least_macs: float, most_bytes: float) -> np.ndarray | None:
        """The places of one option of each layer, of least cost within the bounds; None if there are none.

        Prices for multiply-accumulates and bytes, from the problem with parts of options allowed, tell by how much each
        option is dearer than its layer's best.  In the cheapest choice none is dearer by more than what the whole choice
        costs beyond that problem's, so few options have to be looked at.
        """
        bounds: Bounds = [(-self.macs, -least_macs)] if least_macs > 0 else []
        bounds += [(self.sizes, most_bytes)] if np.isfinite(most_bytes) else []
        largest = float(costs.max())
        if largest > LARGEST_COST * np.finfo(float).tiny:  # Else they are all 0.
            costs = costs * (LARGEST_COST / largest)
        prices = _prices(costs, bounds, self.layer)
        if prices is None:
            return None
        priced = costs + sum(price * row for price, (row, _) in zip(prices, bounds, strict=True))
        best = np.full(self.layer[-1] + 1, np.inf)
        np.minimum.at(best, self.layer, priced)
        dearer = priced - best[self.layer]
        least = best.sum() - sum(price * most for price, (_, most) in zip(prices, bounds, strict=True))
        order, count = np.sort(dearer), len(best) + FIRST_OPTIONS
        limit = order[min(count, len(order)) - 1]
        while True:
            some = np.flatnonzero(dearer <= limit)
            found = _cheapest_of(some, costs, bounds, self.layer)
            if len(some) == len(order) or (found is not None and costs[found].sum() - least <= limit):
                return found
            count *= 4
            limit = order[min(count, len(order)) - 1] if found is None else costs[found].sum() - least


def _prices(costs: np.ndarray, bounds: Bounds, layer: np.ndarray) -> np.ndarray | None:
    """What a unit of each bounded sum is worth, where parts of options may be taken; None if they do not suffice either."""
    if not bounds:
        return np.zeros(0)
    rows, scales = np.stack([row for row, _ in bounds]), np.array([_scale(row) for row, _ in bounds])
    limits = np.array([most for _, most in bounds]) / scales
    found = linprog(costs, rows / scales[:, None], limits, _one_each(layer), np.ones(layer[-1] + 1), method="highs")
    return None if found.x is None else np.maximum(-found.ineqlin.marginals, 0) / scales


def _cheapest_of(some: np.ndarray, costs: np.ndarray, bounds: Bounds, layer: np.ndarray) -> np.ndarray | None:
    """The cheapest choice among some options, by their places; None if there is none within the bounds.

    The bounded sums are counted in their largest common unit, and half a unit lies between what is within and what is not.
    Where the solver goes beyond all the same, by its tolerance, it is asked again to stay as far below.
    """
    units = [float(np.gcd.reduce(np.abs(row).astype(np.int64))) or 1.0 for row, _ in bounds]
    margins = [0.0] * len(bounds)
    while True:
        within = [
            LinearConstraint(row[None, some] / unit, -np.inf, np.floor((most - margin) / unit) + 0.5)
            for (row, most), margin, unit in zip(bounds, margins, units, strict=True)
        ]
        each = LinearConstraint(_one_each(layer[some]), 1, 1)
        solved = milp(
            costs[some],
            integrality=np.ones(len(some)),
            bounds=(0, 1),
            constraints=[each, *within],
            options={"mip_rel_gap": RELATIVE_GAP},
        )
        if solved.x is None:
            return None
        found = some[solved.x > 0.5]
        beyond = [max(0.0, row[found].sum() - most) for row, most in bounds]
        if not any(beyond):
            return found
        margins = [2 * margin + excess for margin, excess in zip(margins, beyond, strict=True)]


def _one_each(layer: np.ndarray) -> csr_matrix:
    """The sums over each layer's options, as a matrix."""
    return csr_matrix((np.ones(len(layer)), (layer, np.arange(len(layer)))))


def _scale(row: np.ndarray) -> float:
    return max(float(np.abs(row).max()), 1.0)


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
