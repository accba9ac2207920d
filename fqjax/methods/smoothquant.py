"""SmoothQuant (Xiao et al., arXiv 2211.10438): move range from activations to weights, then one scale per tensor.

    s_i = max|x_i|^alpha / max|w_i|^(1 - alpha),    x' = x / s,    w' = w * s

Static per-tensor scales for both operands, the paper's setting O3.
"""

# pyright: reportIncompatibleVariableOverride=false

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from fqjax.methods.base import PerTensorMethod
from fqjax.registry import register
from fqjax.runtime.settings import Share

if TYPE_CHECKING:
    from fqjax.core.formats.base import Format
    from fqjax.core.layer import LayerInputs, LayerPlan
    from fqjax.core.stored_inputs import StoredInput


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant(PerTensorMethod):
    """One scale per tensor after smoothing.

    Attributes:
      alpha: smoothing strength in [0, 1] (:mod:`fqjax.core.transforms.diagonal`); None for no smoothing.
      allocation, equalize, activation_percentile: as in :class:`~fqjax.drivers.method.Method`.
    """

    kind: ClassVar[str] = "smoothquant"

    alpha: Share | None = 0.5

    @property
    def smooths(self) -> bool:
        return self.alpha is not None

    def formats(self, bits: int) -> "tuple[Format, type[StoredInput]]":
        from fqjax.methods.arrays import absmax

        return absmax.formats(bits)

    def plans(self, layer: "LayerInputs", bits: int) -> "list[LayerPlan]":
        from fqjax.methods.arrays import smoothquant

        return smoothquant.plans(layer, self.alpha, bits)
