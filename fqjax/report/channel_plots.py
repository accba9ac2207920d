"""A picture of the input channels of some layers: how large activations and weights become in each, in codes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fqjax.checkpoint.calibration_record import CalibrationRecord
from fqjax.core.channels import gather_codes
from fqjax.core.codes import qmax
from fqjax.core.formats.grouped import Grouped
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.surgery import spoken
from fqjax.report.canvas import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LAYERS_SHOWN = 4
"""Layers shown channel by channel: those that flattening changed most, else those with the largest errors."""

OF_LARGEST = "% of the largest channel"

MANY_CHANNELS = 50
"""Added channels that are drawn as a line alone, without a dot for each."""


class Channels(NamedTuple):
    """Largest magnitude in every channel of an operand.

    Attributes:
      before: (K,), in codes, were there no limit; in percent of the largest channel where codes say nothing.
      after: (K + added,), after flattening: the original channels, then the added ones.
      limit: largest magnitude of a code; None where numbers are no codes.
      unit: of the numbers, in words.
    """

    before: np.ndarray
    after: np.ndarray
    limit: int | None
    unit: str = "in codes"

    @property
    def added(self) -> int:
        """Channels that flattening added."""
        return len(self.after) - len(self.before)


def weight_channels(layer: QuantizedLinear) -> Channels | None:
    """The input channels of a layer's weight; None if its format has no integer codes.

    Where groups of input channels have scales, every group uses all codes; then the real weights are shown.
    """
    quantizer, stored = layer.input.get_value(), layer.weight.get_value()
    if isinstance(stored.format, Grouped):
        share = np.abs(np.asarray(stored.dequantize(), np.float32)).max(axis=0)[: layer.in_features]
        share *= 100 / (share.max() or 1)
        return Channels(share, share, None, OF_LARGEST)
    try:
        weight = stored.unpacked()
    except NotImplementedError:
        return None
    codes = np.abs(np.asarray(weight, np.int32)).max(axis=0)
    gathered, _ = gather_codes(weight, quantizer.source, quantizer.part)
    whole = np.abs(np.asarray(gathered, np.int32)).max(axis=0)
    # Codes of groups, and those of other programs, reach one further below zero than above.
    limit = max(qmax(layer.bits), int(codes.max(initial=0)))
    return Channels(whole, codes[: len(whole) + layer.figures.flattened], limit)


def activation_channels(layer: QuantizedLinear, absmax: np.ndarray) -> Channels | None:
    """The channels of a layer's input, of which ``absmax``, (K,), is the largest that calibration saw.

    Where every token has a scale of its own, they are those of a token that has the largest of all channels at once.
    None if something unknown is done to the input before.
    """
    if layer.transform is not None:
        return None
    quantizer, used = layer.input.get_value(), layer.figures.flattened
    codes, limit = absmax * np.asarray(quantizer.multiplier), quantizer.qmax
    largest = float(codes.max(initial=0)) or 1.0
    if limit is None:
        share = 100 * codes / largest
        return Channels(share, share, None, OF_LARGEST)
    if quantizer.fixed_scale() is None:
        codes = codes * limit / largest
        return Channels(codes, codes, limit, "in codes (a scale per token)")
    source, part = (np.asarray(array)[:used] for array in (quantizer.source, quantizer.part))
    added = np.clip(codes[source] - part * limit, 0, limit)
    return Channels(codes, np.concatenate([np.minimum(codes, limit), added]), limit)


def is_smoothed(layer: QuantizedLinear) -> bool:
    """Whether channels of a layer's input are divided by factors of their own."""
    return len(np.unique(np.asarray(layer.input.get_value().multiplier))) > 1


def most_telling(layers: Mapping[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
    """The layers that flattening changed most; those with the largest errors where it changed none."""
    flattened = [name for name, layer in layers.items() if layer.figures.flattened]
    if flattened:
        names = sorted(flattened, key=lambda name: -layers[name].expansion)
    else:
        names = sorted(layers, key=lambda name: -layers[name].figures.relative_error)
    return {name: layers[name] for name in names[:MAX_LAYERS_SHOWN]}


def plot_channels(layers: Mapping[str, QuantizedLinear], record: CalibrationRecord | None, path: Path) -> Path | None:
    """Draws the largest activation and weight of each channel, before and after flattening; None if nothing is known."""
    lines = {name: line for name, layer in most_telling(layers).items() if (line := _operands(name, layer, record))}
    if not lines:
        return None
    columns = max(map(len, lines.values()))
    figure = new_figure(6.2 * columns, 2.3 * len(lines) + 0.7)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    labelled = {}
    for line, (name, operands) in zip(axes, lines.items(), strict=True):
        for axis in line[len(operands) :]:
            axis.set_axis_off()
        for axis, (operand, channels) in zip(line, operands.items(), strict=False):
            _draw(axis, channels)
            axis.set_title(f"{spoken(name)}: {_title(operand, channels, layers[name])}", fontsize=8)
            axis.set_ylabel(f"largest |{operand}|,\n{channels.unit}", fontsize=7, multialignment="center")
            labelled |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside upper right", ncols=len(labelled), fontsize=7)
    below = "input channel, smoothed" if any(map(is_smoothed, layers.values())) else "input channel"
    flattened = any(channels.added for operands in lines.values() for channels in operands.values())
    figure.supxlabel(
        below + ("; right of the dotted line those that flattening added" if flattened else ""), fontsize=8
    )
    return save(figure, path)


def _operands(name: str, layer: QuantizedLinear, record: CalibrationRecord | None) -> dict[str, Channels]:
    """What is known of a layer's channels, by operand."""
    seen = None if record is None else record.activations.get(name)
    found = {
        "activation": None if seen is None else activation_channels(layer, seen),
        "weight": weight_channels(layer),
    }
    return {operand: channels for operand, channels in found.items() if channels is not None}


def _title(operand: str, channels: Channels, layer: QuantizedLinear) -> str:
    bits = layer.input.get_value().code_bits if operand == "activation" else layer.bits
    kind = "floating point" if operand == "activation" and channels.limit is None else f"INT{bits}"
    added = f", {channels.added} added by flattening" if channels.added else ""
    return f"{operand}s in {kind}, {len(channels.before)} channels{added}"


def _draw(axis: "Axes", channels: Channels) -> None:
    k, places = len(channels.before), np.arange(len(channels.after))
    if channels.limit is not None:
        limit = {"color": "0.6", "linewidth": 0.8, "linestyle": "--", "zorder": 0}
        axis.axhline(channels.limit, label="largest code there is", **limit)
    if channels.added:
        axis.plot(channels.before, linewidth=0.8, color="tab:red", label="before flattening")
        axis.plot(places[:k], channels.after[:k], linewidth=0.8, color="tab:blue", label="after flattening")
        marker = "." if channels.added < MANY_CHANNELS else ""
        axis.plot(places[k:], channels.after[k:], linewidth=0.8, marker=marker, markersize=3, color="tab:blue")
        axis.axvline(k - 0.5, color="grey", linewidth=0.7, linestyle=":")
    else:
        axis.plot(channels.before, linewidth=0.8, color="tab:blue", label="largest magnitude")
    top = max(float(channels.before.max(initial=0)), channels.limit or 0)
    axis.set_ylim(0, 1.08 * top or 1)
    axis.tick_params(labelsize=7)
