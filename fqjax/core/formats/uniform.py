"""Uniform symmetric codes with one scale for the whole weight, or one for every output channel.

    w = codes * scale,    codes in [-pieces * qmax, pieces * qmax] on the original channels

A channel that FlattenQuant cuts into several pieces has codes that reach several times qmax; laid out over K' channels, all
are in [-qmax, qmax], 127 for 8 bits and 7 for 4.  Codes of 4 bits share bytes (:mod:`pallas_kernels.packing`).
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int8, Int16, Int32

from fqjax.core.channels import Channels, flatten_codes, gather_codes
from fqjax.core.codes import nearest_codes, qmax
from fqjax.core.formats.base import Format, QTensor
from fqjax.core.overflow import accumulator_bound, row_sums
from fqjax.core.ste import straight_through
from fqjax.core.table import Sizes, Stored, array, static
from fqjax.registry import register
from pallas_kernels import Weight, decoder_for, pack_int4, unpack_int4


class UniformTensor(QTensor):
    """A weight of the format :class:`Uniform`.

    Attributes:
      codes: int8 (out, K'), two codes a byte with 4 bits.  Codes from other programs may be -qmax - 1.
      scale: float32, scalar or (out,).
    """

    kind = "uniform"

    codes: Int8[Array, "out stored"] = array("out", "stored")
    scale: Float32[Array, "..."] = array("channel", dtype="float32", positive=True)

    @property
    def shape(self) -> tuple[int, int]:
        out, stored = self.codes.shape
        return out, stored * self.format.codes_per_byte

    def unpacked(self) -> Int8[Array, "out width"]:
        return self.codes if self.format.bits == 8 else unpack_int4(self.codes)

    def dequantize(self) -> Float32[Array, "out width"]:
        return self.unpacked().astype(jnp.float32) * columns(self.scale)

    def operand(self, *, weight_only: bool = False) -> Weight | None:
        return None if weight_only else Weight(decoder_for(self.format.bits), self.codes, self.scale)

    def bound(self, qmax: int | None) -> int:
        return 0 if qmax is None else accumulator_bound(int(_largest_row(self)), qmax)

    def weight(self, source: Int32[Array, " e"], part: Int32[Array, " e"]) -> "ScaledCodes":
        codes, _ = gather_codes(self.unpacked(), source, part)
        return ScaledCodes(codes=codes, scale=self.scale)


@register("formats")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Format):
    """Symmetric codes without groups.

    Attributes:
      bits: 4 or 8.
      granularity: what one scale covers: the whole tensor, or one output channel.
    """

    kind: ClassVar[str] = "uniform"
    tensor: ClassVar[type[QTensor]] = UniformTensor

    bits: Literal[4, 8]  # pyright: ignore[reportIncompatibleVariableOverride]
    granularity: Literal["tensor", "channel"] = "tensor"

    @property
    def codes_per_byte(self) -> int:
        """Codes that share a byte."""
        return 8 // self.bits

    @property
    def multiple(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 128 * self.codes_per_byte

    @property
    def label(self) -> str:
        return self.granularity

    def axes(self, sizes: Sizes) -> dict[str, int | None]:
        channel = sizes.outputs if self.granularity == "channel" else None
        return {"stored": sizes.width // self.codes_per_byte, "channel": channel}

    def store(self, codes: Int8[Array, "out width"], scale: Float32[Array, "..."]) -> UniformTensor:
        """The tensor with some codes and scales."""
        stored = codes if self.bits == 8 else pack_int4(codes)
        return UniformTensor(codes=stored, scale=scale, format=self)


class ScaledCodes(Stored):
    """Codes on the original channels and their scales; the same type for 4 and 8 bits."""

    kind = "scaled_codes"

    codes: Int16[Array, "n k"]
    scale: Float32[Array, "..."]

    def __call__(self) -> Float32[Array, "n k"]:
        """The weight, made anew for every call: the codes take half of its bytes."""
        return self.codes * columns(self.scale)


class UniformGrid(Stored):
    """Numbers that a weight may become in the format :class:`Uniform`.

    Attributes:
      scale: float32, scalar or (N,).
      pieces: that each channel is cut into, int32 (K,).
      format: of the tensor.
    """

    kind: ClassVar[str] = "uniform_grid"

    scale: Float32[Array, "..."]
    pieces: Int32[Array, " k"]
    format: Uniform = static()

    @property
    def largest(self) -> Int32[Array, " k"]:
        """Largest code of every channel."""
        return self.pieces * qmax(self.format.bits)

    def round(self, w: Float32[Array, "n k"]) -> Int16[Array, "n k"]:
        return nearest_codes(w / columns(self.scale), -self.largest, self.largest)

    def column(self, w: Float32[Array, " n"], i: Int32[Array, ""]) -> Float32[Array, " n"]:
        # An array of one scale, so that XLA takes its reciprocal once, rather than divides anew in every step of a loop.
        scale, largest = jnp.atleast_1d(self.scale), self.pieces[i] * qmax(self.format.bits)
        return jnp.clip(jnp.round(w / scale), -largest, largest) * scale

    def fake(self, w: Float32[Array, "n k"]) -> Float32[Array, "n k"]:
        return straight_through(w, self.round(w) * columns(self.scale))

    def weight(self, codes: Int[Array, "n k"]) -> ScaledCodes:
        return ScaledCodes(codes=codes.astype(jnp.int16), scale=self.scale)

    def rows(self, rows: slice, w: Float32[Array, "n k"]) -> "UniformGrid":
        """With one scale for all rows, a finer one where these rows leave room for it."""
        if self.scale.ndim:
            return dataclasses.replace(self, scale=self.scale[rows])
        largest = jnp.max(jnp.abs(w), axis=0) / self.pieces
        needed = jnp.maximum(jnp.max(largest) / qmax(self.format.bits), jnp.finfo(jnp.float32).tiny)
        return dataclasses.replace(self, scale=jnp.minimum(self.scale, needed))

    def pack(self, codes: Int[Array, "n k"], channels: Channels) -> UniformTensor:
        return _packed(self, codes, jnp.asarray(channels.source), jnp.asarray(channels.w_part))


def columns(scale: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Scales so shaped that they multiply an (N, K) array."""
    return scale[:, None] if scale.ndim else scale


@jax.jit
def _packed(
    grid: UniformGrid, codes: Int[Array, "n k"], source: Int32[Array, " e"], part: Int32[Array, " e"]
) -> UniformTensor:
    return grid.format.store(flatten_codes(codes, source, part, qmax(grid.format.bits)), grid.scale)


@jax.jit
def _largest_row(weight: UniformTensor) -> Int32[Array, ""]:
    return jnp.max(row_sums(weight.unpacked()))
