"""The two quantized types: a weight as integer codes, and the recipe that turns activations into codes.

Both are registered dataclasses (pytrees): they pass through ``jax.jit``, ``jax.device_put``, ``jax.eval_shape`` and Orbax
like arrays do.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Int32

from fqjax.core.codes import qmax
from pallas_kernels import pack_int4, quantize_activations, quantize_per_token, unpack_int4

Granularity = Literal["tensor", "channel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormat:
    """How a weight's codes are stored; static, and hashable.

    Attributes:
      bits: 4 or 8.
      granularity: what one scale covers: the whole tensor, or one output channel.
      packed: whether two 4-bit codes share a byte (see :mod:`pallas_kernels.packing`).
    """

    bits: int
    granularity: Granularity = "tensor"
    packed: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"QFormat: bits must be 4 or 8, got {self.bits}")
        if self.packed and self.bits != 4:
            raise ValueError("QFormat: only 4-bit codes are packed")
        if self.granularity not in ("tensor", "channel"):
            raise ValueError(f"QFormat: granularity must be 'tensor' or 'channel', got {self.granularity!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized weight matrix.

    Invariants:
      * ``codes`` is int8, output channels first (K-major): shape (out, in), or (out, in / 2) when packed;
      * ``in`` counts the flattened channels and the padding; it is a multiple of 128, of 256 when packed;
      * every code lies in [-qmax, qmax], qmax = 127 or 7; padding codes are 0;
      * ``scale`` is float32 and positive: a scalar, or shape (out,) when the granularity is "channel";
      * the real weight is ``codes * scale`` (:meth:`dequantize`), still smoothed and flattened.
    """

    codes: Int8[Array, "out stored"]
    scale: Float32[Array, "..."]
    format: QFormat = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_codes(cls, codes: Int8[Array, "out width"], scale: Float32[Array, "..."], bits: int) -> "QTensor":
        """Wraps int8 codes (out, in), packing them if they have 4 bits."""
        packed = bits == 4
        granularity: Granularity = "channel" if scale.ndim else "tensor"
        stored = pack_int4(codes) if packed else codes
        return cls(stored, scale, QFormat(bits=bits, granularity=granularity, packed=packed))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) in codes, whatever the packing."""
        out, stored = self.codes.shape
        return out, stored * (2 if self.format.packed else 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: codes as stored, and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def unpacked(self) -> Int8[Array, "out width"]:
        """The codes as int8 (out, in)."""
        return unpack_int4(self.codes) if self.format.packed else self.codes

    def dequantize(self) -> Float32[Array, "out width"]:
        """``codes * scale`` in float32, (out, in)."""
        scale = self.scale[:, None] if self.scale.ndim else self.scale
        return self.unpacked().astype(jnp.float32) * scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputQuantizer:
    """Turns real activations into integer codes: smoothing, scaling, rounding and flattening at once.

    Invariants:
      * ``multiplier`` is float32 (K,), finite and positive: 1 / (smoothing * scale), or 1 / smoothing when every token
        gets a scale of its own;
      * ``source`` and ``part`` are int32 (E,): extra channel e continues channel ``source[e]`` beyond
        ``part[e] * qmax`` (:mod:`fqjax.core.flatten`); of the E, the first ``used`` hold flattened channels, the rest
        are padding, always 0;
      * ``scale`` is the float32 scalar that the codes are multiplied with; None gives every token a scale of its own,
        and then nothing is flattened (``used`` is 0);
      * the codes have ``width`` = K + E channels.
    """

    multiplier: Float32[Array, " k"]
    source: Int32[Array, " e"]
    part: Int32[Array, " e"]
    scale: Float32[Array, ""] | None
    bits: int = dataclasses.field(metadata={"static": True})
    used: int = dataclasses.field(metadata={"static": True})

    @property
    def width(self) -> int:
        """K': channels of the codes, padding included."""
        return self.multiplier.shape[0] + self.source.shape[0]

    @property
    def qmax(self) -> int:
        """Largest activation code."""
        return qmax(self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def expansion(self) -> float:
        """K'/K: channels after flattening, before padding, over channels before."""
        k = self.multiplier.shape[0]
        return (k + self.used) / k

    def __call__(self, x: Float[Array, "*rows k"]) -> tuple[Int8[Array, "*rows width"], Float32[Array, "..."]]:
        """Codes (..., width) and their scale: a scalar, or one a row."""
        if self.scale is None:
            return quantize_per_token(x, self.multiplier, qmax=self.qmax, width=self.width)
        return quantize_activations(x, self.multiplier, self.source, self.part, qmax=self.qmax), self.scale
