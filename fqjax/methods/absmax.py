"""Naive quantization: one scale per tensor, from its largest value, rounded to nearest.

    x_scale = max|x| / qmax,    w_scale = max|w| / qmax

The baseline.  One channel that is fifty times larger than the rest leaves the rest a fiftieth of the codes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.codes import absmax_scale
from fqjax.core.wide import WideLinear, round_weight
from fqjax.scheme import Scheme


def quantize_linear(weight: Float[Array, "n k"], x_max: Float[Array, " k"], scheme: Scheme, bits: int) -> WideLinear:
    """Quantizes one layer; see :mod:`fqjax.methods` for the arguments."""
    return scale_by_absmax(weight, x_max, jnp.ones(weight.shape[1], jnp.float32), bits)


def scale_by_absmax(
    weight: Float[Array, "n k"], x_max: Float[Array, " k"], smoothing: Float[Array, " k"], bits: int
) -> WideLinear:
    """One scale per tensor from the largest value left after smoothing; nothing is flattened."""
    x_scale = absmax_scale(jnp.max(x_max / smoothing), bits)
    w_scale = absmax_scale(jnp.max(jnp.abs(weight * smoothing)), bits)
    whole = jnp.ones(weight.shape[1], jnp.int32)
    codes = round_weight(weight, smoothing, w_scale, whole, bits)
    return WideLinear(smoothing, x_scale, w_scale, whole, whole, codes, bits)
