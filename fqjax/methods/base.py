"""Settings that methods with fixed scales of tensors, and methods with groups, have in common."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from fqjax.drivers.method import Layout, Method
from fqjax.drivers.settings import Allocation

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from fqjax.core.formats.uniform import Grid
    from fqjax.core.layer import LayerInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerTensor(Method):
    """A fixed scale for the activations, and one scale for the weight, of as many bits.

    Attributes:
      allocation, equalize, activation_percentile: as in :class:`Method`.
    """

    allocation: Allocation = dataclasses.field(default_factory=Allocation)
    equalize: bool = False
    activation_percentile: Annotated[float, Ge(50), Le(100)] = 100.0

    def layout(self, bits: int) -> Layout:
        return Layout(activation_bits=bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped(Method):
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

    def layout(self, bits: int) -> Layout:
        return Layout(self.activation_bits if bits == 4 else 8, token_scales=True, group_size=self.group_size)

    def grids(self, layer: "LayerInputs", bits: int, budgets: "Float[Array, ' b']") -> "Callable[[Array], Grid]":
        return self.group_grids(layer, bits, folded=False)

    def group_grids(self, layer: "LayerInputs", bits: int, *, folded: bool) -> "Callable[[Array], Grid]":
        """The same grid for every bound, with scales of groups that are floats, or folded into the codes."""
        from fqjax.methods.arrays import grouped

        return grouped.grids(layer, self, bits, awq=False, folded=folded)
