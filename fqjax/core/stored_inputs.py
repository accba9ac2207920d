"""Quantizers of a layer's input as they are stored with the layer: one pass from real numbers to codes.

A stored quantizer has taken the transform's recipe up, and gives codes over the K' channels of the integer product
(:mod:`fqjax.core.channels`):

    multiplier = 1 / (divisors * scale),    codes = clip(round(x * multiplier)), cut into pieces
"""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Array, Float, Float32, Int8, Int32

from fqjax.core.channels import PADDING
from fqjax.core.codes import qmax
from fqjax.core.table import Stored, array, static
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


class Quantized(NamedTuple):
    """A layer's quantized input.

    Attributes:
      codes: int8 (..., K'), or real numbers where the input stays in floating point.
      scale: that the codes are multiplied with: a scalar, or one a row.
    """

    codes: Int8[Array, "*rows width"] | Float[Array, "*rows width"]
    scale: Float32[Array, "..."]


class KernelRecipe(NamedTuple):
    """The quantizer as a kernel takes it that quantizes in the same pass as a norm, an activation or attention.

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
        """The recipe for a fused kernel; None where the input stays in floating point."""
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
