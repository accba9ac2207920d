"""Pictures of a quantized model, and the numbers they show: what flattening did to the channels, which layers got which
bits at what cost, and what more INT4 would cost.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from flax import nnx

from fqjax.checkpoint.calibration_record import CalibrationRecord
from fqjax.core.channels import gather_codes
from fqjax.core.codes import qmax
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.stacked import quantized_layers
from fqjax.report.report import LayerReport, Report, ratio
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import check_local

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BITS_COLORS = {4: "tab:orange", 8: "tab:blue"}
"""Color of a layer, by the bits of its weight."""

MAX_LAYERS_SHOWN = 4
"""Layers shown channel by channel: those with the most flattened channels."""


def plot_report(model: nnx.Module, report: Report, directory: Path) -> list[Path]:
    """Writes pictures as PNG files, and what they show as CSV and JSON.

    Returns:
      The files: ``channels.png``, ``bits.png``, ``layers.png``, ``layers.csv``, ``report.json``, and, where the scheme had a
      choice between INT4 and INT8, ``int4_share.png`` and ``int4_share.csv``.

    Raises:
      InputError: if matplotlib is not installed, the directory cannot be written, or the model has no quantized layer.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'fqjax[plots]'") from None
    check_local(directory)
    layers = quantized_layers(model)
    if not layers:
        raise InputError("--plot: the model has no quantized layer; expected an fqjax checkpoint")
    rows = [row for row in report.layers if row.scales]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = [
            _plot_channels(layers, report.calibration, directory / "channels.png"),
            _plot_bits(rows, report.scheme, directory / "bits.png"),
            _plot_layers(report, rows, directory / "layers.png"),
            _write_csv(directory / "layers.csv", LAYER_COLUMNS, ([getattr(r, c) for c in LAYER_COLUMNS] for r in rows)),
        ]
        if report.trade_off:
            written.append(_plot_share(report, rows, directory / "int4_share.png"))
            written.append(_write_csv(directory / "int4_share.csv", ("int4_mac_share", "cost"), report.trade_off))
        (directory / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
        return [*written, directory / "report.json"]
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror})") from None


LAYER_COLUMNS = (
    "name",
    "bits",
    "scales",
    "expansion",
    "relative_error",
    "bytes",
    "bytes_bf16",
    "macs",
    "accumulator_bound",
    "overflow_margin_bits",
)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


class Channels(NamedTuple):
    """Largest code of every channel, were there no limit: (K,) as they are, and (K + added,) after flattening."""

    before: np.ndarray
    after: np.ndarray
    limit: int


def weight_channels(layer: QuantizedLinear) -> Channels:
    """The input channels of a layer's weight."""
    quantizer, weight = layer.input.get_value(), layer.weight.get_value().unpacked()
    used = layer.figures.flattened
    codes = np.abs(np.asarray(weight, np.int32)).max(axis=0)
    gathered, _ = gather_codes(weight, quantizer.source, quantizer.part)
    whole = np.abs(np.asarray(gathered, np.int32)).max(axis=0)
    return Channels(whole, codes[: len(whole) + used], qmax(layer.bits))


def activation_channels(layer: QuantizedLinear, absmax: np.ndarray) -> Channels:
    """The channels of a layer's input, of which ``absmax``, (K,), is the largest that calibration saw."""
    quantizer = layer.input.get_value()
    codes, limit = absmax * np.asarray(quantizer.multiplier), quantizer.qmax
    used = layer.figures.flattened
    source, part = (np.asarray(array)[:used] for array in (quantizer.source, quantizer.part))
    added = np.clip(codes[source] - part * limit, 0, limit)
    return Channels(codes, np.concatenate([np.minimum(codes, limit), added]), limit)


def _plot_channels(layers: dict[str, QuantizedLinear], record: CalibrationRecord | None, path: Path) -> Path:
    """Largest activation and weight of each channel, before and after flattening."""
    shown = sorted(layers, key=lambda name: -layers[name].expansion)[:MAX_LAYERS_SHOWN]
    shape = (len(shown), 2 if record else 1)
    figure = _figure(6 * shape[1], 2.3 * shape[0])
    axes = figure.subplots(*shape, squeeze=False)
    for line, name in zip(axes, shown, strict=True):
        operands = {"weight": weight_channels(layers[name])}
        if record and name in record.activations:
            operands = {"activation": activation_channels(layers[name], record.activations[name])} | operands
        for axis, (operand, channels) in zip(line, operands.items(), strict=False):
            k = len(channels.before)
            axis.plot(channels.before, linewidth=0.7, color="tab:red", label="before flattening")
            axis.plot(channels.after, linewidth=0.7, color="tab:blue", label="after")
            axis.axhline(channels.limit, color="black", linewidth=0.7, linestyle="--", label="largest code there is")
            axis.axvline(k - 0.5, color="grey", linewidth=0.7, linestyle=":")
            bits = layers[name].input.get_value().code_bits if operand == "activation" else layers[name].bits
            axis.set_title(f"{name}, {operand}s in INT{bits}: {k} channels + {len(channels.after) - k}", fontsize=8)
            axis.set_ylabel(f"largest |{operand}|, in codes", fontsize=7)
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("input channel, smoothed; right of the dotted line those that flattening added", fontsize=7)
    return _save(figure, path)


def _plot_bits(rows: list[LayerReport], scheme: str, path: Path) -> Path:
    """Bits of every layer: blocks from top to bottom, the layers of a block from left to right."""
    from matplotlib.colors import to_rgb

    places = {row.name: _place(row.name) for row in rows}
    blocks, kinds = (list(dict.fromkeys(place[i] for place in places.values())) for i in (0, 1))
    picture = np.ones((len(blocks), len(kinds), 3))
    figure = _figure(2 + 1.5 * len(kinds), 1.4 + 0.28 * len(blocks))
    axis = figure.subplots()
    for row in rows:
        block, kind = (names.index(part) for names, part in zip((blocks, kinds), places[row.name], strict=True))
        picture[block, kind] = to_rgb(BITS_COLORS[row.bits])
        text = f"INT{row.bits}" + (f"  +{row.expansion - 1:.1%}" if row.expansion > 1 else "")
        axis.text(kind, block, text, ha="center", va="center", fontsize=7, color="white")
    axis.imshow(picture, aspect="auto")
    axis.set_xticks(range(len(kinds)), kinds, fontsize=7)
    axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axis.set_title(f"{scheme}: bits of the weights, and channels added by flattening", fontsize=9)
    return _save(figure, path)


def _place(name: str) -> tuple[str, str]:
    """Splits a layer's path after its last number: the block, and which of its layers."""
    found = re.match(r"(.*(?:^|\.)\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def _plot_layers(report: Report, rows: list[LayerReport], path: Path) -> Path:
    """K'/K and error of every layer."""
    from matplotlib.patches import Patch

    figure = _figure(10, max(2.5, 0.22 * len(rows) + 1))
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    colors = [BITS_COLORS[row.bits] for row in rows]
    left.barh(places, [100 * (row.expansion - 1) for row in rows], color=colors)
    left.set_xlabel("channels added by flattening, %")
    left.set_yticks(places, [row.name for row in rows], fontsize=7)
    left.invert_yaxis()
    right.barh(places, [100 * row.relative_error for row in rows], color=colors)
    right.set_xscale("log")
    right.set_xlabel("error of the layer's output, % of its mean square")
    present = sorted({row.bits for row in rows})
    handles = [Patch(color=BITS_COLORS[bits]) for bits in present]
    right.legend(handles, [f"INT{bits}, {_share(rows, bits):.0%} of the arithmetic" for bits in present], fontsize=8)
    figure.suptitle(
        f"{report.scheme}: {report.int4_mac_share:.1%} of the arithmetic in INT4, K'/K {report.expansion:.3f}"
    )
    return _save(figure, path)


def _plot_share(report: Report, rows: list[LayerReport], path: Path) -> Path:
    """The cost of more INT4, and where the model is."""
    figure = _figure(6, 3.6)
    axis = figure.subplots()
    shares, costs = np.transpose(report.trade_off)
    axis.plot(100 * shares, costs, marker=".", color="tab:grey", label="the cheapest layers first")
    if report.calibration is not None:
        cost = report.calibration.cost({row.name: row.bits for row in rows})
        axis.plot(100 * report.int4_mac_share, cost, "o", color="tab:orange", label="this model")
    axis.set_xlabel("share of the multiply-accumulates in INT4, %")
    axis.set_ylabel("divergence of the model's output,\nlayers quantized one at a time, summed", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return _save(figure, path)


def _share(rows: list[LayerReport], bits: int) -> float:
    return ratio(sum(row.macs for row in rows if row.bits == bits), sum(row.macs for row in rows))


def _figure(width: float, height: float) -> "Figure":
    """A figure of its own, of a size in inches: not one of pyplot's, whose backend belongs to the caller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
