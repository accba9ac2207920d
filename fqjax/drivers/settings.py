"""Settings of whole runs that methods have as parts: the division of bits among layers, and the rounding of weights."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from fqjax.runtime.settings import Settings, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation(Settings):
    """Division of 4 and 8 bits among layers (:mod:`fqjax.core.allocation`).

    Attributes:
      int4_share: least share of the linear multiply-accumulates in INT4, in [0, 1]; 1 for all layers but those that are
        kept in INT8.
      selection: which layers that are: those whose quantization disturbs the model's output least ("sensitivity"), those
        whose own output's distribution changes least ("kl", as in the FlattenQuant paper), or "budget": for every layer the
        bits and the number of extra channels, so that the sum of the disturbances is least.
      compression: with the selection "budget", how many times fewer bytes than in bfloat16 the linear weights take at
        least.  0: no size target.  An unreachable target becomes the smallest size (+5 %); ignored where padding leaves
        INT4 above 85 % of INT8.
    """

    int4_share: Share = 0.0
    selection: Literal["sensitivity", "kl", "budget"] = "sensitivity"
    compression: Annotated[float, Ge(0), Le(4)] = 0.0

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.selection != "budget":
            yield "compression", "only the selection 'budget' has a size target; expected 0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest(Settings):
    """Weights rounded to the nearest code."""

    kind: ClassVar[str] = "nearest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compensated(Settings):
    """Weights rounded by GPTQ, layer by layer, each making up for the errors before it (:mod:`fqjax.core.rounding.gptq`).

    Attributes:
      upstream: share of the error of the blocks before that a layer takes back, in [0, 1]; acts where activations have 4
        bits (:mod:`fqjax.drivers.moments`).
      damping: added to the Hessian's diagonal, relative to its mean.
    """

    kind: ClassVar[str] = "gptq"
    upstream: Share = 0.3
    damping: Annotated[float, Gt(0), Le(10)] = 0.01


Rounding = Nearest | Compensated
