"""Naive quantization: one scale per tensor, from its largest value.

    x_scale = max|x| / qmax,    w_scale = max|w| / qmax

The baseline.  One channel that is fifty times larger than the rest leaves the rest a fiftieth of the codes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.codes import absmax_scale
from fqjax.core.formats.uniform import Uniform, UniformGrid
from fqjax.core.inputs import Static, StaticInput
from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.core.transforms.diagonal import Diagonal
from fqjax.scheme import Scheme


def plans(layer: LayerInputs, scheme: Scheme, bits: int) -> list[LayerPlan]:
    """The one plan of a layer; see :mod:`fqjax.methods` for the arguments."""
    return [absmax_plan(layer, jnp.ones(layer.weight.shape[1], jnp.float32), bits)]


def formats(scheme: Scheme, bits: int) -> tuple[Uniform, type[StaticInput]]:
    """What is stored of a layer: the weight's format, and the quantizer of its input."""
    return Uniform(bits=bits), StaticInput  # pyright: ignore[reportArgumentType]


def absmax_plan(layer: LayerInputs, smoothing: Float[Array, " k"], bits: int) -> LayerPlan:
    """One scale per tensor from the largest value left after smoothing; nothing is flattened."""
    whole = jnp.ones(layer.weight.shape[1], jnp.int32)
    x_scale = absmax_scale(jnp.max(layer.x_max / smoothing), bits)
    w_scale = absmax_scale(jnp.max(jnp.abs(layer.weight * smoothing)), bits)
    return LayerPlan(
        transform=Diagonal(factors=smoothing),
        inputs=Static.of(x_scale, whole, bits),
        grid=UniformGrid(scale=w_scale, pieces=whole, format=Uniform(bits=bits)),  # pyright: ignore[reportArgumentType]
    )
