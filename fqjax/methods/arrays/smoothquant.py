"""Plans after smoothing (:mod:`fqjax.methods.smoothquant`)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.core.transforms.diagonal import smoothing_factors
from fqjax.methods.arrays.absmax import absmax_plan


def plans(layer: LayerInputs, alpha: float | None, bits: int) -> list[LayerPlan]:
    """The one plan of a layer."""
    return [absmax_plan(layer, smooth(layer, alpha), bits)]


def smooth(layer: LayerInputs, alpha: float | None) -> Float[Array, " k"]:
    """The smoothing factors of a layer; ones without ``alpha``."""
    if alpha is None:
        return jnp.ones(layer.weight.shape[1], jnp.float32)
    return smoothing_factors(layer.x_max, jnp.max(jnp.abs(layer.weight), axis=0), alpha)
