"""The command's standard streams, which may be closed, full, or unable to show a character."""

import contextlib
import io
import logging
import os
import sys

STANDARD_DESCRIPTORS = (0, 1, 2)


def open_streams() -> None:
    """Sees to it that all three streams are there, and take every character.

    The next file that is opened would get the number of a stream that is closed, and what is printed to that.
    """
    for descriptor in STANDARD_DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flushed(last: str = "") -> OSError | None:
    """Hands on what has been printed, and what is to be printed last.

    Returns:
      Why it cannot be, if so; then it is dropped, and whatever is printed from then on.
    """
    try:
        sys.stdout.write(last)
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            empty = os.open(os.devnull, os.O_WRONLY)
            os.dup2(empty, sys.stdout.fileno())
            os.close(empty)
            sys.stdout.flush()
        return error
    return None


def complain(message: str) -> None:
    """Prints one line on standard error, if that can be."""
    with contextlib.suppress(OSError):
        print(f"fqjax: {' '.join(message.split())}", file=sys.stderr, flush=True)


class Complaints(logging.Handler):
    """Prints what is logged as one line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        complain(record.getMessage())


def show_warnings() -> None:
    """Has fqjax's own warnings printed like its errors, however other packages set up the log."""
    logger = logging.getLogger("fqjax")
    logger.addHandler(Complaints())
    logger.propagate = False
