"""Settings that methods with fixed scales of tensors, and methods with groups, have in common."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from fqjax.drivers.method import Method
from fqjax.drivers.settings import Allocation

if TYPE_CHECKING:
    from fqjax.core.formats.base import Format
    from fqjax.core.layer import LayerInputs, LayerPlan
    from fqjax.core.stored_inputs import StoredInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerTensorMethod(Method):
    """A fixed scale for the activations, and one scale for the weight, of as many bits.

    Attributes:
      allocation, equalize, activation_percentile: as in :class:`Method`.
    """

    allocation: Allocation = dataclasses.field(default_factory=Allocation)
    equalize: bool = False
    activation_percentile: Annotated[float, Ge(50), Le(100)] = 100.0

    coarse_activations = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedMethod(Method):
    """A scale for every output channel and group of input channels; activations with one for every token.

    Nothing is flattened: a group keeps the codes of its neighbours fine where a channel is large.

    Attributes:
      group_size: neighbouring input channels that share a scale: 16, 32, 64 or 128.
      activation_bits: of the activations of layers with 4-bit weights: 8, or 16 to leave them in floating point
        (weight-only quantization).
      allocation, equalize: as in :class:`Method`; INT4 throughout by default.
    """

    group_size: Literal[16, 32, 64, 128] = 128
    activation_bits: Literal[8, 16] = 8
    allocation: Allocation = dataclasses.field(default_factory=lambda: Allocation(int4_share=1.0))
    equalize: bool = False

    shares_inputs = False

    def formats(self, bits: int) -> "tuple[Format, type[StoredInput]]":
        from fqjax.methods.arrays import grouped

        return grouped.formats(self, bits)

    def plans(self, layer: "LayerInputs", bits: int) -> "list[LayerPlan]":
        return self.group_plans(layer, bits, folded=False)

    def group_plans(self, layer: "LayerInputs", bits: int, *, folded: bool) -> "list[LayerPlan]":
        """The plan of a layer, with scales of groups that are floats, or folded into the codes."""
        from fqjax.methods.arrays import grouped

        return grouped.plans(layer, self, bits, awq=False, folded=folded)
