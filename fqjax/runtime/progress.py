"""Progress on the terminal: what is being done, how far it is, how long it will take."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

EVERY = 5.0
"""Seconds between lines where there is no terminal."""


_part = contextvars.ContextVar("part", default="")


@contextlib.contextmanager
def part_of_all(label: str) -> Iterator[None]:
    """Puts a label before what is being done, for as long as it lasts: which part of a longer work it belongs to."""
    token = _part.set(f"{label}: ")
    try:
        yield
    finally:
        _part.reset(token)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yields the items, and shows on stderr how far they are.

    On a terminal that is a bar with the time left.  Elsewhere, in a file, a job's log or a notebook, it is a line when an
    item is done, at most one every :data:`EVERY` seconds, and one at the end; none for what is done before the first of
    them is due.

    Args:
      what: is being done with them.
      total: how many they are, where they have no length.
    """
    total = total if total is not None else _length(items)
    console, what = Console(stderr=True), f"{_part.get()}{what}"
    return _with_bar(console, items, what, total) if console.is_terminal else _with_lines(items, what, total)


def _with_bar(console: Console, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)


def _with_lines(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    start = last = now = time.monotonic()
    count = said = 0
    for item in items:
        yield item
        count, now = count + 1, time.monotonic()
        if now - last >= EVERY:
            last, said = now, count
            _say(what, count, total, now - start)
    if said and said < count:
        _say(what, count, total, now - start)


def _say(what: str, count: int, total: int | None, seconds: float) -> None:
    """Prints a line, if that can be."""
    left = "" if total is None or count >= total else f", about {seconds / count * (total - count):.0f} s left"
    with contextlib.suppress(OSError, ValueError):  # A stream that is closed or full.
        print(f"{what} {count}{f'/{total}' if total else ''}, {seconds:.0f} s{left}", file=sys.stderr, flush=True)


def _length(items: Iterable[object]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
