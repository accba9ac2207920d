"""GPTQ: rounding that makes up for its own errors (Frantar et al., ICLR 2023, arXiv 2210.17323).

Rounding one column of a weight matrix changes the layer's output.  The columns not yet rounded can take most of that change
back, as far as their inputs resemble the input of the rounded one.  With H = X^T X of the calibration inputs, moving them by

    W[:, j > i]  -=  (W[:, i] - round(W[:, i])) / U[i, i] * U[i, j > i],        H^-1 = U^T U,  U upper triangular

is the least-squares answer (eq. 3, and the Cholesky form of section 3.3).  Columns go from left to right, in blocks: within a
block every column is updated at once, the columns after it when the block is done, by one matrix product.
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
BLOCK_COLUMNS = 128
"""Columns that are rounded before those after them are updated."""


DAMPING = 0.01
"""How much of the mean of a matrix's diagonal is added to the diagonal (the paper's 1 %)."""


class Factored(NamedTuple):
    """A Hessian's Cholesky factor, of its columns in the order in which they are rounded.

    Attributes:
      lower: L of H = L L^T, of H turned by 180 degrees, (k, k); NaN where H is not positive definite.
      order: of the columns.
      finite: whether there is such a factor.
    """

    lower: Float32[Array, "k k"]
    order: Int32[Array, " k"]
    finite: Bool[Array, ""]


class Prepared(NamedTuple):
    """A Hessian as rounding needs it; weights with the same input may share it.

    Attributes:
      factor: U above, of the columns in the order in which they are rounded, (k, k).
      order: that order.
    """

    factor: Float32[Array, "k k"]
    order: Int32[Array, " k"]


def factorize(hessian: Float32[Array, "k k"], *, damping: float = DAMPING, act_order: bool = False) -> Factored:
    """The first half of :func:`prepare`, after which the Hessian is not needed any more; see :func:`gptq`."""
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(len(diagonal))
    damp = jnp.where(dead, 1.0, damping * jnp.mean(diagonal))
    lower = jnp.linalg.cholesky((hessian + jnp.diag(damp))[order][:, order][::-1, ::-1])
    return Factored(lower, order, jnp.isfinite(lower).all())


def invert(factored: Factored) -> Prepared:
    """The second half of :func:`prepare`: the upper triangular U with U^T U = H^-1.

    With H = L L^T of the matrix turned by 180 degrees, the inverse of that L, turned back, is U: one factorization and one
    triangular solve, and H is never inverted.
    """
    identity = jnp.eye(len(factored.lower), dtype=factored.lower.dtype)
    factor = lax.linalg.triangular_solve(factored.lower, identity, left_side=True, lower=True)[::-1, ::-1]
    return Prepared(factor, factored.order)


def prepare(hessian: Float32[Array, "k k"], *, damping: float = DAMPING, act_order: bool = False) -> Prepared:
    """The part of :func:`gptq` that comes before the weight; see there for the arguments."""
    return invert(factorize(hessian, damping=damping, act_order=act_order))


def gptq(
    weight: Float32[Array, "n k"],
    hessian: Float32[Array, "k k"],
    quantize_column: ColumnQuantizer,
    *,
    damping: float = DAMPING,
    act_order: bool = False,
) -> Float32[Array, "n k"]:
    """Rounds a weight matrix column by column, each making up for the errors of those before it.

    Args:
      weight: (n, k), output by input channels, in any unit that ``quantize_column`` understands.
      hessian: X^T X of the layer's inputs, (k, k), times any positive number.
      quantize_column: what becomes of a column; jittable.  A grouped format looks up its scales by the index.
      damping: how much of the mean of H's diagonal is added to it.
      act_order: round the columns with the largest inputs first, rather than from left to right.

    Returns:
      The represented weight, (n, k), in the order of ``weight``.  A column whose input is always zero is rounded as it is:
      its error changes no output, and so no other column.  Where the damped H is not positive definite, all but the first
      column to be rounded is NaN.
    """
    return gptq_prepared(weight, prepare(hessian, damping=damping, act_order=act_order), quantize_column)


def gptq_prepared(
    weight: Float32[Array, "n k"], prepared: Prepared, quantize_column: ColumnQuantizer
) -> Float32[Array, "n k"]:
    """The part of :func:`gptq` that comes after the Hessian; see there for the arguments."""
    n, k = weight.shape
    factor, order = prepared
    weight = weight[:, order]
    if padding := -k % BLOCK_COLUMNS:
        weight = jnp.pad(weight, ((0, 0), (0, padding)))
        factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag((jnp.arange(k + padding) >= k) * 1.0)
    rounded = _sweep(weight, factor, jnp.pad(order, (0, padding)), quantize_column)
    return jnp.zeros((n, k), jnp.float32).at[:, order].set(rounded[:, :k])


def aim_of(
    weight: Float32[Array, "n k"],
    gram: Float32[Array, "k k"],
    cross: Float32[Array, "k k"],
    *,
    damping: float = DAMPING,
) -> Float32[Array, "k n"]:
    """The right-hand side, (cross + d) W^T, of the equation for a weight whose input has errors.

    The solution V of (gram + d) V^T = (cross + d) W^T (:func:`solve_ridge`) minimises
    ``|X W^T - X' V^T|^2 + d |V - W|^2``, with d = ``damping`` times the mean of the diagonal of ``gram``, which keeps V near
    W where the inputs say little: a linear least-squares fit to the layer's exact output.

    Args:
      weight: W, (n, k).
      gram: X'^T X' of the inputs with errors, (k, k).
      cross: X'^T X with the exact inputs of the same rows, (k, k).
      damping: see above.
    """
    return cross @ weight.T + _ridge(gram, damping) * weight.T


def aim_of_more(
    aim: Float32[Array, "k n"],
    weight: Float32[Array, "n k"],
    gram: Float32[Array, "k k"],
    *,
    damping: float,
    before: float = DAMPING,
) -> Float32[Array, "k n"]:
    """:func:`aim_of` with another damping, from what it was with the damping ``before``; ``cross`` is not needed again."""
    return aim + (_ridge(gram, damping) - _ridge(gram, before)) * weight.T


def solve_ridge(
    gram: Float32[Array, "k k"], aim: Float32[Array, "k n"], *, damping: float = DAMPING
) -> tuple[Float32[Array, "n k"], Bool[Array, ""]]:
    """V of (gram + d) V^T = ``aim``, and whether it is finite; see :func:`aim_of` for the other arguments."""
    ridge = _ridge(gram, damping) * jnp.eye(len(gram), dtype=gram.dtype)
    found = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram + ridge, lower=True), aim).T
    return found, jnp.isfinite(found).all()


def _ridge(gram: Float32[Array, "k k"], damping: float) -> Float32[Array, ""]:
    mean = jnp.mean(jnp.diagonal(gram))
    return jnp.where(mean > 0, damping * mean, 1.0)


def _sweep(
    weight: Float32[Array, "n k"], factor: Float32[Array, "k k"], order: Int32[Array, " k"], quantize: ColumnQuantizer
) -> Float32[Array, "n k"]:
    """Rounds the columns from left to right."""
    n, k = weight.shape

    def block(b: Int32[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, rounded = carry
        start, zero = b * BLOCK_COLUMNS, jnp.zeros_like(b)
        rows = lax.dynamic_slice(factor, (start, zero), (BLOCK_COLUMNS, k))
        square = lax.dynamic_slice(rows, (zero, start), (BLOCK_COLUMNS, BLOCK_COLUMNS))

        def column(w: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            represented = quantize(w[:, i], order[start + i])
            error = (w[:, i] - represented) / square[i, i]
            return w - jnp.outer(error, square[i] * (jnp.arange(BLOCK_COLUMNS) > i)), (represented, error)

        inside = lax.dynamic_slice(weight, (zero, start), (n, BLOCK_COLUMNS))
        _, (columns, errors) = lax.scan(column, inside, jnp.arange(BLOCK_COLUMNS))
        after = rows * (jnp.arange(k) >= start + BLOCK_COLUMNS)
        return weight - errors.T @ after, lax.dynamic_update_slice(rounded, columns.T, (zero, start))

    _, rounded = lax.fori_loop(0, k // BLOCK_COLUMNS, block, (weight, jnp.zeros_like(weight)))
    return rounded
