"""Checks of Hugging Face configurations that the families share."""

from collections.abc import Collection, Mapping
from typing import Annotated, cast

from annotated_types import Gt

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonMapping
from fqjax.runtime.validation import Size, check_value

WHERE = "config.json"


def sizes(hf: JsonMapping, *names: str) -> dict[str, int]:
    """The entries of these names.

    Raises:
      InputError: naming one that is not a whole number above 0.
    """
    return {name: check_value(Size, hf[name], WHERE, name) for name in names}


def check_divides(hf: Mapping[str, int], divisor: str, of: str) -> None:
    """Checks that one size is a multiple of another.

    Raises:
      InputError: naming both.
    """
    if hf[of] % hf[divisor]:
        raise InputError(f"{WHERE}: {of} {hf[of]}: expected a multiple of {divisor} {hf[divisor]}")


def check_choice(hf: JsonMapping, name: str, supported: Collection[str]) -> None:
    """Checks that an entry is one of those that a family's code covers.

    Raises:
      InputError: naming the entry and what is supported.
    """
    if hf[name] not in supported:
        expected = ", ".join(map(repr, supported))
        raise InputError(f"{WHERE}: {name} {hf[name]!r} is not supported; expected {expected}")


def token_id(hf: JsonMapping, name: str) -> int | None:
    """The token of this name; None where there is none."""
    return cast(int | None, hf.get(name))


def check_number(name: str, value: object, above: float = 0) -> None:
    """Checks that an entry is a finite number above a bound.

    Raises:
      InputError: naming the entry and the bound.
    """
    check_value(Annotated[float, Gt(above)], value, WHERE, name)
