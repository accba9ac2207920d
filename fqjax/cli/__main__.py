"""``python -m fqjax.cli``: the command line without an installed script."""

from fqjax.cli import run

run()
