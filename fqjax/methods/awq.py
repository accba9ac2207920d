"""AWQ (Lin et al., MLSys 2024, arXiv 2306.00978): input channels with large activations get more of the codes.

    s = mean|x|^r,    x' = x / s,    w' = w * s

on grouped weights, with the exponent r that serves the layer's output best.  AWQ folds s into the layer before; here
quantizing the activations divides by it, so every layer has its own.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from fqjax.methods.base import GroupedMethod
from fqjax.registry import register

if TYPE_CHECKING:
    from fqjax.core.layer import LayerInputs, LayerPlan


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(GroupedMethod):
    """Grouped weights, channels scaled by their activations first.

    Attributes:
      group_size, activation_bits, allocation, equalize: as in :class:`~fqjax.methods.base.GroupedMethod`.
    """

    kind: ClassVar[str] = "awq"

    shares_inputs = True
    smooths = True

    def group_plans(self, layer: "LayerInputs", bits: int, *, folded: bool) -> "list[LayerPlan]":
        from fqjax.methods.arrays import grouped

        return grouped.plans(layer, self, bits, awq=True, folded=folded)
