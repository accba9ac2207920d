"""``fqjax convert``: a Hugging Face checkpoint to a quantized Orbax directory."""

from pathlib import Path
from typing import Annotated

import typer

from fqjax.cli.app import AllLayers, Interrupted, app, console, show


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Hugging Face directory or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Orbax directory to create.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Preset; 'fqjax schemes' lists them. A checkpoint that is quantized already takes none.",
            show_default="flattenquant",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text to calibrate on, or none; without it, the documentation of Python 3.12.", metavar="FILE"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 64,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window, BOS among them.", show_default="512, or all positions")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Leave layers in float whose dotted path this matches; repeatable.", metavar="REGEX"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field of the preset; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the input, print the plan, change nothing.")
    ] = False,
    all_layers: AllLayers = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
) -> None:
    """Quantize a Hugging Face checkpoint into an Orbax directory; one in compressed-tensors is converted as it is."""
    from fqjax.presets import resolve_scheme

    # The scheme is looked at before anything heavy is imported.
    chosen = resolve_scheme("flattenquant" if scheme is None else scheme).override(settings or [])
    from fqjax.convert import run as conversion

    made = conversion.plan(
        conversion.Conversion(
            source=source,
            out=out,
            scheme=chosen,
            calibration=calibration,
            data_free=str(calibration) == "none",
            samples=samples,
            window=window,
            ignore=tuple(ignore or ()),
            any_scheme=scheme is None and not settings and not ignore,
        ),
        dry_run=dry_run,
    )
    if dry_run:
        show(conversion.plan_table(made, all_layers=all_layers))
        return
    if made.batches and (windows := sum(len(batch) for batch in made.batches)) < samples:
        console.print(
            f"The text has {windows} windows of {made.conversion.window} tokens, not {samples}; all are taken"
        )
    if made.batches and calibration is None:
        console.print("Calibrating on Python's documentation; text like yours serves better: --calibration FILE")
    if made.export_obstacle is not None and chosen.method is not None:
        console.print(f"The result cannot be exported: {made.export_obstacle}", highlight=False, soft_wrap=True)
    try:
        report = conversion.convert(made, resume=resume)
    except KeyboardInterrupt:
        left = conversion.staging_directory(out)
        raise Interrupted(f"interrupted; what was done lies in {left}: go on with --resume") from None
    show(report.table(all_layers=all_layers))
    console.print(f"wrote {out} in {report.seconds:.0f} s")
