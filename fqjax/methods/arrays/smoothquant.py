"""Grids after smoothing (:mod:`fqjax.methods.smoothquant`)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.formats.uniform import Grid
from fqjax.core.layer import LayerInputs
from fqjax.core.transforms.diagonal import smoothing_factors
from fqjax.methods.arrays.absmax import absmax_grid


def grids(layer: LayerInputs, alpha: float | None, bits: int) -> Callable[[Array], Grid]:
    """The same grid for every bound; see :meth:`fqjax.methods.Method.grids` for the arguments."""
    grid = absmax_grid(layer, smooth(layer, alpha), bits)
    return lambda _: grid


def smooth(layer: LayerInputs, alpha: float | None) -> Float[Array, " k"]:
    """The smoothing factors of a layer; ones without ``alpha``."""
    if alpha is None:
        return jnp.ones(layer.weight.shape[1], jnp.float32)
    return smoothing_factors(layer.x_max, jnp.max(jnp.abs(layer.weight), axis=0), alpha)
