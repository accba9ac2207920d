"""Memory that was freed, given back to the system."""

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Has the C library return what it keeps of freed memory for later use, which can be as much as a block of the model.

    Does nothing where the C library is another one than glibc.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
