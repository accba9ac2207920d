"""Naive quantization: one scale per tensor, from its largest value.

    x_scale = max|x| / qmax,    w_scale = max|w| / qmax

The baseline.  One channel that is fifty times larger than the rest leaves the rest a fiftieth of the codes.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from fqjax.methods.base import PerTensor
from fqjax.registry import register

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from fqjax.core.formats.uniform import Grid
    from fqjax.core.layer import LayerInputs


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Absmax(PerTensor):
    """One scale per tensor, from its largest value.

    Attributes:
      allocation, equalize, activation_percentile: as in :class:`~fqjax.drivers.method.Method`.
    """

    kind: ClassVar[str] = "absmax"

    naive = True

    def grids(self, layer: "LayerInputs", bits: int, budgets: "Float[Array, ' b']") -> "Callable[[Array], Grid]":
        from fqjax.methods.arrays import absmax

        return absmax.grids(layer, bits)
