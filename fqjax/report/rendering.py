"""A table of rich outside the terminal: as plain text, and as HTML for notebooks."""

import copy
import html
import io

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 10_000
"""Columns that plain text may take: more than any table does, so that nothing is cut."""


def as_text(table: Table) -> str:
    """The table as plain text of the width that its content takes; its caption in lines as they are."""
    above = copy.copy(table)
    above.caption = None
    console = Console(file=io.StringIO(), width=WIDEST, color_system=None, force_terminal=False)
    with console.capture() as written:
        console.print(above)
    lines = [*written.get().strip("\n").split("\n"), *_plain(table.caption).split("\n")]
    return "\n".join(line.rstrip() for line in lines)


def width_of(table: Table, least: int) -> int:
    """Columns that the table takes with nothing cut in the columns that are not folded, of which others get ``least``."""
    whole = [[column.header, *column.cells] for column in table.columns if column.no_wrap]
    texts = [max(cell_len(_plain(cell)) for cell in cells) for cells in whole]
    count, edges = len(table.columns), 2
    return (
        sum(texts) + least * (count - len(whole)) + 3 * count + edges
    )  # A column has a space on both sides, and a line.


def as_html(table: Table) -> str:
    """The table as an element of HTML, its title above it and its caption below it."""
    heads = "".join(_cell("th", column.header, column.justify) for column in table.columns)
    lines = zip(*(column.cells for column in table.columns), strict=True)
    cells = (
        "".join(_cell("td", cell, column.justify) for cell, column in zip(line, table.columns, strict=True))
        for line in lines
    )
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    title, below = (html.escape(_plain(text)) for text in (table.title, table.caption))
    below = below.replace("\n", "<br>")
    shown = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div><p><b>{title}</b></p>{shown}<p>{below}</p></div>"


def _cell(kind: str, content: object, justify: str) -> str:
    return f'<{kind} style="text-align: {justify}">{html.escape(_plain(content))}</{kind}>'


def _plain(content: object) -> str:
    """What a table holds, without rich's markup."""
    if content is None:
        return ""
    return (content if isinstance(content, Text) else Text.from_markup(str(content))).plain
