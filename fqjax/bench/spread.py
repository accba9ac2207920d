"""How far the repetitions of a measurement lie apart, and when that is so far that the figure says little."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

LARGE_NOISE = 0.1
"""Share by which the median may be above the least before a row is marked."""

MARK = "  NOISY"


class Spread(TypedDict):
    """Least, median and largest of several repetitions, in the unit of the row's own figure."""

    min: float
    median: float
    max: float


def spread_of(times: Sequence[float]) -> Spread:
    """The spread of repetitions."""
    return {"min": min(times), "median": statistics.median(times), "max": max(times)}


def noise(spread: Spread) -> float:
    """How much longer the median took than the least: a single slow repetition changes neither."""
    return spread["median"] / spread["min"] - 1 if spread["min"] > 0 else float("inf")


def shown(row: Mapping[str, object], digits: int) -> str:
    """Least and largest of a row, for a line of it; nothing for a row of an older record."""
    spread = row.get("spread")
    return "" if not isinstance(spread, dict) else f" ({spread['min']:.{digits}f} to {spread['max']:.{digits}f})"


def mark(row: Mapping[str, object]) -> str:
    """What a line ends with whose row's noise is large."""
    spread = row.get("spread")
    return MARK if isinstance(spread, dict) and noise(spread) > LARGE_NOISE else ""  # pyright: ignore[reportArgumentType]


def verdict(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """A line on the noise of all rows, if that of some is large."""
    found = [noise(spread) for row in rows if isinstance(spread := row.get("spread"), dict)]  # pyright: ignore
    loud = [share for share in found if share > LARGE_NOISE]
    if not loud:
        return []
    return [
        f"Noise is large: in {len(loud)} of {len(found)} rows the median of the repetitions lies more than {LARGE_NOISE:.0%} "
        f"above the least, by {max(loud):.0%} at most. Ratios of such rows say little; measure on an idle machine."
    ]
