"""Panics of libraries written in Rust: they are no ``Exception``, and print to standard error by themselves."""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

from fqjax.runtime.files import reason

STANDARD_ERROR = 2
"""Number of the file that such libraries print to."""

_one_at_a_time = threading.RLock()
"""Held while standard error leads elsewhere: two threads could not put it back in order."""


class Panicked(Exception):
    """A library panicked."""


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises :class:`Panicked` for a panic, and drops what the library printed about it.

    What is printed to standard error meanwhile appears afterwards, if there was no panic.
    """
    with _one_at_a_time, _held_back() as printed:
        try:
            yield
        except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # pyo3's PanicException, which has no module to import it from.
            if printed is not None:
                printed.truncate(0)
            raise Panicked(reason(error)) from None


@contextlib.contextmanager
def _held_back() -> Iterator[BinaryIO | None]:
    """Standard error led into a file, which is copied to it in the end; None where there is no standard error."""
    try:
        kept = os.dup(STANDARD_ERROR)
    except OSError:
        yield None
        return
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), STANDARD_ERROR)
            try:
                yield file
            finally:
                _flush()
                os.dup2(kept, STANDARD_ERROR)
                file.seek(0)
                _copy(file.read())
    finally:
        os.close(kept)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()


def _copy(printed: bytes) -> None:
    with contextlib.suppress(OSError):
        while printed:
            printed = printed[os.write(STANDARD_ERROR, printed) :]
