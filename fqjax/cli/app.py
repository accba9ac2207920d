"""The command line's application, and what its commands share: arguments, loading, JSON files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from fqjax.cli.usage import Application
from fqjax.runtime.errors import InputError
from fqjax.runtime.results import check_writable_file, write_result
from fqjax.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from fqjax.models.causal_lm import CausalLM

app = Application(
    name="fqjax",
    help="Quantize language models to integers with FlattenQuant, and run them in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

NARROWEST_NAMES = 16
"""Columns of a terminal that names of layers get at least, folded."""


class Interrupted(Exception):
    """Ctrl-C, with what is to be said of it."""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fqjax {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


def _writable(path: Path | None) -> Path | None:
    """Refuses a file that could not be written, before the work whose result it is to hold."""
    if path is not None:
        check_writable_file(path)
    return path


Model = Annotated[str, typer.Argument(help="Directory of a Hugging Face or an fqjax checkpoint, or a hub id.")]

KvCache = Annotated[
    str | None,
    typer.Option(help="int8 for keys and values as INT8 codes; by default in the model's dtype.", metavar="KIND"),
]

AllLayers = Annotated[
    bool, typer.Option("--all-layers", help="A row for every layer, also where many are alike.", show_default=False)
]

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write what is printed to this file.", metavar="FILE", callback=_writable),
]


def known_cache(kind: str | None) -> Literal["int8"] | None:
    """The kind of cache; an unknown one is refused before a model is loaded."""
    if kind is None or kind == "int8":
        return kind
    raise InputError(f"--kv-cache {kind}: expected int8")


def load_model(source: str) -> "CausalLM":
    """The model of a Hugging Face or an fqjax directory, or of a hub id."""
    from fqjax.checkpoint.source import Source

    return Source(source).model()


def load_with_tokenizer(source: str, *, required: bool = True) -> "tuple[CausalLM, Any]":
    """The same with its tokenizer, which is None where there is none and none is required."""
    from fqjax.checkpoint.source import Source

    opened = Source(source)
    # The tokenizer first: what is wrong with it shows before the weights are read.
    tokenizer = opened.tokenizer(required=required)
    return opened.model(), tokenizer


def show(table: "Table") -> None:
    """Prints a table whose first column may be folded, and whose numbers are never cut.

    Where there is no terminal, in a file or a pipe, or one that is too narrow for the numbers, nothing is folded.
    """
    from fqjax.report.rendering import as_text, width_of

    if console.is_terminal and console.width >= width_of(table, least=NARROWEST_NAMES):
        console.print(table)
    else:
        print(as_text(table))


def write_json(path: Path | None, content: Mapping[str, object]) -> None:
    """Writes what ``--json FILE`` asks for, if it was given; the file is whole, or as it was.

    Raises:
      InputError: if the file cannot be written.
    """
    if path is None:
        return
    write_result(path, (json.dumps(content, indent=1) + "\n").encode())
