"""Checks of Hugging Face configurations that the families share."""

import math
from collections.abc import Iterable
from typing import Any

from fqjax.runtime.errors import InputError


def sizes(hf: dict[str, Any], *names: str) -> dict[str, int]:
    """The entries of these names.

    Raises:
      InputError: naming one that is not a whole number above 0.
    """
    for name in names:
        value = hf[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"config.json: {name} {value!r}: expected a whole number above 0")
    return {name: hf[name] for name in names}


def check_divides(hf: dict[str, Any], divisor: str, of: str) -> None:
    """Checks that one size is a multiple of another.

    Raises:
      InputError: naming both.
    """
    if hf[of] % hf[divisor]:
        raise InputError(f"config.json: {of} {hf[of]}: expected a multiple of {divisor} {hf[divisor]}")


def check_choice(hf: dict[str, Any], name: str, supported: Iterable[str]) -> None:
    """Checks that an entry is one of those that a family's code covers.

    Raises:
      InputError: naming the entry and what is supported.
    """
    if hf[name] not in supported:
        expected = ", ".join(map(repr, supported))
        raise InputError(f"config.json: {name} {hf[name]!r} is not supported; expected {expected}")


def check_number(name: str, value: Any, above: float = 0) -> None:
    """Checks that an entry is a finite number above a bound.

    Raises:
      InputError: naming the entry and the bound.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= above:
        raise InputError(f"config.json: {name} {value!r}: expected a number above {above}")
