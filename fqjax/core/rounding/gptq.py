"""GPTQ: rounding that makes up for its own errors (Frantar et al., ICLR 2023, arXiv 2210.17323).

Rounding one column of a weight matrix changes the layer's output.  The columns not yet rounded can take most of that change
back, as far as their inputs resemble the input of the rounded one.  With H = X^T X of the calibration inputs, moving them by

    W[:, j > i]  -=  (W[:, i] - round(W[:, i])) / U[i, i] * U[i, j > i],        H^-1 = U^T U,  U upper triangular

is the least-squares answer (eq. 3, and the Cholesky form of section 3.3).  Columns go from left to right, in blocks: within a
block every column is updated at once, the columns behind it when the block is done, by one matrix product.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

ColumnQuantizer = Callable[[Float32[Array, " n"], Int32[Array, ""]], Float32[Array, " n"]]
"""(a column, its index in the weight) -> the column as it will be represented."""
FindScale = Callable[[Float32[Array, "n g"]], Float32[Array, " n"]]
"""The columns of a group -> the scale of each of its rows."""
ScaledQuantizer = Callable[[Float32[Array, " n"], Float32[Array, " n"]], Float32[Array, " n"]]
"""(a column, the scales of its group) -> the column as it will be represented."""

BLOCK = 128


class Prepared(NamedTuple):
    """What rounding needs of a Hessian; weights with the same input may share it.

    Attributes:
      factor: U above, of the columns in the order in which they are rounded, (k, k).
      order: that order.
      dead: whether a column's input is always zero.
    """

    factor: Float32[Array, "k k"]
    order: Int32[Array, " k"]
    dead: Bool[Array, " k"]


def prepare(hessian: Float32[Array, "k k"], *, damping: float = 0.01, act_order: bool = False) -> Prepared:
    """The part of :func:`gptq` that comes before the weight; see there for the arguments."""
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(len(diagonal))
    damp = jnp.where(dead, 1.0, damping * jnp.mean(diagonal))
    return Prepared(_factor((hessian + jnp.diag(damp))[order][:, order]), order, dead)


def gptq(
    weight: Float32[Array, "n k"],
    hessian: Float32[Array, "k k"],
    quantize_column: ColumnQuantizer,
    *,
    damping: float = 0.01,
    act_order: bool = False,
) -> Float32[Array, "n k"]:
    """Rounds a weight matrix column by column, each making up for the errors of those before it.

    Args:
      weight: (n, k), output by input channels, in any unit that ``quantize_column`` understands.
      hessian: X^T X of the layer's inputs, (k, k), times any positive number.
      quantize_column: what becomes of a column; jittable.  A grouped format looks up its scales by the index.
      damping: how much of the mean of H's diagonal is added to it (the paper's 1 %).
      act_order: round the columns with the largest inputs first, rather than from left to right.

    Returns:
      The represented weight, (n, k), in the order of ``weight``.  Columns whose input is always zero are zero.
    """
    return gptq_prepared(weight, prepare(hessian, damping=damping, act_order=act_order), quantize_column)


def gptq_prepared(
    weight: Float32[Array, "n k"], prepared: Prepared, quantize_column: ColumnQuantizer
) -> Float32[Array, "n k"]:
    """The part of :func:`gptq` that comes after the Hessian; see there for the arguments."""
    return _in_order(weight, prepared, quantize_column, None, 0)[0]


def gptq_grouped(
    weight: Float32[Array, "n k"],
    hessian: Float32[Array, "k k"],
    find_scale: FindScale,
    quantize_column: ScaledQuantizer,
    *,
    group_size: int,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> tuple[Float32[Array, "n k"], Float32[Array, "n groups"]]:
    """:func:`gptq` for a format with a scale for every row and every ``group_size`` input channels.

    Args:
      weight, hessian, damping, act_order: as for :func:`gptq`.
      find_scale: the scales of one group, from its columns; jittable.
      quantize_column: what becomes of a column of a group with these scales; jittable.
      group_size: channels of a group: a divisor of 128 and of k.
      static_groups: whether all scales come from the weight as it was, rather than each group's from what the errors before
        it have made of its columns.

    Returns:
      The represented weight, (n, k), and the scales, (n, k / group_size), both in the order of ``weight``.

    Raises:
      ValueError: if the groups do not fit, or if ``act_order`` is asked for without ``static_groups``: a group's columns
        would then be rounded at different times, and its scale would be needed before it is known.
    """
    n, k = weight.shape
    if group_size < 1 or BLOCK % group_size or k % group_size:
        raise ValueError(f"gptq_grouped: group_size must divide {BLOCK} and the {k} input channels, got {group_size}")
    if act_order and not static_groups:
        raise ValueError("gptq_grouped: act_order needs static_groups")
    if not static_groups:
        prepared = prepare(hessian, damping=damping)
        return _in_order(
            weight, prepared, lambda column, _, scale: quantize_column(column, scale), find_scale, group_size
        )
    scales = jax.vmap(find_scale, in_axes=1, out_axes=1)(weight.reshape(n, k // group_size, group_size))

    def quantize(column: Array, i: Array) -> Array:
        return quantize_column(column, scales[:, i // group_size])

    return gptq(weight, hessian, quantize, damping=damping, act_order=act_order), scales


def _in_order(
    weight: Float32[Array, "n k"],
    prepared: Prepared,
    quantize: Callable[..., Array],
    find_scale: FindScale | None,
    group_size: int,
) -> tuple[Float32[Array, "n k"], Float32[Array, "n groups"]]:
    """Puts the columns in the order in which they are rounded, rounds them, and puts them back."""
    n, k = weight.shape
    factor, order, dead = prepared
    weight = jnp.where(dead, 0.0, weight)[:, order]
    if padding := -k % BLOCK:
        weight = jnp.pad(weight, ((0, 0), (0, padding)))
        factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag((jnp.arange(k + padding) >= k) * 1.0)
    rounded, scales = _sweep(weight, factor, jnp.pad(order, (0, padding)), quantize, find_scale, group_size)
    return jnp.zeros((n, k), jnp.float32).at[:, order].set(rounded[:, :k]), scales[:, : k // (group_size or k)]


def absorb(
    weight: Float32[Array, "n k"], gram: Float32[Array, "k k"], cross: Float32[Array, "k k"], *, damping: float = 0.01
) -> Float32[Array, "n k"]:
    """The weight that comes closest to the layer's exact output when its input has errors.

    It minimises ``|X W^T - X' V^T|^2 + d |V - W|^2`` over V, with d = ``damping`` times the mean of the diagonal of
    ``gram``, which keeps it near W where the inputs say little: a linear least-squares fit.

    Args:
      weight: W, (n, k).
      gram: X'^T X' of the inputs with errors, (k, k).
      cross: X'^T X with the exact inputs of the same rows, (k, k).
      damping: see above.
    """
    return solve_ridge(gram, aim_of(weight, gram, cross, damping=damping), damping=damping)


def aim_of(
    weight: Float32[Array, "n k"], gram: Float32[Array, "k k"], cross: Float32[Array, "k k"], *, damping: float = 0.01
) -> Float32[Array, "k n"]:
    """The right-hand side of the equation that :func:`absorb` solves, (cross + d) W^T; see there for the arguments."""
    return cross @ weight.T + _ridge(gram, damping) * weight.T


def solve_ridge(
    gram: Float32[Array, "k k"], aim: Float32[Array, "k n"], *, damping: float = 0.01
) -> Float32[Array, "n k"]:
    """V of (gram + d) V^T = ``aim``; see :func:`absorb` for the other arguments."""
    ridge = _ridge(gram, damping) * jnp.eye(len(gram), dtype=gram.dtype)
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram + ridge, lower=True), aim).T


def _ridge(gram: Float32[Array, "k k"], damping: float) -> Float32[Array, ""]:
    mean = jnp.mean(jnp.diagonal(gram))
    return jnp.where(mean > 0, damping * mean, 1.0)


def _factor(hessian: Float32[Array, "k k"]) -> Float32[Array, "k k"]:
    """The upper triangular U with U^T U = H^-1.

    With H = L L^T of the matrix turned by 180 degrees, the inverse of that L, turned back, is U: one factorization and one
    triangular solve, and H is never inverted.
    """
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    identity = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)[::-1, ::-1]


def _sweep(
    weight: Float32[Array, "n k"],
    factor: Float32[Array, "k k"],
    order: Int32[Array, " k"],
    quantize: Callable[..., Array],
    find_scale: FindScale | None,
    group_size: int,
) -> tuple[Float32[Array, "n k"], Float32[Array, "n groups"]]:
    """Rounds the columns from left to right; with ``find_scale``, ``quantize`` gets the group's scales besides."""
    n, k = weight.shape

    def block(b: Int32[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, rounded, scales = carry
        start, zero = b * BLOCK, jnp.zeros_like(b)
        rows = lax.dynamic_slice(factor, (start, zero), (BLOCK, k))
        square = lax.dynamic_slice(rows, (zero, start), (BLOCK, BLOCK))

        def column(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
            w, scale = carry
            known: tuple[Array, ...] = ()
            if find_scale is not None:
                group = lax.dynamic_slice(w, (zero, i), (n, group_size))
                scale = lax.cond(i % group_size == 0, find_scale, lambda _: scale, group)
                known = (scale,)
            represented = quantize(w[:, i], order[start + i], *known)
            error = (w[:, i] - represented) / square[i, i]
            return (w - jnp.outer(error, square[i] * (jnp.arange(BLOCK) > i)), scale), (represented, error, scale)

        inside = lax.dynamic_slice(weight, (zero, start), (n, BLOCK))
        _, (columns, errors, found) = lax.scan(column, (inside, jnp.zeros(n)), jnp.arange(BLOCK))
        behind = rows * (jnp.arange(k) >= start + BLOCK)
        weight = weight - errors.T @ behind
        rounded = lax.dynamic_update_slice(rounded, columns.T, (zero, start))
        if find_scale is not None:
            first = b * (BLOCK // group_size)
            scales = lax.dynamic_update_slice(scales, found[::group_size].T, (zero, first))
        return weight, rounded, scales

    scales = jnp.zeros((n, k // (group_size or k)))
    _, rounded, scales = lax.fori_loop(0, k // BLOCK, block, (weight, jnp.zeros_like(weight), scales))
    return rounded, scales
