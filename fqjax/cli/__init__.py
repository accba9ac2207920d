"""The command line."""

from fqjax.cli.main import run

__all__ = ["run"]
