"""``fqjax schemes``: the presets, and the schemes of other packages."""

from typing import TYPE_CHECKING

from fqjax.cli.app import app, console
from fqjax.cli.terminal import complain

if TYPE_CHECKING:
    from fqjax.scheme import Scheme


@app.command()
def schemes() -> None:
    """List the schemes: what each is, whether it needs calibration data, and whether it can be exported."""
    from rich.table import Table

    from fqjax.presets import all_schemes
    from fqjax.registry import broken

    table = Table()
    table.add_column("scheme", no_wrap=True)
    table.add_column("what it is")
    table.add_column("calibration")
    table.add_column("export", no_wrap=True)
    table.caption = (
        "export: in the format compressed-tensors. By model: where smoothing can be folded; convert --dry-run tells."
    )
    for scheme in all_schemes().values():
        table.add_row(scheme.name, scheme.summary, scheme.calibration, _export(scheme))
    console.print(table)
    for line in broken("schemes"):
        complain(line)


def _export(scheme: "Scheme") -> str:
    if scheme.export_obstacle() is not None:
        return "no"
    return "by model" if scheme.method is not None and scheme.method.smooths else "yes"
