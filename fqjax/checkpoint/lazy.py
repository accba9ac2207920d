"""transformers, imported on first use: it takes a second, and most commands can fail before that."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

from fqjax.runtime.quiet import muted


@contextlib.contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """The transformers package, which as long as it lasts warns of nothing: what is wrong ends in one line of fqjax's own."""
    with muted("transformers"):  # Nor does it advise on import to install PyTorch, which fqjax does not use.
        import transformers
    with muted("transformers"):  # By its handlers as well, which it has once it is imported.
        yield transformers
