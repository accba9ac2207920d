"""Integer Scale (arXiv 2405.14597): group scales that are integers, so that a grouped matmul stays in int32 to the end.

    S[g, n] = max(1, round(a * s[g, n] / u[n])),    y[n] = x_scale * u[n] / a * sum_g S[g, n] * (x_g . q_g[n])

s are the scales of the grouped method that it is applied to, a is the amplifier, u[n] the largest scale of an output
channel.  Codes stay as they are; or, folded, the integers are small enough to be multiplied into the codes, and the codes
are rounded on that coarser grid (:mod:`fqjax.core.integer_scale`).
"""

# pyright: reportIncompatibleVariableOverride=false

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from fqjax.drivers.method import Method
from fqjax.drivers.settings import Allocation, Rounding
from fqjax.methods.awq import AWQ
from fqjax.methods.gptq import GPTQ
from fqjax.methods.round_to_nearest import RoundToNearest
from fqjax.registry import register
from fqjax.runtime.errors import InputError

if TYPE_CHECKING:
    from fqjax.core.formats.base import Format
    from fqjax.core.layer import LayerInputs, LayerPlan
    from fqjax.core.stored_inputs import StoredInput
    from fqjax.layers.linear import QuantizedLinear

LARGEST_AMPLIFIER = 1 << 20


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerScale(Method):
    """Integer scales for groups.

    Attributes:
      weights: how codes and float scales are found, with activations of 8 bits.
      amplifier: most that scales are multiplied with before they are rounded, a power of two.  A layer whose accumulator
        could overflow takes a smaller one.
      folded: whether scales are integers from 1 to 15, small enough to be multiplied into the codes.
    """

    kind: ClassVar[str] = "integer-scale"

    weights: RoundToNearest | GPTQ | AWQ = dataclasses.field(default_factory=RoundToNearest)
    amplifier: int = 1024
    folded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amplifier.bit_count() != 1 or not 1 <= self.amplifier <= LARGEST_AMPLIFIER:
            raise InputError(f"amplifier={self.amplifier}: expected a power of two, 2**20 at most")
        if self.weights.activation_bits != 8:
            raise InputError(
                f"activation_bits={self.weights.activation_bits}: integer scales need integer activations; expected 8"
            )

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.folded:
            yield "amplifier", "folded scales are not amplified"

    @property
    def allocation(self) -> Allocation:
        return self.weights.allocation

    @property
    def equalize(self) -> bool:
        return self.weights.equalize

    @property
    def rounding(self) -> Rounding:
        return self.weights.rounding

    @property
    def shares_inputs(self) -> bool:
        return self.weights.shares_inputs

    @property
    def smooths(self) -> bool:
        return self.weights.smooths

    @property
    def data_free(self) -> bool:
        return self.weights.data_free

    @property
    def naive(self) -> bool:
        return self.weights.naive

    def formats(self, bits: int) -> "tuple[Format, type[StoredInput]]":
        from fqjax.methods.arrays import grouped

        return grouped.formats(self.weights, bits, "folded" if self.folded else "integer")

    def plans(self, layer: "LayerInputs", bits: int) -> "list[LayerPlan]":
        return self.weights.group_plans(layer, bits, folded=self.folded)

    def finished(self, layer: "QuantizedLinear") -> "QuantizedLinear":
        if self.folded:
            return layer
        from fqjax.layers.integer_scales import with_integer_scales

        return with_integer_scales(layer, self.amplifier)
