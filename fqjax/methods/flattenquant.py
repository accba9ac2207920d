"""FlattenQuant (Zhang et al., LREC-COLING 2024, arXiv 2402.17985).

Smooth, choose a threshold for each operand, cut the channels that pass it into pieces, and quantize with one scale per
tensor, now set by the threshold instead of the largest value:

    x_scale = T_x / qmax,    w_scale = T_w / qmax,    K' = sum_i ceil(max|x_i| / T_x) * ceil(max|w_i| / T_w)

Thresholds follow a rule, as in the paper, or are searched for (:mod:`fqjax.core.threshold_search`).  With a scale for
every output channel, which costs a Hopper GPU nothing, the weights are not flattened.  How bits are divided among
layers is :mod:`fqjax.core.allocation`; what is open in the paper, and how it is settled here, stands in the
documentation.
"""

# pyright: reportIncompatibleVariableOverride=false

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from fqjax.drivers.settings import Nearest, Rounding
from fqjax.methods.base import PerTensorMethod
from fqjax.registry import register
from fqjax.runtime.settings import Share

if TYPE_CHECKING:
    from fqjax.core.formats.base import Format
    from fqjax.core.layer import LayerInputs, LayerPlan
    from fqjax.core.stored_inputs import StoredInput

Strength = Annotated[float, Ge(0), Le(100)]


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlattenQuant(PerTensorMethod):
    """Smoothing, then large channels cut into pieces; one scale per tensor.

    Attributes:
      alpha: smoothing strength in [0, 1] (:mod:`fqjax.core.transforms.diagonal`), which a search chooses for itself; None
        for no smoothing.
      flatten_activations, flatten_weights: which operand may be flattened.
      activation_bits: of the activations of layers with 4-bit weights.
      weight_scales: "tensor" for one scale a weight, "channel" for one every output channel.
      threshold_rule: how it is decided where channels are cut: a rule (:mod:`fqjax.core.thresholds`), or "search" for the
        best thresholds and smoothing of each layer in INT4 (:mod:`fqjax.core.threshold_search`).
      threshold_strength, threshold_strength_int8: the rule's parameter for layers whose activations have 4 bits, and 8,
        where a coarser cut does as well and costs fewer extra channels.
      max_expansion: most that a layer's K'/K may be, at least 1.
      rounding: of the weights.
      allocation, equalize, activation_percentile: as in :class:`~fqjax.drivers.method.Method`.
    """

    kind: ClassVar[str] = "flattenquant"

    alpha: Share | None = 0.5
    flatten_activations: bool = True
    flatten_weights: bool = True
    activation_bits: Literal[4, 8] = 4
    weight_scales: Literal["tensor", "channel"] = "tensor"
    threshold_rule: Literal["tukey", "mean", "search"] = "tukey"
    threshold_strength: Strength = 0.25
    threshold_strength_int8: Strength = 3.0
    max_expansion: Annotated[float, Ge(1), Le(16)] = 1.25
    rounding: Rounding = dataclasses.field(default_factory=Nearest)
    equalize: bool = True

    @property
    def coarse_activations(self) -> bool:
        return self.activation_bits == 4

    @property
    def flattens(self) -> bool:
        either = self.flatten_activations or (self.flatten_weights and self.weight_scales == "tensor")
        return either and self.max_expansion > 1

    @property
    def smooths(self) -> bool:
        return self.alpha is not None

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.weight_scales == "channel":
            yield "flatten_weights", "weights with a scale for every output channel are not flattened"
        if self.threshold_rule == "search":
            yield "threshold_strength", "thresholds of layers in INT4 are searched for"
        if self.activation_bits == 8:
            yield "threshold_strength", "no activations have 4 bits; expected threshold_strength_int8"
            if not isinstance(self.rounding, Nearest):
                yield "rounding.upstream", "acts only where activations have 4 bits"

    def formats(self, bits: int) -> "tuple[Format, type[StoredInput]]":
        from fqjax.methods.arrays import flattenquant

        return flattenquant.formats(self, bits)

    def plans(self, layer: "LayerInputs", bits: int) -> "list[LayerPlan]":
        from fqjax.methods.arrays import flattenquant

        return flattenquant.plans(layer, self, bits)
