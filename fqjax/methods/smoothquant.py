"""SmoothQuant (Xiao et al., arXiv 2211.10438): move range from activations to weights, then one scale per tensor.

Static per-tensor scales for both operands, the paper's setting O3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.smoothing import smoothing_factors
from fqjax.core.wide import WideLinear
from fqjax.methods.absmax import scale_by_absmax
from fqjax.scheme import Scheme


def quantize_linear(weight: Float[Array, "n k"], x_max: Float[Array, " k"], scheme: Scheme, bits: int) -> WideLinear:
    """Quantizes one layer; see :mod:`fqjax.methods` for the arguments."""
    smoothing = smooth(weight, x_max, scheme)
    return scale_by_absmax(weight, x_max, smoothing, bits)


def smooth(weight: Float[Array, "n k"], x_max: Float[Array, " k"], scheme: Scheme) -> Float[Array, " k"]:
    """The scheme's smoothing factors for a layer; ones where it has no ``alpha``."""
    if scheme.alpha is None:
        return jnp.ones(weight.shape[1], jnp.float32)
    return smoothing_factors(x_max, jnp.max(jnp.abs(weight), axis=0), scheme.alpha)
