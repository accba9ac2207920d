"""Validation of JSON values against type hints, by pydantic, with errors of one line.

A configuration that is wrong in one number could ask for terabytes, or for a loop without end, long before the shapes of
the tensors show that it is wrong; so sizes carry their ranges in their types (:data:`Size` and those below it).

Nothing is converted that JSON can tell apart: ``true`` is no number, ``1.0`` no whole number, ``"1"`` neither; unknown
entries are refused.  Lists become tuples and objects dataclasses where the hint says so, whole numbers become floats.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le

from fqjax.runtime.errors import InputError
from fqjax.runtime.names import did_you_mean

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

MAX_LAYERS, MAX_EXPERTS, MAX_SIZE, MAX_INDEX, MAX_FLOAT = 10_000, 1024, 2**24, 2**31 - 1, 1e30
"""Largest number of layers (or labels), of experts in one layer, axis length, token id or position, and float."""

Size = Annotated[int, Ge(1), Le(MAX_SIZE)]
"""The length of an array's axis, or a factor of it."""
LayerCount = Annotated[int, Ge(1), Le(MAX_LAYERS)]
ExpertCount = Annotated[int, Ge(1), Le(MAX_EXPERTS)]
PositionCount = Annotated[int, Ge(1), Le(MAX_INDEX)]
TokenId = Annotated[int, Ge(-MAX_INDEX), Le(MAX_INDEX)]
Count = Annotated[int, Ge(0), Le(2**53)]
"""A number that every JSON reader keeps exactly."""
Finite = Annotated[float, Ge(-MAX_FLOAT), Le(MAX_FLOAT)]
Positive = Annotated[float, Gt(0), Le(MAX_FLOAT)]
Scalar = bool | int | Finite | str | None

T = TypeVar("T")
Schema = Mapping[str, Any]
"""A JSON schema, as pydantic describes a hint."""

TYPE_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "an object",
}
BOUND_WORDS = {
    "exclusiveMinimum": "above",
    "minimum": "of at least",
    "exclusiveMaximum": "below",
    "maximum": "of at most",
}
"""Words for the entries of a JSON schema."""


def validated(cls: type[T], mapping: Mapping[str, object], where: str) -> T:
    """An instance of a dataclass from the entries of a JSON object.

    Args:
      cls: a dataclass; its fields may be dataclasses, too, and carry ranges (``Annotated[int, Ge(1)]``).
      mapping: the fields' values by name, as JSON gives them, or with tuples for lists.
      where: the file, and the object in it, for the message.

    Raises:
      InputError: naming the first entry at fault by its dotted path, its value, and the kind of value expected.  An error
        that the dataclass raises itself is passed on after ``where``.
    """
    return _read(cls, mapping, where, "")


def check_value(hint: object, value: object, where: str, name: str) -> Any:
    """A single entry's value, converted as in :func:`validated`.

    Args:
      hint: its type: a class, a union, a ``Literal``, with or without ranges.
      value: as JSON gives it.
      where: the file, and the object in it, for the message.
      name: the entry's.

    Raises:
      InputError: naming the entry, its value, and the kind of value expected.
    """
    return _read(hint, value, where, name)


def check_given(cls: type, mapping: Mapping[str, object], where: str) -> None:
    """Checks those entries of an object that are fields of a dataclass, not null and not lists; all may be absent.

    Raises:
      InputError: as in :func:`validated`.
    """
    for name, hint in _scalar_hints(cls).items():
        if mapping.get(name) is not None:
            check_value(hint, mapping[name], where, name)


@functools.cache
def _scalar_hints(cls: type) -> dict[str, object]:
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: hints[name] for name in names if get_origin(hints[name]) is not tuple}


def _read(hint: object, value: object, where: str, name: str) -> Any:
    from pydantic import ValidationError

    adapter = _adapter(hint)
    try:
        text = json.dumps([value])
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {name or 'value'} is not valid JSON ({error})") from None
    try:
        return adapter.validate_json(text, strict=True)[0]
    except ValidationError as error:
        raise InputError(_message(error, adapter, value, where, name)) from None


@functools.cache
def _adapter(hint: object) -> "TypeAdapter[tuple[Any]]":
    from pydantic import ConfigDict, TypeAdapter

    # Within a tuple, since a dataclass by itself takes its configuration from the class alone.
    return TypeAdapter(tuple[hint], config=ConfigDict(extra="forbid", allow_inf_nan=False))  # pyright: ignore[reportInvalidTypeForm]


def _message(error: "ValidationError", adapter: "TypeAdapter[tuple[Any]]", value: Any, where: str, name: str) -> str:
    """One line on the first of pydantic's findings: the entry's dotted path, its value, and the kind of value expected."""
    first = error.errors(include_url=False)[0]
    whole, kind, location = adapter.json_schema(), first["type"], first["loc"][1:]
    about_entry = kind in ("missing", "unexpected_keyword_argument")
    path, schema, declared = _follow(
        whole["prefixItems"][0], whole.get("$defs", {}), location[:-1] if about_entry else location
    )
    path = [part for part in (name, *path) if part != ""]
    if about_entry and "properties" in schema:
        entry, known = str(location[-1]), schema["properties"]
        inside = ": ".join(filter(None, (where, _dotted(path))))
        if kind == "missing":
            return f"{inside}: no entry {entry!r}; expected {_words(known[entry])}"
        return f"{inside}: unknown entry {entry!r}; expected some of {', '.join(sorted(known))}"
    for part in path[1:] if name else path:
        value = value[part]
    reason = str(first.get("ctx", {}).get("error"))
    if kind == "json_invalid":
        return f"{where}: {name or 'value'} is not valid JSON ({reason})"
    if kind == "value_error":
        return ": ".join(filter(None, (where, _dotted(path), reason)))
    return f"{where}: {' '.join(filter(None, (_dotted(path), _short(value))))}: expected {_words(declared)}"


def _follow(
    schema: Schema, definitions: Mapping[str, Schema], location: Sequence[int | str]
) -> tuple[list[int | str], Schema, Schema]:
    """The path to the innermost object or entry that a location names; lists of plain values end it.

    Returns:
      The path, the object's own schema, and the schema that the entry is declared with, which admits others as well.
    """
    path: list[int | str] = []
    declared = schema
    schema, *others = _objects(schema, definitions) or [schema]
    for part in location:
        if others:  # pydantic names the member of a union that it tried.
            schema = next((option for option in (schema, *others) if option.get("title") == part), schema)
            others = []
            continue
        inner = schema.get("properties", {}).get(part)
        if inner is None and isinstance(part, int) and _objects(schema.get("items", {}), definitions):
            inner = schema["items"]
        if inner is None:
            break
        path.append(part)
        declared = inner
        schema, *others = _objects(inner, definitions) or [inner]
    return path, schema, declared


def _objects(schema: Schema, definitions: Mapping[str, Schema]) -> list[Schema]:
    """Those of the schema's alternatives that are objects with entries of their own."""
    options = schema.get("anyOf") or schema.get("oneOf") or [schema]
    resolved = [definitions[o["$ref"].rpartition("/")[2]] if "$ref" in o else o for o in options]
    return [option for option in resolved if "properties" in option]


def _dotted(path: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _words(schema: Schema) -> str:
    """The kind of value that a schema admits, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_words, schema["anyOf"])))
    if "const" in schema or "enum" in schema:
        return " or ".join(map(repr, schema.get("enum") or [schema["const"]]))
    kind = schema.get("type", "object")
    if kind == "array":
        item = schema.get("items", {})
        return f"a list, each {_words(item)}" if item.get("type", "array") != "array" else "a list"
    number = "a finite number" if schema.get("maximum") == MAX_FLOAT else TYPE_WORDS.get(kind, "another type")
    bounds = {key: schema[key] for key in BOUND_WORDS if abs(schema.get(key, MAX_FLOAT)) < MAX_FLOAT}
    if {"minimum", "maximum"} <= bounds.keys():
        return f"{number} from {bounds['minimum']} to {bounds['maximum']}"
    return " ".join([number, " and ".join(f"{BOUND_WORDS[key]} {limit}" for key, limit in bounds.items())]).rstrip()


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "too large a number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_setting(hint: object, value: object, name: str) -> object:
    """A single setting's value, converted as in :func:`validated`; numbers of NumPy's become Python's.

    Raises:
      InputError: as ``NAME=VALUE: expected`` and the kind of value that the hint admits.
    """
    adapter = _adapter(hint)
    try:
        return adapter.validate_json(json.dumps([value], default=_of_numpy), strict=True)[0]
    except (TypeError, ValueError, RecursionError):  # pydantic's errors are of the second kind.
        text = value if isinstance(value, str) and value.isprintable() else _short(value)
        schema = adapter.json_schema()["prefixItems"][0]
        words = _words(schema).replace(TYPE_WORDS["null"], "none")
        raise InputError("; ".join([f"{name}={text}: expected {words}", *did_you_mean(text, _names(schema))])) from None


def _names(schema: Schema) -> list[str]:
    """The texts that a schema lists as the values it admits."""
    options = schema.get("anyOf", [schema])
    listed = [value for option in options for value in option.get("enum", [option.get("const")])]
    return [value for value in listed if isinstance(value, str)]


def _of_numpy(value: object) -> object:
    """The number of Python's for one of NumPy's, which JSON has no word for and whose sums can overflow.

    Raises:
      TypeError: for anything else.
    """
    import numpy as np

    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not valid JSON")
