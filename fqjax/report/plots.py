"""Pictures of a quantized model, and the numbers they show: what flattening did to the channels, which layers got which
bits at what cost, and what more INT4 would cost.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from flax import nnx

from fqjax.layers.stacked import quantized_layers
from fqjax.models.causal_lm import CausalLM
from fqjax.report.channel_plots import plot_channels
from fqjax.report.layer_plots import plot_bits, plot_layers, plot_share
from fqjax.report.report import Report
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import check_local


def check_matplotlib() -> None:
    """Raises an InputError if matplotlib is not installed, which the pictures need."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'fqjax[plots]'") from None


def plot_report(model: nnx.Module, report: Report, directory: Path) -> list[Path]:
    """Writes pictures as PNG files, and what they show as CSV and JSON.

    Nothing is changed that other pictures of the process go by: neither matplotlib's backend nor its settings.

    Returns:
      The files: ``channels.png`` (where formats have codes), ``bits.png``, ``layers.png``, ``layers.csv``, ``report.json``,
      and, where the scheme had a choice between INT4 and INT8, ``int4_share.png`` and ``int4_share.csv``.

    Raises:
      InputError: if matplotlib is not installed, the directory cannot be written, or the model has no quantized layer.
    """
    check_matplotlib()
    check_local(directory)
    layers = quantized_layers(model)
    if not layers:
        raise InputError("--plot: the model has no quantized layer; expected an fqjax checkpoint")
    rows = [row for row in report.layers if row.scales]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = [
            plot_channels(layers, report.calibration, directory / "channels.png"),
            plot_bits(rows, report.scheme, directory / "bits.png"),
            plot_layers(report, rows, directory / "layers.png"),
            _write_csv(directory / "layers.csv", LAYER_COLUMNS, ([getattr(r, c) for c in LAYER_COLUMNS] for r in rows)),
        ]
        if report.trade_off:
            is_text = isinstance(model, CausalLM)
            written.append(plot_share(report, rows, directory / "int4_share.png", is_text=is_text))
            written.append(_write_csv(directory / "int4_share.csv", ("int4_mac_share", "cost"), report.trade_off))
        (directory / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
        return [*filter(None, written), directory / "report.json"]
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
