"""A linear layer with the statistics of its input, and the plan of the layer that it becomes."""

import dataclasses
from collections.abc import Callable, Iterable
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
else:  # Type checks at run time would refuse what JAX puts into pytrees in place of these.
    TransformLike = InputsLike = GridLike = FunctionLike = object


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """A linear layer, and the statistics of its input.

    Attributes:
      weight: (N, K), output channels first.
      x_max: largest magnitude of every input channel, (K,); a typical one where calibration hardly ever excited it.
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
      branches: what is added to the product, each a function of the transformed input.
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

    def product(self, x: Float[Array, "*rows k"], rounded: RoundedWeight) -> Float32[Array, "*rows n"]:
        """The rounded input times the rounded weight, in float32 arithmetic on the original channels."""
        return fake_input(self.transform, self.inputs, x) @ rounded().T

    def output(
        self, x: Float[Array, "*rows k"], rounded: RoundedWeight, weight: Float[Array, "n k"]
    ) -> Float32[Array, "*rows n"]:
        """The output of the quantized layer, had it no bias, in float32 arithmetic.

        Args:
          x: the layer's input.
          rounded: its transformed weight as it is represented.
          weight: as it was before.
        """
        y = self.product(x, rounded)
        added = [branch(self.transform.inputs(x)) for branch in self.branches]
        return completed(y, added, self.transform.bias(weight, None), self.finish)

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


def completed(
    y: Float[Array, "*rows n"],
    added: Iterable[Float[Array, "*rows n"]],
    bias: Float[Array, " n"] | None,
    finish: Callable[[Array], Array] | None,
) -> Float[Array, "*rows n"]:
    """The output of a layer, from the product of its codes: ``finish(y + sum(added) + bias)``.

    Args:
      y: the product.
      added: what each branch gives.
      bias: transformed; None for none.
      finish: as :class:`LayerPlan` has it.
    """
    for one in added:
        y = y + one
    y = y if bias is None else y + bias
    return y if finish is None else finish(y)


def relative_error(plan: LayerPlan, rounded: RoundedWeight, layer: LayerInputs) -> Float32[Array, ""]:
    """Mean squared error of the quantized layer's output over the mean square of the exact one; 0 if both are 0."""
    exact = layer.samples.astype(jnp.float32) @ layer.weight.astype(jnp.float32).T
    return relative_square(plan.output(layer.samples, rounded, layer.weight), exact)


def relative_square(given: Float32[Array, "..."], exact: Float32[Array, "..."]) -> Float32[Array, ""]:
    """Squared difference over the square of what is exact; 0 if both are 0, NaN if one is."""
    error = jnp.sum((given - exact) ** 2)
    return jnp.where(error == 0, 0.0, error / jnp.maximum(jnp.sum(exact**2), jnp.finfo(jnp.float32).tiny))
