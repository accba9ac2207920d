"""GPTQ: rounding that makes up for its own errors (Frantar et al., ICLR 2023, arXiv 2210.17323).

Rounding one column of a weight matrix changes the layer's output.  The columns not yet rounded can take most of that change
back, as far as their inputs resemble the input of the rounded one.  With H = X^T X of the calibration inputs, moving them by

    W[:, j > i]  -=  (W[:, i] - round(W[:, i])) / U[i, i] * U[i, j > i],        H^-1 = U^T U,  U upper triangular

is the least-squares answer (eq. 3, and the Cholesky form of section 3.3).  Columns go from left to right, in blocks: within a
block every column is updated at once, the columns behind it when the block is done, by one matrix product.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jaxtyping import Array, Float32, Int32

ColumnQuantizer = Callable[[Float32[Array, " n"], Int32[Array, ""]], Float32[Array, " n"]]
"""(a column, its index in the weight) -> the column as it will be represented."""

BLOCK = 128


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
    k = weight.shape[1]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(k)
    damp = jnp.where(dead, 1.0, damping * jnp.mean(diagonal))
    hessian = (hessian + jnp.diag(damp))[order][:, order]
    weight = jnp.where(dead, 0.0, weight)[:, order]
    padding = -k % BLOCK
    weight = jnp.pad(weight, ((0, 0), (0, padding)))
    factor = jnp.pad(_factor(hessian), ((0, padding), (0, padding))) + jnp.diag((jnp.arange(k + padding) >= k) * 1.0)
    rounded = _sweep(weight, factor, jnp.pad(order, (0, padding)), quantize_column)[:, :k]
    return jnp.zeros_like(rounded).at[:, order].set(rounded)


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
    ridge = damping * jnp.mean(jnp.diagonal(gram)) * jnp.eye(gram.shape[0], dtype=gram.dtype)
    ridge = jnp.where(jnp.trace(gram) > 0, ridge, jnp.eye(gram.shape[0], dtype=gram.dtype))
    factor = jax.scipy.linalg.cho_factor(gram + ridge, lower=True)
    return jax.scipy.linalg.cho_solve(factor, (cross + ridge) @ weight.T).T


def _factor(hessian: Float32[Array, "k k"]) -> Float32[Array, "k k"]:
    """The upper triangular U with U^T U = H^-1.

    With H = L L^T of the matrix turned by 180 degrees, the inverse of that L, turned back, is U: one factorization and one
    triangular solve, and H is never inverted.
    """
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    identity = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)[::-1, ::-1]


def _sweep(
    weight: Float32[Array, "n k"], factor: Float32[Array, "k k"], order: Int32[Array, " k"], quantize: ColumnQuantizer
) -> Float32[Array, "n k"]:
    n, k = weight.shape

    def block(b: Int32[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, rounded = carry
        start = b * BLOCK
        rows = lax.dynamic_slice(factor, (start, jnp.zeros_like(start)), (BLOCK, k))
        square = lax.dynamic_slice(rows, (jnp.zeros_like(start), start), (BLOCK, BLOCK))

        def column(w: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            represented = quantize(w[:, i], order[start + i])
            error = (w[:, i] - represented) / square[i, i]
            return w - jnp.outer(error, square[i] * (jnp.arange(BLOCK) > i)), (represented, error)

        inside = lax.dynamic_slice(weight, (jnp.zeros_like(start), start), (n, BLOCK))
        _, (columns, errors) = lax.scan(column, inside, jnp.arange(BLOCK))
        behind = rows * (jnp.arange(k) >= start + BLOCK)
        weight = weight - errors.T @ behind
        return weight, lax.dynamic_update_slice(rounded, columns.T, (jnp.zeros_like(start), start))

    return lax.fori_loop(0, k // BLOCK, block, (weight, jnp.zeros_like(weight)))[1]
