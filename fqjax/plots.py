"""Pictures of a quantized model: which layers got which bits at what cost, and what flattening did to the channels."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fqjax.errors import InputError
from fqjax.linear import QuantizedLinear
from fqjax.report import LayerReport, Report, quantized_layers

COLORS = {4: "tab:orange", 8: "tab:blue", 16: "lightgrey", 32: "lightgrey"}
MOST = 4
"""Layers shown channel by channel: those with the most flattened channels."""


def plot_report(model: nnx.Module, report: Report, directory: Path) -> list[Path]:
    """Writes the pictures as PNG files and returns their paths.

    Raises:
      InputError: if matplotlib is not installed, the directory cannot be written, or the model has no quantized layer.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'fqjax[plots]'") from None
    layers = quantized_layers(model)
    if not layers:
        raise InputError("--plot: the model has no quantized layer; expected an fqjax checkpoint")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [_plot_layers(report, directory / "layers.png"), _plot_channels(layers, directory / "channels.png")]
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror})") from None


def _plot_layers(report: Report, path: Path) -> Path:
    """Bits, K'/K and error of every layer."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = [row for row in report.layers if row.accumulator_bound]
    height = max(2.5, 0.22 * len(rows) + 1)
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(10, height), layout="constrained")
    places = np.arange(len(rows))
    colors = [COLORS[row.bits] for row in rows]
    left.barh(places, [100 * (row.expansion - 1) for row in rows], color=colors)
    left.set_xlabel("channels added by flattening, %")
    left.set_yticks(places, [row.name for row in rows], fontsize=7)
    left.invert_yaxis()
    right.barh(places, [100 * row.relative_error for row in rows], color=colors)
    right.set_xscale("log")
    right.set_xlabel("error of the layer's output, % of its mean square")
    present = sorted({row.bits for row in rows})
    handles = [Patch(color=COLORS[bits]) for bits in present]
    right.legend(handles, [f"INT{bits}, {_share(rows, bits):.0%} of the arithmetic" for bits in present], fontsize=8)
    figure.suptitle(
        f"{report.scheme}: {report.int4_mac_share:.1%} of the arithmetic in INT4, K'/K {report.expansion:.3f}"
    )
    return _save(figure, path)


def _plot_channels(layers: dict[str, QuantizedLinear], path: Path) -> Path:
    """Largest weight of each input channel, before and after flattening."""
    import matplotlib.pyplot as plt

    shown = sorted(layers, key=lambda name: -layers[name].expansion)[:MOST]
    figure, axes = plt.subplots(len(shown), 1, figsize=(9, 2.4 * len(shown)), layout="constrained", squeeze=False)
    for axis, name in zip(axes[:, 0], shown, strict=True):
        before, after = channel_maxima(layers[name])
        axis.plot(before, linewidth=0.7, color="tab:red", label="before flattening")
        axis.plot(after, linewidth=0.7, color="tab:blue", label="after")
        axis.axvline(len(before) - 0.5, color="grey", linewidth=0.7, linestyle=":")
        axis.set_title(f"{name}: {len(before)} channels, {len(after) - len(before)} added", fontsize=9)
        axis.set_ylabel("largest |weight|", fontsize=8)
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8)
    axes[-1, 0].set_xlabel("input channel, smoothed (right of the dotted line: the added ones)", fontsize=8)
    return _save(figure, path)


def channel_maxima(layer: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitude of each input channel of a layer's smoothed weight, (K,) before and (K + added,) after flattening."""
    quantizer = layer.input.get_value()
    weight = np.asarray(layer.weight.get_value().dequantize())
    k, used = quantizer.multiplier.shape[0], quantizer.used
    source, part = np.asarray(quantizer.source)[:used], np.asarray(quantizer.part)[:used]
    whole = weight[:, :k].copy()
    # Of the pairs of pieces (a, b), those with a = 0 hold the weight's pieces once each.
    own = np.flatnonzero(part == 0)
    np.add.at(whole.T, source[own], weight[:, k + own].T)
    return np.abs(whole).max(axis=0), np.abs(weight[:, : k + used]).max(axis=0)


def _share(rows: list[LayerReport], bits: int) -> float:
    return sum(row.macs for row in rows if row.bits == bits) / sum(row.macs for row in rows)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
