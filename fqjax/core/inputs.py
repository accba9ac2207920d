"""How a layer's input becomes integer codes: quantizers of a plan, and what is stored of them with a layer.

A quantizer of a plan (:class:`Static`, :class:`PerToken`, :class:`Floating`) knows scales and how many pieces a channel is
cut into; :meth:`~InputQuantizer.fake` says what the layer makes of its input, on the K channels there are.  Once the channels
of the integer product are laid out (:mod:`fqjax.core.channels`), it becomes a stored one, which takes the transform's recipe
up and gives codes over K' channels in one pass:

    multiplier = 1 / (divisors * scale),    codes = clip(round(x * multiplier)), cut into pieces

Everything about a quantizer but its type is an array, so that programs are the same for 4 and 8 bits.
"""

from typing import Annotated, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Array, Float, Float32, Int8, Int32

from fqjax.core.channels import PADDING, Channels
from fqjax.core.codes import qmax
from fqjax.core.table import Stored, array, static
from fqjax.core.transforms.base import Recipe
from fqjax.registry import register
from pallas_kernels import (
    quantize_activations,
    quantize_for_experts,
    quantize_per_token,
    quantize_per_token_for_experts,
)

FLOATING_BITS = 16
"""Bits that activations in floating point are simulated with: rounding them so changes less than bfloat16 does."""


CodeBits = Annotated[int, Ge(2), Le(8)]
"""Bits of an integer code of activations."""

COARSE_BITS = 4
"""Bits of a code, at most, for which a weight makes up for the rounding of its input (:mod:`fqjax.drivers.moments`)."""


class Quantized(NamedTuple):
    """A layer's quantized input.

    Attributes:
      codes: int8 (..., K'), or real numbers where the input stays in floating point.
      scale: that the codes are multiplied with: a scalar, or one a row.
    """

    codes: Int8[Array, "*rows width"] | Float[Array, "*rows width"]
    scale: Float32[Array, "..."]


class KernelRecipe(NamedTuple):
    """What a kernel that quantizes in the same pass as a norm, an activation or attention needs to know.

    Attributes:
      multiplier: of every channel, (K,).
      source, part: original channel and piece of every extra channel, (E,).
      qmax: largest code.
      per_token: whether every row gets a scale of its own.
    """

    multiplier: Float32[Array, " k"]
    source: Int32[Array, " e"]
    part: Int32[Array, " e"]
    qmax: int
    per_token: bool


class StoredInput(Stored, abstract=True):
    """The quantizer of a layer's input as it runs: smoothing, scaling, rounding and flattening at once.

    Attributes:
      multiplier: of every channel, finite and positive, (K,).
      source, part: extra channel e continues channel ``source[e]`` beyond ``part[e] * qmax``; padding has the part
        :data:`~fqjax.core.channels.PADDING`, and is 0; int32 (E,).
    """

    multiplier: Float32[Array, " k"] = array("in", dtype="float32", positive=True)
    source: Int32[Array, " e"] = array("extra", dtype="int32", below="in")
    part: Int32[Array, " e"] = array("extra", dtype="int32", natural=True, fill=PADDING)

    def __call__(self, x: Float[Array, "*rows k"]) -> Quantized:
        """Quantize rows of activations."""
        raise NotImplementedError

    def of_experts(self, x: Float[Array, "rows k"], expert: Int32[Array, " rows"]) -> Quantized:
        """The same where arrays have a leading axis for experts, and every row belongs to one."""
        raise NotImplementedError

    @property
    def code_bits(self) -> int:
        """Bits of a code; :data:`FLOATING_BITS` where there are no codes."""
        raise NotImplementedError

    @property
    def qmax(self) -> int | None:
        """Largest code; None where there are no codes."""
        return qmax(self.code_bits)

    @property
    def width(self) -> int:
        """K': channels of the codes, padding included."""
        return self.multiplier.shape[-1] + self.source.shape[-1]

    @property
    def inputs(self) -> int:
        """K: channels of the input."""
        return self.multiplier.shape[-1]

    def recipe(self) -> KernelRecipe | None:
        """What a fused kernel takes up; None where the input stays in floating point."""
        limit, per_token = self.qmax, self.fixed_scale() is None
        return None if limit is None else KernelRecipe(self.multiplier, self.source, self.part, limit, per_token)

    def fixed_scale(self) -> Float32[Array, ""] | None:
        """The scale of all rows; None where every row has its own."""
        return None

    def scaled(self, codes: Int8[Array, "*rows width"], scale: Float32[Array, "..."] | None) -> Quantized:
        """Codes from a kernel that took :meth:`recipe`, which gives scales of rows, and none where there is a fixed one."""
        fixed = self.fixed_scale()
        found = fixed if scale is None else scale
        assert found is not None
        return Quantized(codes, found)

    def flattened(self) -> int:
        """How many extra channels hold something; not under ``jax.jit``."""
        return int(np.sum(np.asarray(self.part) != PADDING))


@register("inputs")
class StaticInput(StoredInput):
    """One scale for all rows, from calibration.

    Attributes:
      scale: that codes are multiplied with; ``multiplier`` has its reciprocal in it.
      bits: of a code.
    """

    kind = "static"

    scale: Float32[Array, ""] = array(dtype="float32", positive=True)
    bits: CodeBits = static()

    @property
    def code_bits(self) -> int:
        return self.bits

    def __call__(self, x: Float[Array, "*rows k"]) -> Quantized:
        codes = quantize_activations(x, self.multiplier, self.source, self.part, qmax=qmax(self.bits))
        return Quantized(codes, self.scale)

    def of_experts(self, x: Float[Array, "rows k"], expert: Int32[Array, " rows"]) -> Quantized:
        limit = qmax(self.bits)
        codes = quantize_for_experts(x, expert, self.multiplier, self.source, self.part, qmax=limit)
        return Quantized(codes, self.scale[expert])

    def fixed_scale(self) -> Float32[Array, ""]:
        return self.scale


@register("inputs")
class PerTokenInput(StoredInput):
    """A scale for every row, from its largest value.  Nothing is flattened.

    Attributes:
      bits: of a code.
    """

    kind = "per_token"

    bits: CodeBits = static()

    @property
    def code_bits(self) -> int:
        return self.bits

    def __call__(self, x: Float[Array, "*rows k"]) -> Quantized:
        return Quantized(*quantize_per_token(x, self.multiplier, qmax=qmax(self.bits), width=self.width))

    def of_experts(self, x: Float[Array, "rows k"], expert: Int32[Array, " rows"]) -> Quantized:
        limit = qmax(self.bits)
        return Quantized(*quantize_per_token_for_experts(x, expert, self.multiplier, qmax=limit, width=self.width))


@register("inputs")
class FloatingInput(StoredInput):
    """Activations in floating point, smoothed and padded."""

    kind = "floating"

    @property
    def code_bits(self) -> int:
        return FLOATING_BITS

    @property
    def qmax(self) -> None:
        return None

    def __call__(self, x: Float[Array, "*rows k"]) -> Quantized:
        return Quantized(self._smoothed(x, self.multiplier), jnp.float32(1))

    def of_experts(self, x: Float[Array, "rows k"], expert: Int32[Array, " rows"]) -> Quantized:
        return Quantized(self._smoothed(x, self.multiplier[expert]), jnp.float32(1))

    def _smoothed(self, x: Float[Array, "*rows k"], multiplier: Float32[Array, "..."]) -> Float[Array, "*rows width"]:
        smooth = (x.astype(jnp.float32) * multiplier).astype(x.dtype)
        return jnp.pad(smooth, [(0, 0)] * (x.ndim - 1) + [(0, self.width - x.shape[-1])])


@runtime_checkable
class InputQuantizer(Protocol):
    """How a plan quantizes a layer's input: a registered pytree (:class:`fqjax.core.table.Stored`)."""

    kind: ClassVar[str]
    runs: ClassVar[type[StoredInput]]
    """What it is stored as."""

    @property
    def pieces(self) -> Int32[Array, " k"] | None:
        """Pieces that each channel is cut into; None for one each."""
        ...

    def fake(self, x: Float[Array, "*rows k"], recipe: Recipe | None = None) -> Float32[Array, "*rows k"]:
        """What a layer makes of its input: rounded, clipped and scaled back.

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

    kind = "static_plan"
    runs = StaticInput

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

    kind = "per_token_plan"
    runs = PerTokenInput

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
        return PerTokenInput(**_unscaled(recipe, channels), bits=bits_of(int(self.largest)))


class Floating(Stored):
    """No codes: activations stay in floating point."""

    kind = "floating_plan"
    runs = FloatingInput

    @property
    def pieces(self) -> None:
        return None

    def fake(self, x: Float[Array, "*rows k"], recipe: Recipe | None = None) -> Float32[Array, "*rows k"]:
        """The input in few bits, :data:`FLOATING_BITS`."""
        return _rounded_rows(x, recipe, jnp.float32(qmax(FLOATING_BITS)))

    def is_coarse(self) -> bool:
        return False

    def stored(self, recipe: Recipe | None, channels: Channels) -> FloatingInput:
        return FloatingInput(**_unscaled(recipe, channels))


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


def _unscaled(recipe: Recipe | None, channels: Channels) -> dict[str, Array]:
    """Arrays of a stored quantizer without a scale."""
    multiplier = jnp.ones(channels.inputs, jnp.float32) if recipe is None else 1 / recipe.divisors
    return {
        "multiplier": multiplier,
        "source": jnp.asarray(channels.source),
        "part": jnp.asarray(channels.x_part),
    }
