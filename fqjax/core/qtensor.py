"""The two quantized types: a weight as integer codes, and the recipe that turns activations into codes.

Both are registered dataclasses (pytrees): they pass through ``jax.jit``, ``jax.device_put``, ``jax.eval_shape`` and Orbax
like arrays do.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8, Int32

from fqjax.core.codes import qmax, steps
from pallas_kernels import pack_int4, quantize_activations, quantize_per_token, unpack_int4

Granularity = Literal["tensor", "channel", "group"]

LARGEST_GROUP = 128
"""Input channels of a group at most; the size of every group divides it."""


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays in a tree, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormat:
    """How a weight's codes are stored; static, and hashable.

    Attributes:
      bits: 4 or 8.
      granularity: what one scale covers: the whole tensor, one output channel, or, in one output channel, one group of input
        channels.
      packed: whether two 4-bit codes share a byte (see :mod:`pallas_kernels.packing`).
      group_size: input channels of a group; 0 without groups.
      integer_scales: whether the groups' scales are integers (:mod:`fqjax.core.integer_scale`).
      folded: whether every code times its integer scale fits into int8.
    """

    bits: int
    granularity: Granularity = "tensor"
    packed: bool = False
    group_size: int = 0
    integer_scales: bool = False
    folded: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"QFormat: bits must be 4 or 8, got {self.bits}")
        if self.packed and self.bits != 4:
            raise ValueError("QFormat: only 4-bit codes are packed")
        if self.granularity not in ("tensor", "channel", "group"):
            raise ValueError(f"QFormat: granularity must be 'tensor', 'channel' or 'group', got {self.granularity!r}")
        if (self.granularity == "group") != (self.group_size > 0) or (
            self.group_size and LARGEST_GROUP % self.group_size
        ):
            raise ValueError(
                f"QFormat: group_size must divide {LARGEST_GROUP}, and is 0 without groups; got {self.group_size}"
            )
        if self.integer_scales and not self.group_size:
            raise ValueError("QFormat: only scales of groups are integers")
        if self.folded and not self.integer_scales:
            raise ValueError("QFormat: only integer scales are folded")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized weight matrix.

    Invariants:
      * ``codes`` is int8, output channels first (K-major): shape (out, in), or (out, in / 2) when packed;
      * ``in`` counts the flattened channels and the padding; it is a multiple of 128, of 256 when packed;
      * every code lies in [-qmax, qmax], qmax = 127 or 7, or, with groups and 4 bits, in [-8, 7]; codes from other programs'
        checkpoints may be -qmax - 1; padding codes are 0;
      * ``scale`` is float32 and positive: a scalar, or shape (out,), as it always is when the granularity is "channel";
      * ``group_scale`` is positive, shape (in / group_size, out), float32 or, where the format
        has integer scales, int16 if all of them fit and int32 otherwise; None without groups;
      * the real weight is ``codes * scale``, times its group's scale (:meth:`dequantize`), still smoothed and flattened.
    """

    codes: Int8[Array, "out stored"]
    scale: Float32[Array, "..."]
    format: QFormat = dataclasses.field(metadata={"static": True})
    group_scale: Float32[Array, "groups out"] | Int[Array, "groups out"] | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Int8[Array, "out width"],
        scale: Float32[Array, "..."],
        bits: int,
        group_scale: Float32[Array, "groups out"] | Int[Array, "groups out"] | None = None,
        *,
        folded: bool = False,
    ) -> "QTensor":
        """Wraps int8 codes (out, in), packing them if they have 4 bits."""
        packed = bits == 4
        stored = pack_int4(codes) if packed else codes
        if group_scale is None:
            granularity: Granularity = "channel" if scale.ndim else "tensor"
            return cls(stored, scale, QFormat(bits=bits, granularity=granularity, packed=packed))
        size = codes.shape[1] // group_scale.shape[0]
        integers = jnp.issubdtype(group_scale.dtype, jnp.integer)
        kind = {"group_size": size, "integer_scales": integers, "folded": folded}
        return cls(stored, scale, QFormat(bits=bits, granularity="group", packed=packed, **kind), group_scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) in codes, whatever the packing."""
        out, stored = self.codes.shape
        return out, stored * (2 if self.format.packed else 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: codes as stored, and scales."""
        return bytes_of(self)

    def unpacked(self) -> Int8[Array, "out width"]:
        """The codes as int8 (out, in)."""
        return unpack_int4(self.codes) if self.format.packed else self.codes

    def dequantize(self) -> Float32[Array, "out width"]:
        """The real weight in float32, (out, in)."""
        return self.unpacked().astype(jnp.float32) * self.steps()

    def steps(self) -> Float32[Array, "..."]:
        """What each code is multiplied with, so shaped that it multiplies an (out, in) array."""
        return steps(self.scale, self.group_scale, self.format.group_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputQuantizer:
    """Turns real activations into integer codes: smoothing, scaling, rounding and flattening at once.

    Invariants:
      * ``multiplier`` is float32 (K,), finite and positive: 1 / (smoothing * scale), or 1 / smoothing when every token
        gets a scale of its own;
      * ``source`` and ``part`` are int32 (E,): extra channel e continues channel ``source[e]`` beyond
        ``part[e] * qmax`` (:mod:`fqjax.core.channels`); of the E, the first ``used`` hold flattened channels, the rest
        are padding, always 0;
      * ``scale`` is the float32 scalar that the codes are multiplied with; None gives every token a scale of its own,
        and then nothing is flattened (``used`` is 0);
      * the codes have ``width`` = K + E channels;
      * with 16 bits there are no codes: activations are smoothed and padded, and ``scale`` is None.
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
        return bytes_of(self)

    @property
    def expansion(self) -> float:
        """K'/K: channels after flattening, before padding, over channels before."""
        k = self.multiplier.shape[0]
        return (k + self.used) / k

    def __call__(
        self, x: Float[Array, "*rows k"]
    ) -> tuple[Int8[Array, "*rows width"] | Float[Array, "*rows width"], Float32[Array, "..."]]:
        """Codes (..., width) and their scale: a scalar, or one a row; with 16 bits, real numbers whose scale is 1."""
        if self.bits == 16:
            smooth = (x.astype(jnp.float32) * self.multiplier).astype(x.dtype)
            return jnp.pad(smooth, [(0, 0)] * (x.ndim - 1) + [(0, self.width - x.shape[-1])]), jnp.float32(1)
        if self.scale is None:
            return quantize_per_token(x, self.multiplier, qmax=self.qmax, width=self.width)
        return quantize_activations(x, self.multiplier, self.source, self.part, qmax=self.qmax), self.scale
