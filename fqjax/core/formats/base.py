"""Formats of weights: what a config, a grid and a stored tensor of any format can do.

A weight goes through three types, which a format defines in one file:

    Format      the config: a frozen dataclass that users see; says how many bits a weight will take before there is one
    Grid        the numbers that a given weight may become: scales and the like, all but its codes
    QTensor     codes and scales as they lie on the device, and the product with them

Codes on the way are on the K original channels; a grid whose channels are cut into pieces has codes that reach several times
as far, and :meth:`Grid.pack` lays them out over K' channels.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float32, Int, Int8, Int32

from fqjax.core.channels import Channels, rounded_up
from fqjax.core.stored_inputs import Quantized
from fqjax.core.table import Sizes, Stored, bytes_of, static
from fqjax.runtime.settings import Settings
from pallas_kernels import Weight, quantized_matmul


class Format(Settings, abc.ABC):
    """The config of a format: a frozen dataclass that checks its fields, hashable, and JSON in checkpoints."""

    kind: ClassVar[str]
    tensor: ClassVar[type["QTensor"]]
    multiple: ClassVar[int] = 128
    """Multiple that K' is padded to."""
    bits: int
    """Of a code; a field, or a property."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """The part of a weight that has a scale of its own, for reports: "tensor", "channel", "group of 128"."""

    @property
    def takes_floating(self) -> bool:
        """Whether a tensor can be multiplied with activations in floating point."""
        return False

    def axes(self, sizes: Sizes) -> dict[str, int | None]:
        """Lengths of the axes that the tensor's table names besides "out", "in" and "width"."""
        return {}

    def padded(self, channels: int) -> int:
        """K' for so many channels."""
        return rounded_up(channels, self.multiple)

    def abstract(self, sizes: Sizes, dtypes: Mapping[str, str] | None = None) -> "QTensor":
        """A tensor with shapes in place of arrays."""
        return self.tensor.abstract(sizes, dtypes=dtypes, format=self)

    def bytes(self, outputs: int, width: int) -> int:
        """Bytes of a tensor on the device."""
        return bytes_of(self.abstract(Sizes(outputs, width, width)))

    def bits_per_weight(self, outputs: int, inputs: int) -> float:
        """Bits of a weight (outputs, inputs), scales and padding counted, over its number of entries."""
        return 8 * self.bytes(outputs, self.padded(inputs)) / (outputs * inputs)


@runtime_checkable
class RoundedWeight(Protocol):
    """A rounded weight on its original channels: a pytree that is the same type for any bits."""

    def __call__(self) -> Float32[Array, "n k"]:
        """The weight as it is represented."""
        ...


@runtime_checkable
class Grid(Protocol):
    """The numbers that a weight may become: a registered pytree (:class:`fqjax.core.table.Stored`)."""

    @property
    def format(self) -> Format:
        """Config of the tensor."""
        ...

    @property
    def pieces(self) -> Int32[Array, " k"] | None:
        """Pieces that each input channel is cut into; None for one each."""
        ...

    def round(self, w: Float32[Array, "n k"]) -> Int[Array, "n k"]:
        """The nearest codes of a transformed weight."""
        ...

    def column(self, w: Float32[Array, " n"], i: Int32[Array, ""]) -> Float32[Array, " n"]:
        """Column i of a weight as it will be represented, for rounding column by column."""
        ...

    def fake(self, w: Float32[Array, "n k"]) -> Float32[Array, "n k"]:
        """The rounded weight, with gradients straight through the rounding."""
        ...

    def weight(self, codes: Int[Array, "n k"]) -> RoundedWeight:
        """The weight that codes stand for."""
        ...

    def rows(self, rows: slice, w: Float32[Array, "n k"]) -> Self:
        """The grid of some output channels, ``w`` being their transformed weight."""
        ...

    def pack(self, codes: Int[Array, "n k"], channels: Channels) -> "QTensor":
        """The tensor that runs, over laid out channels."""
        ...


class QTensor(Stored, abstract=True):
    """A quantized weight as it lies on the device.

    Attributes:
      format: its config.
    """

    format: Any = static()

    @classmethod
    def axes(cls, sizes: Sizes, statics: Mapping[str, Any]) -> dict[str, int | None]:
        return super().axes(sizes, statics) | statics["format"].axes(sizes)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K') in codes, however they are stored."""

    @abc.abstractmethod
    def dequantize(self) -> Float32[Array, "out width"]:
        """The real weight, still transformed and flattened."""

    def matmul(
        self, x: Quantized, bias: Float[Array, " out"] | None = None, *, out_dtype: DTypeLike
    ) -> Float[Array, "*rows out"]:
        """``x @ W.T + bias``.

        Raises:
          NotImplementedError: for operands that no implementation takes.
        """
        weight_only = jnp.issubdtype(x.codes.dtype, jnp.floating)
        operand = self.operand(weight_only=weight_only)
        if operand is None:
            raise NotImplementedError(f"{self.format.kind}: no kernel multiplies it with {x.codes.dtype}")
        return quantized_matmul(x.codes, operand, 1.0 if weight_only else x.scale, bias, out_dtype=out_dtype)

    def unpacked(self) -> Int8[Array, "out width"]:
        """Integer codes, where the format has them.

        Raises:
          NotImplementedError: for a format without.
        """
        raise NotImplementedError(f"{self.format.kind}: has no integer codes")

    def operand(self, *, weight_only: bool = False) -> Weight | None:
        """The tensor as kernels take it, for activations in codes or in floating point; None if they do not."""
        return None

    def bound(self, qmax: int | None) -> int:
        """Largest magnitude an int32 accumulator can reach, for activation codes up to ``qmax``; 0 without such."""
        return 0

    def weight(self, source: Int32[Array, " e"], part: Int32[Array, " e"]) -> RoundedWeight:
        """The weight on its original channels, flattening undone."""
        raise NotImplementedError(f"{self.format.kind}: cannot be simulated")


class Dense(Stored):
    """A weight in floating point: how formats are simulated that have nothing smaller.

    Attributes:
      values: (N, K).
    """

    kind = "dense"

    values: Float32[Array, "n k"]

    def __call__(self) -> Float32[Array, "n k"]:
        return self.values
