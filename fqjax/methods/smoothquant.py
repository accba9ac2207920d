"""SmoothQuant (Xiao et al., arXiv 2211.10438): move range from activations to weights, then one scale per tensor.

Static per-tensor scales for both operands, the paper's setting O3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.core.transforms.diagonal import smoothing_factors
from fqjax.methods.absmax import absmax_plan
from fqjax.scheme import Scheme


def plans(layer: LayerInputs, scheme: Scheme, bits: int) -> list[LayerPlan]:
    """The one plan of a layer; see :mod:`fqjax.methods` for the arguments."""
    return [absmax_plan(layer, smooth(layer, scheme), bits)]


def smooth(layer: LayerInputs, scheme: Scheme) -> Float[Array, " k"]:
    """The scheme's smoothing factors for a layer; ones where it has no ``alpha``."""
    if scheme.alpha is None:
        return jnp.ones(layer.weight.shape[1], jnp.float32)
    return smoothing_factors(layer.x_max, jnp.max(jnp.abs(layer.weight), axis=0), scheme.alpha)
