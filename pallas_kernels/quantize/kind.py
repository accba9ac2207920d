"""The operations that turn activations into codes, as a description that kernels and their reference share."""

import dataclasses
from collections.abc import Sequence
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.mosaic.types import Ref, Scalar
from pallas_kernels.quantize import reference

Implementation = Literal["triton", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("triton", "xla")
Operand = TypeVar("Operand")


class RowReader(Protocol):
    """Rows that come in parts, from which a kernel, and the reference, put a row together; hashable."""

    @property
    def count(self) -> int:
        """Of parts."""
        ...

    @property
    def dim(self) -> int:
        """Channels that have their sums in common."""
        ...

    def together(self, x: Array, sums: Array) -> Array:
        """Whole rows by XLA, from parts (rows, channels of all) and their sums."""
        ...

    def read(self, x_ref: Ref, sums_ref: Ref, row: Scalar, at: Array | pl.Slice) -> Array:
        """Some channels of a row in a kernel, float32: those with the numbers ``at``, or a slice of whole heads."""
        ...


class Split(NamedTuple, Generic[Operand]):
    """Operands of a quantization by name, each None if not there.

    Attributes:
      x: activations, (rows, channels).
      sums: of its parts, by which these are weighed.
      largest: largest magnitudes of x times its multiplier that are known already.
      residual: added to x first.
      weight, bias: of the norm.
      recipe: the multiplier, the sources and the parts, as far as they are there.
    """

    x: Operand
    sums: Operand | None
    largest: Operand | None
    residual: Operand | None
    weight: Operand | None
    bias: Operand | None
    recipe: tuple[Operand, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """One of the operations; see :func:`pallas_kernels.quantize_normalized` and its neighbours.

    Attributes:
      name: of the entry point.
      qmax: largest code.
      per_token: whether every row gets a scale of its own.
      residual: whether something is added to x first.
      epsilon: of the norm; None for no norm.
      center: whether the norm subtracts the mean.
      weight, bias: whether the norm has them.
      activation: function that x goes through; None for none.
      gated: whether the second half of x is multiplied with the activated first.
      parts: how rows of x that come in parts are read; None if they are whole.
      largest: whether the largest magnitudes of x times its multiplier, of as many channels each as there may be, are known
        already, so that a scale for every row needs no more than them.
    """

    name: str
    qmax: int
    per_token: bool
    residual: bool = False
    epsilon: float | None = None
    center: bool = False
    weight: bool = False
    bias: bool = False
    activation: str | None = None
    gated: bool = False
    parts: RowReader | None = None
    largest: bool = False

    @property
    def whole(self) -> bool:
        """Whether a row is needed whole before any of its codes is known."""
        return (self.per_token and not self.largest) or self.epsilon is not None

    @property
    def of_rows(self) -> int:
        """How many of the operands have a row for every row of x, itself one of them."""
        return 1 + (self.parts is not None) + self.largest + self.residual

    def split(self, operands: Sequence[Operand]) -> Split[Operand]:
        """The operands, or references to them, that are there, by name."""
        x, *rest = operands
        given = iter(rest)
        there = (self.parts is not None, self.largest, self.residual, self.weight, self.bias)
        sums, largest, residual, weight, bias = [next(given) if is_there else None for is_there in there]
        return Split(x, sums, largest, residual, weight, bias, tuple(given))

    def xla(self, *operands: Array) -> tuple[Array, ...]:
        """The reference: codes, then the scales and the normalised sum, as far as they are asked for."""
        x, sums, _, residual, weight, bias, recipe = self.split(operands)
        y = x.astype(jnp.float32)
        if self.parts is not None and sums is not None:
            y = self.parts.together(y, sums)
        if residual is not None:
            y = y + residual.astype(jnp.float32)
            x = y.astype(x.dtype)
        if self.epsilon is not None:
            y = reference.normalized(y, self.epsilon, self.center, weight, bias)
        if self.activation is not None:
            y = reference.activated(y, self.activation, self.gated)
        multiplier, source, part = recipe
        found = reference.quantized(y, multiplier, source, part, qmax=self.qmax, per_token=self.per_token)
        return (*found, x) if self.residual else found
