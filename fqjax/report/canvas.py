"""What all pictures have in common: figures that are drawn into files, and the colors of bits."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BITS_COLORS = {4: "tab:orange", 8: "tab:blue"}
"""Color of a layer, by the bits of its weight."""

OTHER_COLOR = "tab:green"
"""Color of layers with weights of other bits."""

MIXED_COLOR = "tab:grey"
"""Color of several layers whose bits differ."""

DOTS_PER_INCH = 130
TALLEST = 40.0
"""Inches that a picture may be high: a row of a larger model gets less room."""


def new_figure(width: float, height: float) -> "Figure":
    """A figure of its own, of a size in inches: not one of pyplot's, whose backend belongs to the caller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Writes a figure as PNG."""
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path


def color_of(bits: int) -> str:
    """Color of a layer whose weight has so many bits."""
    return BITS_COLORS.get(bits, OTHER_COLOR)


def row_height(rows: int, most: float) -> float:
    """Inches for each of some rows, at most ``most``, such that all fit."""
    return min(most, (TALLEST - 2) / max(rows, 1))
