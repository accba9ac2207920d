"""A linear layer with the statistics of its input, and the plan of the layer that it becomes."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from fqjax.core.formats.base import Grid, RoundedWeight
from fqjax.core.inputs import InputQuantizer
from fqjax.core.transforms.base import Recipe, Transform

if TYPE_CHECKING:
    TransformLike = Transform
    InputsLike = InputQuantizer
    GridLike = Grid
    FunctionLike = Callable[[Array], Array]
else:  # JAX puts placeholders into pytrees, which are no instances of the protocols.
    TransformLike = InputsLike = GridLike = FunctionLike = object


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """A linear layer, and the statistics of its input.

    Attributes:
      weight: (N, K), output channels first.
      x_max: largest magnitude of every input channel, (K,).
      samples: some rows of the input, (S, K).
    """

    weight: Float32[Array, "n k"]
    x_max: Float32[Array, " k"]
    samples: Float32[Array, "s k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How a layer is to be quantized: everything but the weight's codes.

        y = finish(fake(T(x)) @ fake(T(W)).T + sum(branch(T(x)) for branch in branches) + T(b))

    Attributes:
      transform: T.
      inputs: quantizer of the layer's input.
      grid: numbers that the transformed weight may become.
      branches: what is added to the product (:mod:`fqjax.core.branches`).
      finish: what becomes of the output; None for nothing.
    """

    transform: TransformLike
    inputs: InputsLike
    grid: GridLike
    branches: tuple[FunctionLike, ...] = ()
    finish: FunctionLike | None = None

    def round(self, weight: Float[Array, "n k"]) -> Int[Array, "n k"]:
        """The nearest codes of a weight that is not transformed yet."""
        return self.grid.round(self.transform.weight(weight))

    def product(self, x: Float[Array, "*rows k"], codes: Int[Array, "n k"]) -> Float32[Array, "*rows n"]:
        """The quantized layer's output without bias and branches, in float32 arithmetic on the original channels."""
        return fake_input(self.transform, self.inputs, x) @ self.grid.weight(codes)().T

    def expansion(self, k: int) -> Float32[Array, ""]:
        """K'/K before padding, for K input channels."""
        return channels_used(self, k) / k


def channels_used(plan: LayerPlan, k: int) -> Array:
    """K' before padding, for K input channels."""
    x_pieces, w_pieces = plan.inputs.pieces, plan.grid.pieces
    if x_pieces is None or w_pieces is None:
        only = x_pieces if w_pieces is None else w_pieces
        return jnp.int32(k) if only is None else jnp.sum(only)
    return jnp.sum(x_pieces * w_pieces)


def fake_input(transform: Transform, inputs: InputQuantizer, x: Float[Array, "*rows k"]) -> Float32[Array, "*rows k2"]:
    """A layer's transformed input as its codes represent it."""
    recipe: Recipe | None = transform.recipe()
    return inputs.fake(transform.inputs(x), None) if recipe is None else inputs.fake(x, recipe)


def relative_error(plan: LayerPlan, codes: Int[Array, "n k"], layer: LayerInputs) -> Float32[Array, ""]:
    """Mean squared error of the quantized layer's output over the mean square of the exact one; 0 if both are 0."""
    exact = layer.samples.astype(jnp.float32) @ layer.weight.astype(jnp.float32).T
    return relative_square(plan.product(layer.samples, codes), exact)


def relative_square(given: Float32[Array, "..."], exact: Float32[Array, "..."]) -> Float32[Array, ""]:
    """Squared difference over the square of what is exact; 0 if both are 0, NaN if one is."""
    error = jnp.sum((given - exact) ** 2)
    return jnp.where(error == 0, 0.0, error / jnp.maximum(jnp.sum(exact**2), jnp.finfo(jnp.float32).tiny))


__all__ = ["Grid", "LayerInputs", "LayerPlan", "RoundedWeight", "fake_input", "relative_error", "relative_square"]
