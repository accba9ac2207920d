"""Other packages' messages, dropped where what is wrong ends in one line of fqjax's own; the process stays as it was."""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def muted(*names: str) -> Iterator[None]:
    """Drops what is logged to some loggers, for as long as it lasts, and what their handlers get from loggers below them."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    loggers = [logging.getLogger(name) for name in names]
    places = [place for logger in loggers for place in (logger, *logger.handlers)]
    for place in places:
        place.addFilter(nothing)
    try:
        yield
    finally:
        for place in places:
            place.removeFilter(nothing)


def collect_late_reads() -> None:
    """Collects the remains of a failed load: reads that end after it closed their event loop, and complain of that.

    Anything else that cannot be raised meanwhile is still reported as ever.
    """
    hook = sys.unraisablehook

    def others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != CLOSED_LOOP_MESSAGE:
            hook(unraisable)

    sys.unraisablehook = others
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


CLOSED_LOOP_MESSAGE = "Event loop is closed"
"""The message with which such reads complain."""
