"""What a user has to know of an input that is used all the same: one line in the log, once."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator

logger = logging.getLogger("fqjax")

_held = contextvars.ContextVar[list[str] | None]("held", default=None)


def say_once(line: str) -> None:
    """Logs a warning, unless the same has been logged: a conversion looks at the same files several times."""
    held = _held.get()
    if held is None:
        _say(line)
    else:
        held.append(line)


@contextlib.contextmanager
def held() -> Iterator[list[str]]:
    """Holds back what is said for as long as it lasts, in the list that it gives; whoever holds it says it, or drops it."""
    lines: list[str] = []
    token = _held.set(lines)
    try:
        yield lines
    finally:
        _held.reset(token)


@contextlib.contextmanager
def said_at_the_end() -> Iterator[None]:
    """Says what there is to say when all is done; nothing if it ends in an error, which is the one line then."""
    with held() as lines:
        yield
    for line in lines:
        say_once(line)


@functools.lru_cache(maxsize=1024)
def _say(line: str) -> None:
    logger.warning(line)
