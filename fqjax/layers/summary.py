"""How layers are spoken of: the scheme that one was quantized with, and what is shown of one that is printed."""

import dataclasses
import json
from collections.abc import Generator, Iterable
from typing import Any

UNKNOWN = "unknown"

HIDDEN = ("record",)
"""Attributes that are not printed: figures in an encoding that nobody reads; the report has them."""


def scheme_name(recipe: str) -> str:
    """The name of the scheme that a recipe is of, where it is one that this fqjax writes."""
    try:
        return str(json.loads(recipe)["name"])
    except (ValueError, TypeError, KeyError):
        return UNKNOWN


def shortened(parts: Iterable[Any]) -> Generator[Any, None, None]:
    """What Flax prints of a layer, without what the layer does not have, and with names in place of whole schemes.

    Args:
      parts: as ``nnx.Module.__nnx_repr__`` gives them: a heading, then attributes with a ``key`` and a ``value``.
    """
    for part in parts:
        key, value = getattr(part, "key", None), getattr(part, "value", None)
        if key == "recipe" and isinstance(value, str):
            yield dataclasses.replace(part, key="scheme", value=scheme_name(value))
        elif key == "recipes" and isinstance(value, tuple):
            yield dataclasses.replace(part, key="scheme", value=", ".join(dict.fromkeys(map(scheme_name, value))))
        elif key is None or not (key in HIDDEN or value is None or value == ()):
            yield part
