"""Pictures of a whole model, layer by layer: bits, channels added, errors, and what more INT4 would cost.

Experts of one block are drawn as one layer: there may be hundreds of them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fqjax.layers.surgery import spoken
from fqjax.report.canvas import MIXED_COLOR, color_of, new_figure, row_height, save
from fqjax.report.report import LayerReport, Report, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")
"""The number of an expert in a layer's path."""

LOGARITHMIC_FROM = 20
"""Ratio of the largest to the smallest error above which the axis is logarithmic."""

WIDEST_TABLE = 8
"""Kinds of layers side by side; a model with more of them than blocks is drawn with the kinds from top to bottom."""


class Group(NamedTuple):
    """Layers that are drawn as one: one layer, or the same layer of all experts of a block."""

    name: str
    rows: tuple[LayerReport, ...]

    @property
    def bits(self) -> tuple[int, ...]:
        """Of the weights, from few to many."""
        return tuple(sorted(row.bits for row in self.rows))

    @property
    def color(self) -> str:
        """By the bits, if all layers have the same."""
        return color_of(self.bits[0]) if len(set(self.bits)) == 1 else MIXED_COLOR

    @property
    def added(self) -> float:
        """Channels added by flattening over original ones, averaged over multiply-accumulates."""
        return self._mean([row.expansion - 1 for row in self.rows])

    @property
    def errors(self) -> tuple[float, float, float]:
        """Smallest relative error, mean over multiply-accumulates, largest."""
        errors = [row.relative_error for row in self.rows]
        return min(errors), self._mean(errors), max(errors)

    @property
    def label(self) -> str:
        """Bits in words."""
        counted = Counter(self.bits)
        if len(counted) == 1:
            return f"INT{self.bits[0]}"
        return ", ".join(f"{count} INT{bits}" for bits, count in counted.items())

    def _mean(self, values: Sequence[float]) -> float:
        weights = [row.macs for row in self.rows]
        return float(np.average(values, weights=weights if sum(weights) else None))


def grouped(rows: Sequence[LayerReport]) -> list[Group]:
    """The layers in their order, experts of one block together."""
    found: dict[str, list[LayerReport]] = {}
    for row in rows:
        found.setdefault(EXPERT.sub("*", row.name), []).append(row)
    return [Group(name if len(rows) > 1 else rows[0].name, tuple(rows)) for name, rows in found.items()]


def place(name: str) -> tuple[str, str]:
    """Splits a layer's path after its last number: the block, and which of its layers."""
    found = re.match(r"(.*(?:^|\.)\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", spoken(name))


def plot_bits(rows: Sequence[LayerReport], scheme: str, path: Path) -> Path:
    """Draws the bits of every layer: blocks from top to bottom, the layers of a block from left to right."""
    groups = {place(EXPERT.sub("*", group.name)): group for group in grouped(rows)}
    blocks, kinds = (list(dict.fromkeys(where[i] for where in groups)) for i in (0, 1))
    turned = len(kinds) > max(WIDEST_TABLE, len(blocks))
    lines, columns = (kinds, blocks) if turned else (blocks, kinds)
    height = row_height(len(lines), 0.28)
    width = max([1.5, *(0.07 * len(name) for name in columns)])
    figure = new_figure(max(6.0, 2 + width * len(columns)), 1.2 + height * len(lines))
    axis, size = figure.subplots(), min(7.0, 50 * height)
    for (block, kind), group in groups.items():
        line, column = (
            (lines.index(kind), columns.index(block)) if turned else (lines.index(block), columns.index(kind))
        )
        _draw_cell(axis, group, line, column, size)
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xticks(range(len(columns)), columns, fontsize=7)
    axis.set_yticks(range(len(lines)), lines, fontsize=size)
    flattened = any(row.expansion > 1 for row in rows)
    figure.suptitle(
        f"{scheme}: bits of the weights{', and channels added by flattening' if flattened else ''}", fontsize=9
    )
    return save(figure, path)


def _draw_cell(axis: "Axes", group: Group, line: int, column: int, size: float) -> None:
    """One layer's cell; several experts share it side by side."""
    from matplotlib.patches import Rectangle

    share = 1 / len(group.bits)
    for i, bits in enumerate(group.bits):
        axis.add_patch(Rectangle((column - 0.5 + i * share, line - 0.5), share, 1, color=color_of(bits), linewidth=0))
    text = group.label + (f"  +{group.added:.1%}" if group.added else "")
    axis.add_patch(Rectangle((column - 0.5, line - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=0.7))
    axis.text(column, line, text, ha="center", va="center", fontsize=size, color="white")


def plot_layers(report: Report, rows: Sequence[LayerReport], path: Path) -> Path:
    """Draws the error of every layer, and beside it the channels that flattening added, if it added any."""
    groups, flattened = grouped(rows), any(row.expansion > 1 for row in rows)
    height = row_height(len(groups), 0.22)
    figure = new_figure(10 if flattened else 7, max(2.5, height * len(groups) + 1.6))
    axes = figure.subplots(1, 1 + flattened, sharey=True, squeeze=False)[0]
    places = np.arange(len(groups))
    if flattened:
        axes[0].barh(places, [100 * group.added for group in groups], color=[group.color for group in groups])
        axes[0].set_xlabel("channels added by flattening, %")
    _draw_errors(axes[-1], groups)
    axes[0].set_yticks(places, [spoken(group.name) for group in groups], fontsize=min(7.0, 50 * height))
    axes[0].set_ylim(len(groups) - 0.4, -0.6)
    _explain_colors(figure, groups)
    added = f"channels added by flattening ({report.expansion - 1:.1%} on average), and " if flattened else ""
    figure.suptitle(f"{report.scheme}: {added}errors of the layers", fontsize=10)
    return save(figure, path)


def _draw_errors(axis: "Axes", groups: Sequence[Group]) -> None:
    """Errors as bars, with a line from the smallest to the largest of several experts."""
    axis.set_xlabel("error of the layer's output, % of its mean square")
    lows, means, highs = (100 * np.array(errors) for errors in zip(*(group.errors for group in groups), strict=True))
    if not highs.any():
        axis.text(0.5, 0.5, "not known", ha="center", va="center", transform=axis.transAxes)
        axis.set_xticks([])
        return
    places = np.arange(len(groups))
    axis.barh(places, means, color=[group.color for group in groups])
    several = [i for i, group in enumerate(groups) if len(group.rows) > 1]
    for i in several:
        axis.plot((lows[i] or means[i], highs[i]), (i, i), color="black", linewidth=0.8)
    if several:
        axis.set_xlabel("error of the layer's output, % of its mean square\n(lines: from the best expert to the worst)")
    if highs.max() > LOGARITHMIC_FROM * means[means > 0].min():
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())


def _explain_colors(figure: "Figure", groups: Sequence[Group]) -> None:
    """A legend for all panels of a figure, beside none of the bars."""
    from matplotlib.patches import Patch

    rows = [row for group in groups for row in group.rows]
    entries = {
        f"INT{bits} weights: {_share(rows, bits):.1%} of the multiply-accumulates": color_of(bits)
        for bits in sorted({row.bits for row in rows})
    }
    if any(group.color == MIXED_COLOR for group in groups):
        entries["experts of different bits"] = MIXED_COLOR
    handles = [Patch(color=color) for color in entries.values()]
    figure.legend(handles, list(entries), loc="outside lower center", ncols=len(entries), fontsize=8)


def plot_share(report: Report, rows: Sequence[LayerReport], path: Path, *, is_text: bool) -> Path:
    """Draws the cost of more INT4, and where the model is.

    Args:
      is_text: whether the model's output is logits of tokens, of which the cost is a Kullback-Leibler divergence.
    """
    figure = new_figure(6.5, 3.9)
    axis = figure.subplots()
    shares, costs = np.transpose(report.trade_off)
    axis.plot(100 * shares, costs, marker=".", color="tab:grey", label="more and more layers, the cheapest first")
    if report.calibration is not None:
        cost = report.calibration.cost({row.name: row.bits for row in rows})
        axis.plot(100 * report.int4_mac_share, cost, "o", color="tab:orange", label="this model")
    axis.set_title(f"{report.scheme}: what more INT4 costs", fontsize=10)
    axis.set_xlabel("share of the multiply-accumulates in INT4, %")
    unit = "KL divergence of the next token, nats" if is_text else "relative squared difference of the output"
    axis.set_ylabel(f"{unit}\n(each layer quantized alone, summed)", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return save(figure, path)


def _share(rows: Sequence[LayerReport], bits: int) -> float:
    return ratio(sum(row.macs for row in rows if row.bits == bits), sum(row.macs for row in rows))
