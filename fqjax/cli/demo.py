"""``fqjax demo``: the whole path on the bundled checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from fqjax.cli.app import app, console


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the quantized checkpoint.")] = Path("fqjax-demo"),
) -> None:
    """Run the whole path on the bundled checkpoint."""
    from fqjax.demo.run import run_demo

    run_demo(out, console)
