"""What a user has to know of an input that is used all the same: one line in the log, once."""

import functools
import logging

logger = logging.getLogger("fqjax")


@functools.lru_cache(maxsize=1024)
def say_once(line: str) -> None:
    """Logs a warning, unless the same has been logged: a conversion looks at the same files several times."""
    logger.warning(line)
