"""Symmetric codes with a scale for every output channel and every group of neighbouring input channels.

    w = codes * group_scale * scale

Group scales are floats; or integers, so that a matmul stays in int32 from end to end (Integer Scale, arXiv 2405.14597); or
integers so small that every code times its scale fits into int8 (folded).  Codes of 4 bits lie in [-8, 7], of 8 in
[-127, 127].  The last group of a weight may have fewer channels.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int8, Int16, Int32

from fqjax.core.channels import Channels
from fqjax.core.codes import nearest_codes, qmax, steps
from fqjax.core.formats.base import Format, QTensor
from fqjax.core.integer_scale import group_sums, scaled_bound
from fqjax.core.overflow import accumulator_bound
from fqjax.core.ste import straight_through
from fqjax.core.table import Sizes, Stored, array, static
from fqjax.registry import register
from pallas_kernels import Weight, decoder_for, pack_int4, unpack_int4

LARGEST_GROUP = 128
"""Input channels of a group at most; the size of every group divides it."""

GroupScales = Literal["float", "integer", "folded"]


class GroupedTensor(QTensor):
    """A weight of the format :class:`Grouped`.

    Attributes:
      codes: int8 (out, K'), two codes a byte with 4 bits.
      scale: float32, scalar or (out,).
      group_scale: (K' / group_size, out), float32; where the format has integer scales, int16 if all of them fit, else
        int32.
    """

    kind = "grouped"

    codes: Int8[Array, "out stored"] = array("out", "stored")
    scale: Float32[Array, "..."] = array("channel", dtype="float32", positive=True)
    group_scale: Float32[Array, "groups out"] | Int[Array, "groups out"] = array(
        "group", "out", dtype=("float32", "int16", "int32"), positive=True, fill=1
    )

    @property
    def shape(self) -> tuple[int, int]:
        out, stored = self.codes.shape
        return out, stored * self.format.codes_per_byte

    def unpacked(self) -> Int8[Array, "out width"]:
        return self.codes if self.format.bits == 8 else unpack_int4(self.codes)

    def dequantize(self) -> Float32[Array, "out width"]:
        return self.unpacked().astype(jnp.float32) * self.steps()

    def steps(self) -> Float32[Array, "out width"]:
        """The factor of each code, scales multiplied."""
        return steps(self.scale, self.group_scale, self.format.group_size)

    def operand(self, *, weight_only: bool = False) -> Weight:
        kind, folded = self.group_scale.dtype, self.format.scales == "folded"
        decoder = decoder_for(self.format.bits, group_dtype=kind, folded=folded, weight_only=weight_only)
        return Weight(decoder, self.codes, self.scale, self.group_scale)

    def bound(self, qmax: int | None) -> int:
        """With float scales every group has an accumulator of its own."""
        if qmax is None:
            return 0
        sums = np.asarray(group_sums_of(self))
        if self.format.scales == "float":
            return accumulator_bound(int(sums.max(initial=0)), qmax)
        return scaled_bound(sums, np.asarray(self.group_scale), qmax, self.format.bits)

    def weight(self, source: Int32[Array, " e"], part: Int32[Array, " e"]) -> "GroupedCodes":
        codes = self.unpacked()[:, : self.shape[1] - len(source)].astype(jnp.int16)
        return GroupedCodes(
            codes=codes, scale=self.scale, group_scale=self.group_scale, group_size=self.format.group_size
        )


@register("formats")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped(Format):
    """Symmetric codes with group scales.

    Attributes:
      bits: 4 or 8.
      group_size: input channels of a group, a divisor of 128.
      scales: of the groups: floats, integers, or integers that are folded into the codes, which have 4 bits then.
      granularity: whether, besides, the whole tensor or every output channel has a float scale.
    """

    kind: ClassVar[str] = "grouped"
    tensor: ClassVar[type[QTensor]] = GroupedTensor

    bits: Literal[4, 8]  # pyright: ignore[reportIncompatibleVariableOverride]
    group_size: int = LARGEST_GROUP
    scales: GroupScales = "float"
    granularity: Literal["tensor", "channel"] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1 or LARGEST_GROUP % self.group_size:
            raise ValueError(f"group_size {self.group_size}: expected a divisor of {LARGEST_GROUP}")
        if self.scales == "folded" and self.bits != 4:
            raise ValueError(f"codes of {self.bits} bits times folded scales do not fit into int8; expected 4 bits")

    @property
    def codes_per_byte(self) -> int:
        """Codes that share a byte."""
        return 8 // self.bits

    @property
    def multiple(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 128 * self.codes_per_byte

    @property
    def label(self) -> str:
        return f"group of {self.group_size}" + ("" if self.scales == "float" else f", {self.scales}")

    @property
    def takes_floating(self) -> bool:
        return self.bits == 4 and self.scales == "float"

    def axes(self, sizes: Sizes) -> dict[str, int | None]:
        channel = sizes.outputs if self.granularity == "channel" else None
        return {
            "stored": sizes.width // self.codes_per_byte,
            "group": sizes.width // self.group_size,
            "channel": channel,
        }

    def abstract(self, sizes: Sizes, dtypes: dict[str, str] | None = None) -> QTensor:  # pyright: ignore
        """Integer scales are int16 unless something else is said.

        Raises:
          ValueError: for scales of another kind than the format's.
        """
        kinds = ("float32",) if self.scales == "float" else ("int16", "int32")
        chosen = (dtypes or {}).get("group_scale", kinds[0])
        if chosen not in kinds:
            raise ValueError(f"group_scale is {chosen}; expected {' or '.join(kinds)}")
        return super().abstract(sizes, {"group_scale": chosen})

    def store(
        self,
        codes: Int8[Array, "out width"],
        scale: Float32[Array, "..."],
        group_scale: Float32[Array, "groups out"] | Int[Array, "groups out"],
    ) -> GroupedTensor:
        """The tensor with some codes and scales."""
        stored = codes if self.bits == 8 else pack_int4(codes)
        return GroupedTensor(codes=stored, scale=scale, group_scale=group_scale, format=self)


class GroupedCodes(Stored):
    """Codes on the original channels and their scales; the same type for 4 and 8 bits."""

    kind = "grouped_codes"

    codes: Int16[Array, "n k"]
    scale: Float32[Array, "..."]
    group_scale: Float32[Array, "groups n"] | Int[Array, "groups n"]
    group_size: int = static()

    def __call__(self) -> Float32[Array, "n k"]:
        """The weight, made anew for every call: the codes take half of its bytes."""
        return self.codes * steps(self.scale, self.group_scale, self.group_size)[:, : self.codes.shape[1]]


class GroupedGrid(Stored):
    """Numbers that a weight may become in the format :class:`Grouped`; nothing is cut into pieces.

    Attributes:
      scale: float32, scalar or (N,).
      group_scale: (groups, N), float32, or int32 from 1 to 15 where scales are folded.
      format: of the tensor.
    """

    kind: ClassVar[str] = "grouped_grid"

    scale: Float32[Array, "..."]
    group_scale: Float32[Array, "groups n"] | Int32[Array, "groups n"]
    format: Grouped = static()

    @property
    def pieces(self) -> None:
        return None

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        largest = qmax(self.format.bits)
        return (-largest - 1 if self.format.bits == 4 else -largest), largest

    def steps(self, k: int) -> Float32[Array, "n k"]:
        """The factor of each code, scales multiplied."""
        return steps(self.scale, self.group_scale, self.format.group_size)[:, :k]

    def round(self, w: Float32[Array, "n k"]) -> Int16[Array, "n k"]:
        return nearest_codes(w / self.steps(w.shape[1]), *self.code_range)

    def column(self, w: Float32[Array, " n"], i: Int32[Array, ""]) -> Float32[Array, " n"]:
        step = self.scale * self.group_scale[i // self.format.group_size].astype(jnp.float32)
        return jnp.clip(jnp.round(w / step), *self.code_range) * step

    def fake(self, w: Float32[Array, "n k"]) -> Float32[Array, "n k"]:
        return straight_through(w, self.round(w) * self.steps(w.shape[1]))

    def weight(self, codes: Int[Array, "n k"]) -> GroupedCodes:
        return GroupedCodes(
            codes=codes.astype(jnp.int16),
            scale=self.scale,
            group_scale=self.group_scale,
            group_size=self.format.group_size,
        )

    def rows(self, rows: slice, w: Float32[Array, "n k"]) -> "GroupedGrid":
        scale = self.scale[rows] if self.scale.ndim else self.scale
        return dataclasses.replace(self, scale=scale, group_scale=self.group_scale[:, rows])

    def pack(self, codes: Int[Array, "n k"], channels: Channels) -> GroupedTensor:
        return _packed(self, codes, channels.width)


@jax.jit
def group_sums_of(weight: GroupedTensor) -> Int32[Array, "groups out"]:
    """Sum of the magnitudes of the codes in each group of input channels."""
    return group_sums(weight.unpacked(), weight.format.group_size)


def _packed(grid: GroupedGrid, codes: Int[Array, "n k"], width: int) -> GroupedTensor:
    form = grid.format
    padded = jnp.pad(codes.astype(jnp.int8), ((0, 0), (0, width - codes.shape[1])))
    missing = width // form.group_size - len(grid.group_scale)
    groups = jnp.pad(grid.group_scale, ((0, missing), (0, 0)), constant_values=1)
    groups = groups if form.scales == "float" else groups.astype(jnp.int16)  # They are from 1 to 15.
    return form.store(padded, grid.scale, groups)


_packed = jax.jit(_packed, static_argnums=2)
