"""The largest value an int32 accumulator can reach.

``|sum_k x[k] w[n, k]| <= qmax_x * sum_k |w[n, k]|``, and every partial sum obeys the same bound whatever the order of
addition.  XLA and the tensor cores wrap silently on overflow, so a layer is built, and loaded, only if its bound fits.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32

from fqjax.runtime.errors import InputError

LIMIT = 2**31 - 1


def row_sums(codes: Int8[Array, "n k"]) -> Int32[Array, " n"]:
    """Sum of the magnitudes of each output channel's codes; exact for any k below 2**24."""
    return jnp.sum(jnp.abs(codes.astype(jnp.int32)), axis=-1)


def accumulator_bound(largest_row: int, x_qmax: int) -> int:
    """Largest magnitude an accumulator can reach: the largest of :func:`row_sums` times the largest activation code."""
    return largest_row * x_qmax


def check_accumulator(bound: int, where: str) -> None:
    """Refuses a layer whose accumulator could wrap.

    Raises:
      InputError: naming ``where``, if ``bound`` exceeds 2**31 - 1.
    """
    if bound > LIMIT:
        raise InputError(
            f"{where}: the int32 accumulator could reach {bound}, which is above {LIMIT}; "
            "use fewer bits or leave this layer in float"
        )
