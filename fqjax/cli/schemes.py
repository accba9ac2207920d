"""``fqjax schemes``: the presets, and the schemes of other packages."""

from typing import TYPE_CHECKING

from fqjax.cli.app import app, show
from fqjax.cli.terminal import complain

if TYPE_CHECKING:
    from fqjax.scheme import Scheme

CAPTION = (
    "calibration: whether a text has to run through the model.\n"
    "export: in the format compressed-tensors; by model: if it has a place for the smoothing, which convert --dry-run tells."
)


@app.command()
def schemes() -> None:
    """List the schemes: what each is, whether it needs calibration data, and whether it can be exported."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fqjax.presets import all_schemes
    from fqjax.registry import broken

    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=CAPTION, caption_justify="left")
    table.add_column("scheme", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    table.add_column("calibration")
    table.add_column("export", no_wrap=True)
    for scheme in all_schemes().values():
        table.add_row(scheme.name, scheme.summary, scheme.calibration, _export(scheme))
    show(table)
    for line in broken("schemes"):
        complain(line)


def _export(scheme: "Scheme") -> str:
    if scheme.export_obstacle() is not None:
        return "no"
    return "by model" if scheme.method is not None and scheme.method.smooths else "yes"
