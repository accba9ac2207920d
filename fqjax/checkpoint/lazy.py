"""transformers, imported on first use: it takes a second, and most commands can fail before that."""

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def import_transformers() -> ModuleType:
    """The transformers package, without the advice on import to install PyTorch, which fqjax does not use."""
    quiet = _ADVICE in os.environ
    os.environ.setdefault(_ADVICE, "1")
    try:
        import transformers
    finally:
        if not quiet:
            del os.environ[_ADVICE]
    return transformers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """The same, and for as long as it lasts transformers warns of nothing: what is wrong ends in one line of fqjax's own."""
    transformers = import_transformers()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(level)
