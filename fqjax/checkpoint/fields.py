"""Entries of JSON files against the types that a dataclass declares, and against the ranges that sizes can have.

A configuration that is wrong in one number could ask for terabytes, or for a loop without end, long before the shapes of
the tensors show that it is wrong; so every number is looked at first.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fqjax.runtime.errors import InputError

SIZES = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "ffn_dim",
        "word_embed_proj_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "decoder_sparse_step",
        "out_features",
        "in_features",
        "width",
    }
)
"""Whole numbers that are the lengths of arrays' axes, or factors of them."""

MOST_LAYERS, MOST_EXPERTS, LARGEST_SIZE, LARGEST_INDEX = 10_000, 1024, 2**24, 2**31 - 1
"""The most that a number of layers (or of labels), of experts in one, a size, or a token or position may be."""

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "an object",
}


def check_fields(where: str, cls: type, values: Mapping[str, Any], *, optional: bool = False) -> None:
    """Checks values against the fields of a dataclass: their names, types and ranges.

    Args:
      where: the file, and what in it, for the message.
      cls: the dataclass.
      values: by name, as JSON gives them.
      optional: whether fields may be absent or null, and others be there; fields that are tuples are then passed over.

    Raises:
      InputError: naming the field, its value, and what was expected.
    """
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    names = {field.name for field in fields}
    if not optional:
        for name in values:
            if name not in names:
                raise InputError(f"{where}: unknown entry {name!r}; expected some of {', '.join(sorted(names))}")
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        value = values.get(field.name)
        if field.name not in values:
            if required and not optional:
                raise InputError(f"{where}: no entry {field.name!r}; expected {_words(hints[field.name])}")
        elif not optional or (value is not None and typing.get_origin(hints[field.name]) is not tuple):
            check_value(where, field.name, value, hints[field.name])


def check_value(where: str, name: str, value: Any, hint: Any) -> None:
    """Checks one value's type and range.

    Args:
      where: as in :func:`check_fields`.
      name: the entry's; from it follows the range: sizes, epsilons and rotary bases are positive.
      value: as JSON gives it, lists for tuples.
      hint: its type: int, float, bool, str, dict, a Literal, a tuple, or a union of some of them.

    Raises:
      InputError: naming the entry, its value, and what was expected.
    """
    if not _fits(value, hint):
        raise InputError(f"{where}: {name} {_short(value)}: expected {_words(hint)}")
    for number in _numbers(value):
        whole = type(number) is int and not _fits(0.5, hint)
        low, high = _range(name, whole)
        if not low <= number <= high:
            raise InputError(f"{where}: {name} {_short(value)}: expected {_bounds(low, high)}")


def check_depth(where: str, config: Any, arrays: int) -> None:
    """Refuses a configuration with more layers than there are arrays to fill them, before a model of that depth is built.

    Raises:
      InputError: naming both numbers.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > arrays:
        raise InputError(f"{where}: num_hidden_layers {layers}: expected fewer, as the checkpoint has {arrays} arrays")


def check_counts(where: str, content: Any) -> None:
    """Refuses a count of layers or labels, however deep inside, so large that reading it would take for ever.

    Raises:
      InputError: naming the entry.
    """
    entries = content.items() if isinstance(content, dict) else ((None, item) for item in content)
    for name, value in entries:
        if isinstance(value, dict | list):
            check_counts(where, value)
        elif isinstance(value, int | float) and name is not None and ("layer" in name or name == "num_labels"):
            if not abs(value) <= MOST_LAYERS:
                raise InputError(f"{where}: {name} {_short(value)}: expected {MOST_LAYERS} at most")


def _fits(value: Any, hint: Any) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value is None or isinstance(value, bool | int | float | str)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if options[-1] is Ellipsis:
            return all(_fits(item, options[0]) for item in value)
        return len(value) == len(options) and all(map(_fits, value, options))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (origin or hint)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _range(name: str, whole: bool) -> tuple[float, float]:
    """Least and largest, both allowed."""
    if not whole:
        positive = name.endswith("_eps") or name == "rope_theta"
        return math.ulp(0.0) if positive else -1e30, 1e30
    if name == "num_hidden_layers":
        return 1, MOST_LAYERS
    if name in ("num_experts", "num_local_experts"):
        return 1, MOST_EXPERTS
    if name in SIZES:
        return 1, LARGEST_SIZE
    if name == "max_position_embeddings":
        return 1, LARGEST_INDEX
    return (-LARGEST_INDEX, LARGEST_INDEX) if name.endswith("token_id") else (-(2**53), 2**53)


def _bounds(low: float, high: float) -> str:
    if isinstance(high, int):
        return f"a whole number from {low} to {high}"
    return "a finite number above 0" if low > 0 else "a finite number"


def _words(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in options)
    if origin is Literal:
        return " or ".join(repr(option) for option in options)
    if origin in (tuple, list):
        return "a list" if options[0] is Any or typing.get_origin(options[0]) else f"a list, each {_words(options[0])}"
    return WORDS.get(origin or hint, "another type")


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "too large a number"
    return text if len(text) <= 60 else f"{text[:57]}..."
