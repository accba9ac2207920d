"""Grouped weights rounded to the nearest code: a scale for every output channel and every group of input channels.

The scale of a group is the one of several that rounds its weights best on the calibration inputs, the largest weight over
7.5 among them.  Without calibration data, all channels count alike.  The baseline of the methods with groups.
"""

# pyright: reportIncompatibleVariableOverride=false

import dataclasses
from typing import ClassVar

from fqjax.methods.base import GroupedMethod
from fqjax.registry import register


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearest(GroupedMethod):
    """Grouped weights, rounded to the nearest code.

    Attributes:
      group_size, activation_bits, allocation, equalize: as in :class:`~fqjax.methods.base.GroupedMethod`.
    """

    kind: ClassVar[str] = "round-to-nearest"

    naive = True

    @property
    def data_free(self) -> bool:
        return self.allocation.int4_share in (
            0,
            1,
        )  # Nothing is to be chosen by what a layer's error does to the output.
