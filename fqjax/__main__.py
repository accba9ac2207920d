"""``python -m fqjax``: the command line without an installed script."""

from fqjax.cli import run

run()
