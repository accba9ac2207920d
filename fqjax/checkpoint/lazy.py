"""transformers, imported on first use: it takes a second, and most commands can fail before that."""

import os
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
