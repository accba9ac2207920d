"""How the work of attention over INT8 codes is cut up on a Hopper GPU."""

import dataclasses
import math

from pallas_kernels.attention.problem import PROGRAMS

TILE_POSITIONS = 16
"""Of a tile that a warp looks at."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How the work is cut up.

    Attributes:
      splits: units that share a key-value head of a sequence.
      warps: of a unit, 4, 8 or 16.
      units: of a CTA, which has nothing else in common; warps * units is at most 16.  With 16 warps none of them gets more
        than 128 registers, with which as many as can be are on a multiprocessor at once.
    """

    splits: int = 1
    warps: int = 4
    units: int = 1

    def __post_init__(self) -> None:
        if (
            self.splits < 1
            or self.warps not in (4, 8, 16)
            or self.units not in (1, 2, 4)
            or self.warps * self.units > 16
        ):
            raise ValueError(f"Cut: warps must be 4, 8 or 16, and with units (1, 2, 4) 16 at most, got {self}")

    def programs(self, heads: int, capacity: int) -> int:
        """For each key-value head of each sequence."""
        del heads, capacity
        return self.splits


def best_cut(heads: int, capacity: int) -> Cut:
    """The fastest of those tried on an H200 in November 2026; ``scripts/tune_decoding.py`` tries them again.

    Args:
      heads: key-value heads of all sequences together.
      capacity: of the cache.
    """
    if heads <= PROGRAMS:
        return Cut(splits=max(1, min(PROGRAMS // heads, -(-capacity // (8 * TILE_POSITIONS)))), warps=8)
    if heads <= 3 * PROGRAMS:  # So many CTAs of 4 warps are on the GPU at once.
        return Cut(warps=4)
    return Cut(warps=4, units=math.gcd(heads, 4))
