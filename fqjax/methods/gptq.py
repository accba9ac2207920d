"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323): each column of a weight makes up for the rounding of those before.

    W_rest <- W_rest - (w_i - q(w_i)) / U_ii * U_i,rest,    U = chol(H^-1)^T,    H = X^T X + damping * mean(diag) * I

Here on grouped weights, whose scales are those of rounding to the nearest.  The sweep is :mod:`fqjax.core.rounding.gptq`,
H comes from what the quantized blocks before give (:mod:`fqjax.drivers.moments`).
"""

# pyright: reportIncompatibleVariableOverride=false

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Gt, Le

from fqjax.drivers.settings import Compensated
from fqjax.methods.base import GroupedMethod
from fqjax.registry import register


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(GroupedMethod):
    """Grouped weights, rounded by GPTQ.

    Attributes:
      damping: added to the Hessian's diagonal, relative to its mean.
      group_size, activation_bits, allocation, equalize: as in :class:`~fqjax.methods.base.GroupedMethod`.
    """

    kind: ClassVar[str] = "gptq"

    damping: Annotated[float, Gt(0), Le(10)] = 0.01

    @property
    def rounding(self) -> Compensated:
        return Compensated(damping=self.damping)
