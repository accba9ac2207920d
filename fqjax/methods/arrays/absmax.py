"""Grids with one scale per tensor, from its largest value (:mod:`fqjax.methods.absmax`)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.codes import absmax_scale
from fqjax.core.formats.uniform import Grid
from fqjax.core.layer import LayerInputs


def grids(layer: LayerInputs, bits: int) -> Callable[[Array], Grid]:
    """The same grid for every bound; see :meth:`fqjax.methods.Method.grids` for the arguments."""
    grid = absmax_grid(layer, jnp.ones(layer.weight.shape[1], jnp.float32), bits)
    return lambda _: grid


def absmax_grid(layer: LayerInputs, smoothing: Float[Array, " k"], bits: int) -> Grid:
    """One scale per tensor from the largest value left after smoothing; nothing is flattened."""
    whole = jnp.ones(layer.weight.shape[1], jnp.int32)
    return Grid(
        smoothing=smoothing,
        x_scale=absmax_scale(jnp.max(layer.x_max / smoothing), bits),
        w_scale=absmax_scale(jnp.max(jnp.abs(layer.weight * smoothing)), bits),
        x_pieces=whole,
        w_pieces=whole,
        x_bits=bits,
        bits=bits,
    )
