"""How a layer's input becomes integer codes: quantizers of a plan.

A quantizer of a plan (:class:`Static`, :class:`PerToken`, :class:`Floating`) knows scales and how many pieces a channel is
cut into; :meth:`~InputQuantizer.fake` says how the layer represents its input, on the K channels there are.  Once the
channels of the integer product are laid out (:mod:`fqjax.core.channels`), it becomes a stored one
(:mod:`fqjax.core.stored_inputs`).

Everything about a quantizer but its type is an array, so that programs are the same for 4 and 8 bits.
"""

from typing import ClassVar, Protocol, Self, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fqjax.core.channels import Channels
from fqjax.core.codes import qmax
from fqjax.core.stored_inputs import FLOATING_BITS, FloatingInput, PerTokenInput, StaticInput, StoredInput
from fqjax.core.table import Stored, array
from fqjax.core.transforms.base import Recipe

COARSE_BITS = 4
"""Bits of a code, at most, for which a weight makes up for the rounding of its input (:mod:`fqjax.drivers.moments`)."""


@runtime_checkable
class InputQuantizer(Protocol):
    """How a plan quantizes a layer's input: a registered pytree (:class:`fqjax.core.table.Stored`)."""

    runs: ClassVar[type[StoredInput]]
    """Type of the quantizer that is stored."""

    @property
    def pieces(self) -> Int32[Array, " k"] | None:
        """Pieces that each channel is cut into; None for one each."""
        ...

    def fake(self, x: Float[Array, "*rows k"], recipe: Recipe | None = None) -> Float32[Array, "*rows k"]:
        """The input as the layer represents it: rounded, clipped and scaled back.

        Args:
          x: rows of the input.
          recipe: the part of a transform that is taken up in the same pass, before the rounding.
        """
        ...

    def is_coarse(self) -> bool:
        """Whether rounding the input changes it so much that a weight should make up for it; not under ``jax.jit``."""
        ...

    def stored(self, recipe: Recipe | None, channels: Channels) -> StoredInput:
        """The quantizer that runs, over laid out channels; not under ``jax.jit``."""
        ...


class Static(Stored):
    """One scale for all rows.

    Attributes:
      scale: of a code, scalar.
      pieces: that each channel is cut into; its codes reach ``pieces * largest``, int32 (K,).
      largest: code of a piece, scalar.
    """

    kind: ClassVar[str] = "static_plan"
    runs: ClassVar[type[StoredInput]] = StaticInput

    scale: Float32[Array, ""] = array(dtype="float32", positive=True)
    pieces: Int32[Array, " k"] = array("in", dtype="int32", positive=True)
    largest: Int32[Array, ""] = array(dtype="int32", positive=True)

    @classmethod
    def of(cls, scale: Float32[Array, ""], pieces: Int32[Array, " k"], bits: int) -> Self:
        """The quantizer with codes of some bits."""
        return cls(scale=scale, pieces=pieces, largest=jnp.int32(qmax(bits)))

    def fake(self, x: Float[Array, "*rows k"], recipe: Recipe | None = None) -> Float32[Array, "*rows k"]:
        limit = (self.pieces * self.largest).astype(jnp.float32)
        return jnp.clip(jnp.round(x.astype(jnp.float32) * self._multiplier(recipe)), -limit, limit) * self.scale

    def is_coarse(self) -> bool:
        return bits_of(int(self.largest)) <= COARSE_BITS

    def stored(self, recipe: Recipe | None, channels: Channels) -> StaticInput:
        multiplier = jnp.broadcast_to(self._multiplier(recipe), self.pieces.shape)
        bits = bits_of(int(self.largest))
        source, part = jnp.asarray(channels.source), jnp.asarray(channels.x_part)
        return StaticInput(multiplier=multiplier, source=source, part=part, scale=self.scale, bits=bits)

    def _multiplier(self, recipe: Recipe | None) -> Float32[Array, "..."]:
        return 1 / (self.scale if recipe is None else recipe.divisors * self.scale)


class PerToken(Stored):
    """A scale for every row.

    Attributes:
      largest: code, scalar.
    """

    kind: ClassVar[str] = "per_token_plan"
    runs: ClassVar[type[StoredInput]] = PerTokenInput

    largest: Int32[Array, ""] = array(dtype="int32", positive=True)

    @classmethod
    def of(cls, bits: int) -> Self:
        """The quantizer with codes of some bits."""
        return cls(largest=jnp.int32(qmax(bits)))

    @property
    def pieces(self) -> None:
        return None

    def fake(self, x: Float[Array, "*rows k"], recipe: Recipe | None = None) -> Float32[Array, "*rows k"]:
        return _rounded_rows(x, recipe, self.largest.astype(jnp.float32))

    def is_coarse(self) -> bool:
        return bits_of(int(self.largest)) <= COARSE_BITS

    def stored(self, recipe: Recipe | None, channels: Channels) -> PerTokenInput:
        multiplier, source, part = _unscaled(recipe, channels)
        return PerTokenInput(multiplier=multiplier, source=source, part=part, bits=bits_of(int(self.largest)))


class Floating(Stored):
    """No codes: activations stay in floating point."""

    kind: ClassVar[str] = "floating_plan"
    runs: ClassVar[type[StoredInput]] = FloatingInput

    @property
    def pieces(self) -> None:
        return None

    def fake(self, x: Float[Array, "*rows k"], recipe: Recipe | None = None) -> Float32[Array, "*rows k"]:
        """The input in few bits, :data:`FLOATING_BITS`."""
        return _rounded_rows(x, recipe, jnp.float32(qmax(FLOATING_BITS)))

    def is_coarse(self) -> bool:
        return False

    def stored(self, recipe: Recipe | None, channels: Channels) -> FloatingInput:
        multiplier, source, part = _unscaled(recipe, channels)
        return FloatingInput(multiplier=multiplier, source=source, part=part)


def bits_of(largest: int) -> int:
    """Bits of symmetric codes up to ``largest``."""
    return largest.bit_length() + 1


def _rounded_rows(
    x: Float[Array, "*rows k"], recipe: Recipe | None, largest: Float32[Array, ""]
) -> Float32[Array, "*rows k"]:
    """Every row rounded with a scale of its own, as :func:`pallas_kernels.quantize_per_token` has it."""
    x = x.astype(jnp.float32)
    x = x if recipe is None else x * (1 / recipe.divisors)
    step = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-8) / largest
    return jnp.round(x / step) * step


def _unscaled(
    recipe: Recipe | None, channels: Channels
) -> tuple[Float32[Array, " k"], Int32[Array, " e"], Int32[Array, " e"]]:
    """Multiplier, source and part of a stored quantizer without a scale."""
    multiplier = jnp.ones(channels.inputs, jnp.float32) if recipe is None else 1 / recipe.divisors
    return multiplier, jnp.asarray(channels.source), jnp.asarray(channels.x_part)
