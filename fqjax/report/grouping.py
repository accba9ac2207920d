"""Rows of a table on many layers, those put together that differ in the numbers of blocks and experts alone.

layers.0.mlp.experts.0.gate_up_proj  ...  layers.47.mlp.experts.127.gate_up_proj
layers.0-47.mlp.experts.0-127.gate_up_proj
"""

import dataclasses
import re
from collections.abc import Iterable

MOST_ROWS = 64
"""Rows from which on layers are put together."""

Span = tuple[int, int]
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of a layer, or the lowest and the highest of several layers, each with its text."""

    low: tuple[float, str]
    high: tuple[float, str]

    @classmethod
    def of(cls, value: float, text: str) -> "Figure":
        """That of one layer."""
        return cls((value, text), (value, text))

    @property
    def text(self) -> str:
        """As a table shows it."""
        return self.low[1] if self.low[1] == self.high[1] else f"{self.low[1]}-{self.high[1]}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer, or several that are alike.

    Attributes:
      name: dotted path, with ``%`` in place of its numbers.
      spans: of each of the numbers, the first and the last.
      kind: cells that are the same for all of the layers.
      figures: cells that may differ.
    """

    name: str
    spans: tuple[Span, ...]
    kind: tuple[str, ...]
    figures: tuple[Figure, ...] = ()

    @classmethod
    def of(cls, path: str, kind: tuple[str, ...], figures: tuple[Figure, ...] = ()) -> "Row":
        """That of one layer, by its dotted path."""
        numbers = tuple((int(number), int(number)) for number in NUMBER.findall(path))
        return cls(NUMBER.sub("%", path), numbers, kind, figures)

    @property
    def label(self) -> str:
        """The dotted path, numbers as ranges."""
        texts = iter(f"{first}-{last}" if last > first else f"{first}" for first, last in self.spans)
        return re.sub("%", lambda _: next(texts), self.name) if self.spans else self.name


def grouped(rows: Iterable[Row], most: int = MOST_ROWS) -> list[Row]:
    """The rows, put together only as far as there are more than ``most``.

    First those that agree in all cells, then experts whose figures differ, then blocks whose figures differ.
    """
    found = list(rows)
    for same, only_last in ((True, False), (False, True), (False, False)):
        if len(found) > most:
            found = _merged(found, same, only_last)
    return found


def _merged(rows: list[Row], same: bool, only_last: bool) -> list[Row]:
    """Rows put together along each of their numbers, from the last one on; ``only_last``: along that of the experts."""
    for back in range(1, 2 if only_last else 1 + max(len(row.spans) for row in rows)):
        rows = _along(rows, back, same, least=2 if only_last else back)
    return rows


def _along(rows: list[Row], back: int, same: bool, least: int) -> list[Row]:
    """Rows put together that agree in all but one of their numbers, and follow each other in that.

    Args:
      back: which number, 1 for the last.
      same: whether figures have to agree too.
      least: numbers that a row has at least to be put together with others.
    """
    made: list[Row | None] = list(rows)
    last: dict[object, int] = {}
    for i, row in enumerate(rows):
        if len(row.spans) < least:
            continue
        at = len(row.spans) - back
        key = (row.name, row.kind, row.figures if same else (), row.spans[:at], row.spans[at + 1 :])
        before = made[last[key]] if key in last else None
        if before is None or before.spans[at][1] + 1 != row.spans[at][0]:
            last[key] = i
            continue
        spans = (*row.spans[:at], (before.spans[at][0], row.spans[at][1]), *row.spans[at + 1 :])
        pairs = zip(before.figures, row.figures, strict=True)
        both = tuple(Figure(min(one.low, two.low), max(one.high, two.high)) for one, two in pairs)
        made[last[key]], made[i] = dataclasses.replace(row, spans=spans, figures=both), None
    return [row for row in made if row is not None]
