"""Plans with one scale per tensor, from its largest value (:mod:`fqjax.methods.absmax`)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.codes import absmax_scale
from fqjax.core.formats.uniform import Uniform, UniformGrid
from fqjax.core.inputs import Static
from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.core.stored_inputs import StaticInput
from fqjax.core.transforms.diagonal import Diagonal


def formats(bits: int) -> tuple[Uniform, type[StaticInput]]:
    """Stored types of a layer: the weight's format, and the quantizer of its input."""
    return Uniform(bits=bits), StaticInput  # pyright: ignore[reportArgumentType]


def plans(layer: LayerInputs, bits: int) -> list[LayerPlan]:
    """The one plan of a layer."""
    return [absmax_plan(layer, jnp.ones(layer.weight.shape[1], jnp.float32), bits)]


def absmax_plan(layer: LayerInputs, smoothing: Float[Array, " k"], bits: int) -> LayerPlan:
    """One scale per tensor from the largest value left after smoothing; nothing is flattened."""
    whole = jnp.ones(layer.weight.shape[1], jnp.int32)
    x_scale = absmax_scale(jnp.max(layer.x_max / smoothing), bits)
    w_scale = absmax_scale(jnp.max(jnp.abs(layer.weight * smoothing)), bits)
    form, _ = formats(bits)
    return LayerPlan(
        transform=Diagonal(factors=smoothing),
        inputs=Static.of(x_scale, whole, bits),
        grid=UniformGrid(scale=w_scale, pieces=whole, format=form),
    )
