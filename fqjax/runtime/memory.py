"""Memory that was freed, given back to the system, where whoever owns the process asks for it."""

import contextlib
import contextvars
import ctypes
import functools
import os
from collections.abc import Callable, Iterator

_giving_back = contextvars.ContextVar("giving_back", default=False)


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """Lets :func:`give_back` do its work for as long as it lasts: a conversion is to stay small, a library call to itself."""
    token = _giving_back.set(True)
    try:
        yield
    finally:
        _giving_back.reset(token)


def give_back() -> None:
    """Has the C library return what it keeps of freed memory for later use, which can be as much as a block of the model.

    Does nothing outside :func:`giving_back`, or where the C library is another one than glibc.
    """
    trim = _malloc_trim() if _giving_back.get() else None
    if trim is not None:
        trim(0)


def memory_bytes() -> int | None:
    """Bytes of memory of the default device, or of the machine where that is a CPU; None where they are not known."""
    import jax

    known = jax.devices()[0].memory_stats()  # None on a CPU.
    if known and "bytes_limit" in known:
        return int(known["bytes_limit"])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
