"""Values of the store as arrays and JSON: what is kept needs no code of its own.

A value is any nest of lists, tuples, dictionaries, numbers, texts and None, arrays, stored types
(:class:`fqjax.core.table.Stored`), configs of formats, and the few dataclasses in :data:`RECORDS`.  Arrays go into a
safetensors file, all else as JSON into its header.  Nothing that is read names code: types are looked up by kind.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fqjax.core.formats.base import Format
from fqjax.core.layer import LayerPlan
from fqjax.core.table import Stored, stored_type
from fqjax.layers.record import Figures
from fqjax.registry import from_json, to_json
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import whole

T = TypeVar("T")

RECORDS: dict[str, type] = {cls.__name__: cls for cls in (LayerPlan, Figures)}
"""Dataclasses that may be kept, by name; :func:`keepable` adds to them."""

STRUCTURE_ENTRY = "structure"
"""Entry of a file's header that says what its arrays are."""


def keepable(cls: type[T]) -> type[T]:
    """Declare a dataclass, as a decorator, that may be kept in the store."""
    RECORDS[cls.__name__] = cls
    return cls


def write_value(path: Path, value: object) -> None:
    """Write a value to a file, which is either complete or absent.

    Raises:
      CannotWrite: if it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    structure = _encoded(value, arrays)
    with whole(path) as file:
        file.write(save(arrays, {STRUCTURE_ENTRY: json.dumps(structure)}))


def read_value(path: Path) -> Any:
    """Read what :func:`write_value` wrote.

    Raises:
      InputError: if the file is damaged.
    """
    try:
        with safe_open(path, "np") as file:
            structure = json.loads((file.metadata() or {})[STRUCTURE_ENTRY])
            return _decoded(structure, {name: file.get_tensor(name) for name in file.keys()})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); remove {path.parent}, and begin anew") from None


def _encoded(value: object, arrays: dict[str, np.ndarray]) -> object:
    """A value as JSON; its arrays are added to ``arrays``."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.ndarray() | jax.Array() | np.generic():
            name = str(len(arrays))
            arrays[name] = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
            return {"array": name}
        case tuple() | list():
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [_encoded(item, arrays) for item in value]}
        case Mapping():
            return {"dict": [[_encoded(key, arrays), _encoded(item, arrays)] for key, item in value.items()]}
        case Stored():
            return {"stored": value.kind, "fields": _fields(value, arrays)}
        case Format():
            return {"format": to_json(value)}
        case _ if type(value).__name__ in RECORDS:
            return {"record": type(value).__name__, "fields": _fields(value, arrays)}
    raise TypeError(f"{type(value).__name__}: not a value that the store can keep")


def _fields(value: Any, arrays: dict[str, np.ndarray]) -> dict[str, object]:
    return {field.name: _encoded(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}


def _decoded(structure: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Undo :func:`_encoded`."""
    match structure:
        case {"array": name}:
            return arrays[name]
        case {"tuple": items}:
            return tuple(_decoded(item, arrays) for item in items)
        case {"list": items}:
            return [_decoded(item, arrays) for item in items]
        case {"dict": pairs}:
            return {_decoded(key, arrays): _decoded(item, arrays) for key, item in pairs}
        case {"stored": kind, "fields": fields}:
            found = {name: _decoded(field, arrays) for name, field in fields.items()}
            return stored_type(kind)(
                **{n: jnp.asarray(v) if isinstance(v, np.ndarray) else v for n, v in found.items()}
            )
        case {"format": described}:
            return from_json("formats", described)
        case {"record": name, "fields": fields}:
            return RECORDS[name](**{key: _decoded(field, arrays) for key, field in fields.items()})
        case dict() | list():
            raise ValueError(f"no structure of a value: {json.dumps(structure)[:80]}")
    return structure
