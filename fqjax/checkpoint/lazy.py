"""transformers, imported on first use: it takes a second, and most commands can fail before that."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

from fqjax.runtime.errors import InputError
from fqjax.runtime.quiet import muted


@contextlib.contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """The transformers package, which as long as it lasts warns of nothing: what is wrong ends in one line of fqjax's own.

    Raises:
      InputError: if the operating system keeps it from being imported.
    """
    with muted("transformers"):  # Nor does it advise on import to install PyTorch, which fqjax does not use.
        try:
            import transformers
        except OSError as error:  # It looks for its own sources in the current directory.
            raise InputError(
                f"transformers cannot be imported, as where there is no current directory ({error})"
            ) from None
    with muted("transformers"):  # By its handlers as well, which it has once it is imported.
        yield transformers
