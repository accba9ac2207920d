"""SmoothQuant (Xiao et al., arXiv 2211.10438): move range from activations to weights, then one scale per tensor.

    s_i = max|x_i|^alpha / max|w_i|^(1 - alpha),    x' = x / s,    w' = w * s

Static per-tensor scales for both operands, the paper's setting O3.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from fqjax.methods.base import PerTensor
from fqjax.registry import register
from fqjax.runtime.settings import Share

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from fqjax.core.formats.uniform import Grid
    from fqjax.core.layer import LayerInputs


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant(PerTensor):
    """One scale per tensor after smoothing.

    Attributes:
      alpha: smoothing strength in [0, 1] (:mod:`fqjax.core.transforms.diagonal`); None for no smoothing.
      allocation, equalize, activation_percentile: as in :class:`~fqjax.drivers.method.Method`.
    """

    kind: ClassVar[str] = "smoothquant"

    alpha: Share | None = 0.5

    def grids(self, layer: "LayerInputs", bits: int, budgets: "Float[Array, ' b']") -> "Callable[[Array], Grid]":
        from fqjax.methods.arrays import smoothquant

        return smoothquant.grids(layer, self.alpha, bits)
