"""The layer that replaces ``nnx.Linear``: quantize the input, multiply integers, scale once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int8, Int32

from fqjax.core.integer_scale import group_sums, scaled_bound
from fqjax.core.overflow import accumulator_bound, check_accumulator, row_sums
from fqjax.qtensor import InputQuantizer, QTensor, bytes_of
from fqjax.scheme import Scheme
from pallas_kernels import (
    Weight,
    decoder_for,
    gated_matmul,
    grouped_int4_matmul,
    grouped_int8_matmul,
    int4_matmul,
    int8_matmul,
    weight_only_int4_matmul,
)


class Quantized(nnx.Variable):
    """Holds the integer parts of a model; not an ``nnx.Param``, so optimisers and gradients leave it alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """What is known about a quantized layer beyond its arrays; static, and stored with the checkpoint.

    Attributes:
      scheme: what it was quantized with.
      relative_error: mean squared error of the layer's output on the calibration sample over the output's mean square; 0
        where it is not known.
      accumulator_bound: largest magnitude the int32 accumulator can reach, for any activations; 0 if it is a float.
      macs: multiply-accumulates of the unquantized layer for one token.
    """

    scheme: Scheme
    relative_error: float
    accumulator_bound: int
    macs: int


class QuantizedLinear(nnx.Module):
    """``y = x @ W.T + b`` on integer codes, with int32 accumulation; or on real activations, with integer weights.

    Attributes:
      weight: :class:`~fqjax.qtensor.QTensor`, codes (out, K').
      input: :class:`~fqjax.qtensor.InputQuantizer`, from (..., K) real to (..., K') codes.
      bias: (out,) or None.
      dtype: dtype of the output; None promotes the input's dtype with ``param_dtype``, as ``nnx.Linear`` does.
      param_dtype: dtype that the unquantized weights had.
      summary: :class:`LayerSummary`.

    Raises:
      InputError: when it is built, if the int32 accumulator could overflow.
    """

    def __init__(
        self,
        weight: QTensor,
        input: InputQuantizer,
        bias: Float[Array, " out"] | None,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        summary: LayerSummary,
        name: str = "linear layer",
    ):
        if weight.shape[1] != input.width:
            raise ValueError(f"{name}: weight {weight.shape} does not take {input.width} input channels")
        form = weight.format
        if input.bits == 16 and (not form.packed or form.granularity != "group" or form.integer_scales):
            raise ValueError(f"{name}: activations in floating point need packed weights with float scales of groups")
        check_accumulator(summary.accumulator_bound, name)
        self.weight = Quantized(weight)
        self.input = Quantized(input)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.summary = summary

    def __call__(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows out"]:
        """Maps (..., K) to (..., out)."""
        codes, scale = self.input.get_value()(x)
        return self.multiply(codes, scale, x.dtype)

    def multiply(
        self,
        codes: Int8[Array, "*rows width"] | Float[Array, "*rows width"],
        scale: Float32[Array, "..."] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*rows out"]:
        """What the layer gives for an input that has been quantized.

        Args:
          codes, scale: as ``input`` makes them; no scale stands for a fixed one.
          dtype: of the input before.
        """
        weight, quantizer = self.weight.get_value(), self.input.get_value()
        scale = quantizer.scale if scale is None else scale
        bias = None if self.bias is None else self.bias[...]
        dtype = self.result_dtype(dtype)
        if quantizer.bits == 16:
            groups = weight.group_scale
            return weight_only_int4_matmul(codes, weight.codes, groups, weight.scale, bias, out_dtype=dtype)
        if weight.group_scale is not None:
            grouped = grouped_int4_matmul if weight.format.packed else grouped_int8_matmul
            kinds = {"out_dtype": dtype, "folded": weight.format.folded}
            return grouped(codes, weight.codes, scale, weight.group_scale, weight.scale, bias, **kinds)
        matmul = int4_matmul if weight.format.packed else int8_matmul
        return matmul(codes, weight.codes, scale, weight.scale, bias, out_dtype=dtype)

    def with_summary(self, summary: LayerSummary) -> "QuantizedLinear":
        """The same layer with another summary."""
        bias = None if self.bias is None else self.bias[...]
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return QuantizedLinear(self.weight.get_value(), self.input.get_value(), bias, summary=summary, **kinds)

    def gate(
        self,
        codes: Int8[Array, "*rows width"],
        scale: Float32[Array, "..."] | None,
        dtype: DTypeLike,
        quantizer: InputQuantizer,
        activation: str,
    ) -> tuple[Int8[Array, "*rows next"], Float32[Array, "..."] | None]:
        """What :meth:`multiply` gives, its first half gating the second, as the next layer takes it.

        Args:
          codes, scale, dtype: as for :meth:`multiply`; this layer's activations are codes.
          quantizer: of the next layer.
          activation: what the first half goes through, one of :data:`pallas_kernels.quantize.reference.ACTIVATIONS`.
        """
        weight = self.weight.get_value()
        groups = None if weight.group_scale is None else weight.group_scale.dtype
        decoder = decoder_for(4 if weight.format.packed else 8, group_dtype=groups, folded=weight.format.folded)
        found = gated_matmul(
            codes,
            Weight(decoder, weight.codes, weight.scale, weight.group_scale),
            self.input.get_value().scale if scale is None else scale,
            quantizer.multiplier,
            quantizer.source,
            quantizer.part,
            activation=activation,
            qmax=quantizer.qmax,
            bias=None if self.bias is None else self.bias[...],
            per_token=quantizer.scale is None,
            out_dtype=self.result_dtype(dtype),
        )
        return found.codes, found.scale

    def result_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Of the output, for an input that had some dtype before it was quantized."""
        return jnp.dtype(self.dtype or jnp.result_type(dtype, self.param_dtype))

    @property
    def bits(self) -> int:
        """Bits of a weight code."""
        return self.weight.get_value().format.bits

    @property
    def expansion(self) -> float:
        """K'/K before padding."""
        return self.input.get_value().expansion

    @property
    def nbytes(self) -> int:
        """Bytes on the device: codes, scales, the input's recipe, the bias."""
        bias = None if self.bias is None else self.bias.get_value()
        return self.weight.get_value().nbytes + self.input.get_value().nbytes + bytes_of(bias)


def layer_bytes(
    linear: nnx.Linear,
    bits: int,
    width: int,
    *,
    weight_scales: int,
    static: bool,
    group_size: int = 0,
    group_scale_bytes: int = 4,
) -> int:
    """What :attr:`QuantizedLinear.nbytes` will be of the layer that a linear layer becomes.

    Args:
      linear: may be abstract.
      bits: of the weight's codes.
      width: K' with its padding.
      weight_scales: number of the weight's scales, those of groups not counted.
      static: whether activations have one scale, rather than one a token.
      group_size: input channels of a group; 0 without groups.
      group_scale_bytes: of a group's scale: 2 for integers that fit into int16, 4 for others and floats.
    """
    codes = linear.out_features * width * bits // 8
    groups = linear.out_features * width // group_size * group_scale_bytes if group_size else 0
    words = linear.in_features + weight_scales + static  # float32: what activations are multiplied with, and scales;
    words += 2 * (width - linear.in_features)  # int32: the source and the part of every channel that was added.
    bias = None if linear.bias is None else linear.bias.get_value()
    return codes + groups + 4 * words + bytes_of(bias)


def measured_bound(weight: QTensor, input: InputQuantizer) -> int:
    """The accumulator bound of a layer, from its codes and, where they are integers, the scales of its groups.

    With float scales every group has an accumulator of its own; with activations in floating point there is none, and the
    bound is 0.
    """
    if input.bits == 16:
        return 0
    if weight.group_scale is None:
        return accumulator_bound(int(_largest_row(weight)), input.qmax)
    sums = np.asarray(group_sums_of(weight))
    if not weight.format.integer_scales:
        return accumulator_bound(int(sums.max(initial=0)), input.qmax)
    return scaled_bound(sums, np.asarray(weight.group_scale), input.qmax, weight.format.bits)


@jax.jit
def group_sums_of(weight: QTensor) -> Int32[Array, "groups out"]:
    """Sum of the magnitudes of the codes in each group of input channels."""
    return group_sums(weight.unpacked(), weight.format.group_size)


@jax.jit
def _largest_row(weight: QTensor) -> Int32[Array, ""]:
    return jnp.max(row_sums(weight.unpacked()))
