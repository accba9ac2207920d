"""Checks of single fields of a request's body; each error names the field, its value, and what was expected."""

from collections.abc import Mapping
from typing import Any

from fqjax.runtime.arguments import check_flag, check_number, check_whole, shown
from fqjax.runtime.errors import InputError
from fqjax.server.errors import ApiError

MOST_STOPS, LONGEST_STOP = 16, 1000
"""Strings that stop a text, and characters of one: all are looked for at every token."""


class Fields:
    """A body's fields, those that are null left out, as the interface counts them as not given.

    Args:
      body: the JSON that came.
      known: names of the fields that mean something.
      ignored: names of those that change nothing.
    """

    def __init__(self, body: object, known: frozenset[str], ignored: frozenset[str]):
        if not isinstance(body, Mapping):
            raise ApiError(400, "expected a JSON object with the fields of a request")
        for name in body:
            if name not in known and name not in ignored:
                raise ApiError(400, f"{shown(name)}: no field of this call; expected none of that name", str(name))
        self._given: Mapping[str, Any] = {name: value for name, value in body.items() if value is not None}

    def get(self, name: str) -> Any:
        """A field as it came; None if it did not."""
        return self._given.get(name)

    def whole(self, name: str, default: Any, least: int | None = None, most: int | None = 2**31 - 1) -> Any:
        """A whole number."""
        if name not in self._given:
            return default
        value = self._given[name]
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        return self._check(name, lambda: check_whole(name, value, least, most))

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        if name not in self._given:
            return default
        return self._check(name, lambda: check_number(name, self._given[name]))

    def flag(self, name: str) -> bool:
        """Whether something is asked for; by default it is not."""
        if name not in self._given:
            return False
        if not isinstance(self._given[name], bool):
            raise ApiError(400, f"{name} {shown(self._given[name])}: expected true or false", param=name)
        return check_flag(name, self._given[name])

    def stops(self) -> tuple[str, ...]:
        """Strings that stop the text."""
        given = self._given.get("stop", [])
        stops = [given] if isinstance(given, str) else given
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ApiError(400, f"stop {shown(given)}: expected a text, or a list of texts", param="stop")
        if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
            most = f"at most {MOST_STOPS} texts of {LONGEST_STOP} characters"
            raise ApiError(400, f"stop: expected {most}", param="stop")
        return tuple(stop for stop in stops if stop)

    def refuse(self, name: str, *neutral: object) -> None:
        """Refuses a field of the interface that is not supported, but for values that ask for nothing."""
        value = self._given.get(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral):
            raise ApiError(400, f"{name}: not supported by this server", param=name, code="unsupported_parameter")

    @staticmethod
    def _check(name: str, check: Any) -> Any:
        try:
            return check()
        except InputError as error:
            raise ApiError(400, str(error), param=name) from None
