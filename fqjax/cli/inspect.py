"""``fqjax inspect``: a model layer by layer."""

from pathlib import Path
from typing import Annotated

import typer

from fqjax.cli.app import AllLayers, JsonFile, Model, app, console, load_model, show, write_json
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import check_local, exists


@app.command()
def inspect(
    model: Model,
    json_file: JsonFile = None,
    all_layers: AllLayers = False,
    plot: Annotated[Path | None, typer.Option(help="Write pictures into this directory.", metavar="DIR")] = None,
) -> None:
    """Show a model layer by layer: bits, flattened channels, error, bytes.

    With --plot also pictures: the channels before and after flattening, the bits of every layer, and what more INT4 would
    cost; the numbers behind them as CSV and JSON.
    """
    from fqjax.checkpoint.calibration_record import read_calibration_record
    from fqjax.layers.stacked import quantized_layers
    from fqjax.report.report import report_of

    if plot is not None:
        from fqjax.report.plots import check_matplotlib

        check_local(plot)
        if exists(plot) and not plot.is_dir():
            raise InputError(f"{plot}: no directory; expected one, or nothing")
        check_matplotlib()
    loaded = load_model(model)
    layers = quantized_layers(loaded)
    kinds = {name: (layer.sizes.inputs, layer.bits) for name, layer in layers.items()}
    report = report_of(loaded, record=read_calibration_record(Path(model), kinds))
    show(report.table(all_layers=all_layers))
    if json_file is not None:
        write_json(json_file, report.to_json())
    if plot is not None:
        from fqjax.report.plots import plot_report

        for path in plot_report(loaded, report, plot):
            console.print(f"wrote {path}")
