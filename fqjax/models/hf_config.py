"""Checks of Hugging Face configurations that the families share."""

from collections.abc import Iterable
from typing import Annotated, Any

from annotated_types import Gt

from fqjax.runtime.errors import InputError
from fqjax.runtime.validation import Size, check_value

WHERE = "config.json"


def sizes(hf: dict[str, Any], *names: str) -> dict[str, int]:
    """The entries of these names.

    Raises:
      InputError: naming one that is not a whole number above 0.
    """
    return {name: check_value(Size, hf[name], WHERE, name) for name in names}


def check_divides(hf: dict[str, Any], divisor: str, of: str) -> None:
    """Checks that one size is a multiple of another.

    Raises:
      InputError: naming both.
    """
    if hf[of] % hf[divisor]:
        raise InputError(f"{WHERE}: {of} {hf[of]}: expected a multiple of {divisor} {hf[divisor]}")


def check_choice(hf: dict[str, Any], name: str, supported: Iterable[str]) -> None:
    """Checks that an entry is one of those that a family's code covers.

    Raises:
      InputError: naming the entry and what is supported.
    """
    if hf[name] not in supported:
        expected = ", ".join(map(repr, supported))
        raise InputError(f"{WHERE}: {name} {hf[name]!r} is not supported; expected {expected}")


def check_number(name: str, value: Any, above: float = 0) -> None:
    """Checks that an entry is a finite number above a bound.

    Raises:
      InputError: naming the entry and the bound.
    """
    check_value(Annotated[float, Gt(above)], value, WHERE, name)
