"""``fqjax schemes``: the presets, and the schemes of other packages."""

from fqjax.cli.app import app, console
from fqjax.cli.terminal import complain


@app.command()
def schemes() -> None:
    """List the schemes: what each is, what it costs."""
    from rich.table import Table

    from fqjax.presets import all_schemes
    from fqjax.registry import broken

    table = Table()
    table.add_column("scheme", no_wrap=True)
    table.add_column("what it is")
    table.add_column("calibration")
    for scheme in all_schemes().values():
        table.add_row(scheme.name, scheme.summary, scheme.calibration)
    console.print(table)
    for line in broken("schemes"):
        complain(line)
