"""Naive quantization: one scale per tensor, from its largest value.

    x_scale = max|x| / qmax,    w_scale = max|w| / qmax

The baseline.  One channel that is fifty times larger than the rest leaves the rest a fiftieth of the codes.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from fqjax.methods.base import PerTensorMethod
from fqjax.registry import register

if TYPE_CHECKING:
    from fqjax.core.formats.base import Format
    from fqjax.core.layer import LayerInputs, LayerPlan
    from fqjax.core.stored_inputs import StoredInput


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Absmax(PerTensorMethod):
    """One scale per tensor, from its largest value.

    Attributes:
      allocation, equalize, activation_percentile: as in :class:`~fqjax.drivers.method.Method`.
    """

    kind: ClassVar[str] = "absmax"

    naive = True

    def formats(self, bits: int) -> "tuple[Format, type[StoredInput]]":
        from fqjax.methods.arrays import absmax

        return absmax.formats(bits)

    def plans(self, layer: "LayerInputs", bits: int) -> "list[LayerPlan]":
        from fqjax.methods.arrays import absmax

        return absmax.plans(layer, bits)
