"""Names that were misspelt."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> list[str]:
    """The part of a message that gives the nearest of the known names; empty where none is near."""
    return [f"did you mean {near!r}?" for near in difflib.get_close_matches(str(name), list(known), 1)]
