"""The layer that replaces ``nnx.Linear``: quantize the input, multiply integers, scale once."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypedDict

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from fqjax.core.formats.base import Format, QTensor
from fqjax.core.layer import completed
from fqjax.core.overflow import check_accumulator
from fqjax.core.stored_inputs import Quantized, StoredInput
from fqjax.core.table import Sizes, bytes_of
from fqjax.core.transforms.base import Transform
from fqjax.layers.record import Figures, Record
from fqjax.layers.summary import shortened
from fqjax.runtime.errors import InputError
from pallas_kernels import gated_matmul


class QuantizedVariable(nnx.Variable):
    """Holds the integer parts of a model; not an ``nnx.Param``, so optimisers and gradients leave it alone."""


class LayerParts(TypedDict):
    """Arguments of :class:`QuantizedLinear`."""

    weight: QTensor
    input: StoredInput
    bias: Array | None
    dtype: str | None
    param_dtype: str
    figures: Figures
    recipe: str
    transform: Transform | None
    branches: list[Callable[[Array], Array]]
    finish: Callable[[Array], Array] | None


class QuantizedLinear(nnx.Module):
    """``y = finish(weight @ input(transform(x)) + sum of branches + bias)``, on integer codes with int32 accumulation.

    Attributes:
      weight: a :class:`~fqjax.core.formats.base.QTensor`, codes (out, K').
      input: a :class:`~fqjax.core.stored_inputs.StoredInput`, from (..., K) real to (..., K') codes.
      bias: (out,) or None.
      transform: what runs before ``input`` does; None where that has taken it up, or there is none.
      branches: what is added to the product, each a function of the transformed input.
      finish: what becomes of the output; None for nothing.
      dtype: dtype of the output; None promotes the input's dtype with ``param_dtype``, as ``nnx.Linear`` does.
      param_dtype: dtype that the unquantized weights had.
      record: :class:`~fqjax.layers.record.Figures`.
      recipe: what the layer was quantized with, text that nothing depends on.

    Raises:
      InputError: when it is built, if the int32 accumulator could overflow.
    """

    def __init__(
        self,
        weight: QTensor,
        input: StoredInput,
        bias: Float[Array, " out"] | None = None,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        figures: Figures | None = None,
        recipe: str = "",
        transform: Transform | None = None,
        branches: Sequence[Callable[[Array], Array]] = (),
        finish: Callable[[Array], Array] | None = None,
        name: str = "linear layer",
    ):
        figures = figures or Figures()
        if weight.shape[1] != input.width:
            raise ValueError(f"{name}: weight {weight.shape} does not take {input.width} input channels")
        if input.qmax is None and not weight.format.takes_floating:
            raise ValueError(f"{name}: activations in floating point need packed weights with float scales of groups")
        check_accumulator(figures.accumulator_bound, name)
        self.weight = QuantizedVariable(weight)
        self.input = QuantizedVariable(input)
        self.bias = None if bias is None else nnx.Param(bias)
        self.transform = None if transform is None else QuantizedVariable(transform)
        self.branches = nnx.List([QuantizedVariable(branch) for branch in branches]) if branches else ()
        self.finish = None if finish is None else QuantizedVariable(finish)
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.record = Record(figures.encoded())
        self.recipe = recipe

    def __call__(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows out"]:
        """Map (..., K) to (..., out).

        Raises:
          InputError: for complex numbers, of which codes would hold one part alone.
        """
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise InputError(f"a quantized layer of {self.in_features} inputs: got {x.dtype}; expected real numbers")
        changed = x if self.transform is None else self.transform.get_value().inputs(x)
        codes = self.input.get_value()(changed)
        if not self.branches and self.finish is None:
            return self.multiply(codes, x.dtype)
        product = self.weight.get_value().matmul(codes, out_dtype=jnp.float32)
        added = [branch.get_value()(changed) for branch in self.branches]
        bias = None if self.bias is None else self.bias[...]
        y = completed(product, added, bias, None if self.finish is None else self.finish.get_value())
        return y.astype(self.result_dtype(x.dtype))

    def multiply(self, x: Quantized, dtype: DTypeLike) -> Float[Array, "*rows out"]:
        """The output for an input that has been quantized, of a layer that :attr:`is_plain`.

        Args:
          x: as ``input`` makes it.
          dtype: of the input before.
        """
        bias = None if self.bias is None else self.bias[...]
        return self.weight.get_value().matmul(x, bias, out_dtype=self.result_dtype(dtype))

    def gate(self, x: Quantized, dtype: DTypeLike, following: StoredInput, activation: str) -> Quantized:
        """:meth:`multiply`, its first half gating the second, as the next layer takes it; for a layer that :attr:`gates`.

        Args:
          x, dtype: as for :meth:`multiply`; this layer's activations are codes.
          following: quantizer of the next layer's input.
          activation: of the first half, one of :data:`pallas_kernels.quantize.reference.ACTIVATIONS`.
        """
        operand, recipe = self.weight.get_value().operand(), following.recipe()
        assert operand is not None and recipe is not None
        found = gated_matmul(
            x.codes,
            operand,
            x.scale,
            recipe.multiplier,
            recipe.source,
            recipe.part,
            activation=activation,
            qmax=recipe.qmax,
            bias=None if self.bias is None else self.bias[...],
            per_token=recipe.per_token,
            out_dtype=self.result_dtype(dtype),
        )
        return following.scaled(found.codes, found.scale)

    def result_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Dtype of the output, for an input that had some dtype before it was quantized."""
        return jnp.dtype(self.dtype or jnp.result_type(dtype, self.param_dtype))

    @property
    def is_plain(self) -> bool:
        """Whether the layer is no more than codes of its input times codes of its weight."""
        return self.transform is None and not self.branches and self.finish is None

    @property
    def fuses(self) -> bool:
        """Whether another kernel can quantize the layer's input in its own pass."""
        return self.is_plain and self.input.get_value().recipe() is not None

    @property
    def gates(self) -> bool:
        """Whether :meth:`gate` works."""
        return self.fuses and self.weight.get_value().operand() is not None

    @property
    def sizes(self) -> Sizes:
        """N, K and K'."""
        outputs, width = self.weight.get_value().shape
        return Sizes(outputs, self.input.get_value().inputs, width)

    @property
    def in_features(self) -> int:
        """Channels of the input, K."""
        return self.sizes.inputs

    @property
    def out_features(self) -> int:
        """Channels of the output, N."""
        return self.sizes.outputs

    @property
    def figures(self) -> Figures:
        """Figures measured of the layer; not under ``jax.jit``."""
        return Figures.decoded(self.record.get_value())

    @property
    def bits(self) -> int:
        """Bits of a weight code."""
        return self.weight.get_value().format.bits

    @property
    def expansion(self) -> float:
        """K'/K before padding; not under ``jax.jit``."""
        inputs = self.input.get_value().inputs
        return (inputs + self.figures.flattened) / inputs

    @property
    def nbytes(self) -> int:
        """Bytes on the device: codes, scales, the input's quantizer, the bias, and what else there is."""
        others = (self.transform, *self.branches, self.finish)
        parts = [self.weight.get_value(), self.input.get_value()]
        parts += [part.get_value() for part in others if part is not None]
        return bytes_of([*parts, None if self.bias is None else self.bias.get_value()])

    def changed(self, weight: QTensor, input: StoredInput, figures: Figures) -> "QuantizedLinear":
        """The same layer with another weight, quantizer of the input, and figures."""
        parts = self.parts()
        parts["weight"], parts["input"], parts["figures"] = weight, input, figures
        return QuantizedLinear(**parts)

    def parts(self) -> LayerParts:
        """The arguments that build the layer."""
        return {
            "weight": self.weight.get_value(),
            "input": self.input.get_value(),
            "bias": None if self.bias is None else self.bias[...],
            "dtype": None if self.dtype is None else self.dtype.name,
            "param_dtype": self.param_dtype.name,
            "figures": self.figures,
            "recipe": self.recipe,
            "transform": None if self.transform is None else self.transform.get_value(),
            "branches": [branch.get_value() for branch in self.branches],
            "finish": None if self.finish is None else self.finish.get_value(),
        }

    def __nnx_repr__(self) -> Generator[Any, None, None]:
        return shortened(super().__nnx_repr__())

    def widened(self, width: int) -> "QuantizedLinear":
        """The layer with more channels of padding, up to a width."""
        weight, quantizer, sizes = self.weight.get_value(), self.input.get_value(), self.sizes
        if width == sizes.width:
            return self
        return self.changed(weight.padded(sizes, width), quantizer.padded(sizes, width), self.figures)


def output_dtype(linear: nnx.Linear) -> DTypeLike | None:
    """The ``dtype`` with which a quantized layer gives its output in the type in which a linear layer does."""
    kept = linear.preferred_element_type
    if kept is None or linear.bias is None:
        return linear.dtype if kept is None else kept
    return jnp.result_type(kept, linear.dtype or linear.param_dtype)


def layer_bytes(linear: nnx.Linear, form: Format, quantizer: type[StoredInput], width: int) -> int:
    """:attr:`QuantizedLinear.nbytes` of the layer that a linear layer becomes, before it is made.

    Args:
      linear: may be abstract.
      form: of the weight.
      quantizer: of the input.
      width: K' with its padding.
    """
    sizes = Sizes(linear.out_features, linear.in_features, width)
    bias = None if linear.bias is None else linear.bias.get_value()
    return form.bytes(linear.out_features, width) + quantizer.bytes_for(sizes) + bytes_of(bias)
