"""``fqjax schemes``: the presets."""

from fqjax.cli.app import app, console
from fqjax.scheme import PRESETS


@app.command()
def schemes() -> None:
    """List the presets: what each is, what it costs."""
    from rich.table import Table

    table = Table()
    table.add_column("scheme", no_wrap=True)
    table.add_column("what it is")
    for preset in PRESETS.values():
        table.add_row(preset.name, preset.summary)
    console.print(table)
