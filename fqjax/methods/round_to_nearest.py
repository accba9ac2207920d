"""Grouped weights rounded to the nearest code: a scale for every output channel and every group of input channels.

The scale of a group is the one of several that rounds its weights best on the calibration inputs, the largest weight over
7.5 among them.  The baseline of the methods with groups.
"""

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
