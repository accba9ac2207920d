"""The types that the integer matmuls share: a weight on the device, the operands of a product, and which product it is."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from pallas_kernels.matmul.hopper.decoder import Decoder
from pallas_kernels.matmul.reference import scale_accumulator

Implementation = Literal["mosaic", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("mosaic", "xla")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """Weight codes with their scales: ``weight[n, k] = codes[n, k] * group_scale[k // size, n] * scale[n]``.

    A pytree whose format is static.  For :func:`pallas_kernels.expert_matmul` every array has one axis more, the first: the
    experts.

    Attributes:
      decoder: the format, one of :mod:`pallas_kernels.matmul.hopper.decoders` or another of its kind.
      codes: int8, (n, k * bits / 8): output channels first, input channels contiguous; 4-bit codes two to a byte as
        :func:`pallas_kernels.pack_int4` packs them.
      scale: float32 scalar, or one per output channel, (n,).
      group_scale: (groups, n); a group is k / groups neighbouring channels.  None without groups.
    """

    decoder: Decoder = dataclasses.field(metadata={"static": True})
    codes: Array
    scale: Array | float = 1.0
    group_scale: Array | None = None


class Operands(NamedTuple):
    """The arrays of a product; shapes as for :func:`pallas_kernels.quantized_matmul`, both scales float32."""

    x: Array
    codes: Array
    x_scale: Array
    scale: Array
    group_scale: Array | None = None
    bias: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmul:
    """One of the integer matmuls.

    Attributes:
      decoder: the weight's format.
      out_dtype: of the result.
    """

    decoder: Decoder
    out_dtype: np.dtype

    @property
    def name(self) -> str:
        """Of the entry point, in messages."""
        return f"{self.decoder.name}_matmul"

    def xla(self, operands: Operands) -> Array:
        """The reference."""
        x, codes, x_scale, scale, group_scale, bias = operands
        return scale_accumulator(self.decoder.accumulate(x, codes, group_scale), x_scale, scale, bias, self.out_dtype)
