"""Names of pieces that come from a file of their own, in this package or in another one.

    @fqjax.register                       a format, transform, branch, input quantizer, pass or method, as a decorator
    fqjax.register_scheme(Scheme(...))    a scheme
    fqjax.models.register_family(Family(...))   an architecture of Hugging Face
    [project.entry-points."fqjax.formats"]    so that the command line and ``fqjax.load`` find them
    mine = "my_package"                       a module that registers, or ``my_package:MyFormat``

Built-in pieces and those of entry points are imported when a name is asked for that is not known yet, or all are listed.

A piece that is a frozen dataclass goes into JSON and back by its name: ``{"kind": "grouped", "group_size": 128}``.
"""

import contextlib
import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, overload

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject
from fqjax.runtime.names import did_you_mean
from fqjax.runtime.settings import alternatives, check_field, defaults_of, hints_of, is_part, words_of

ClassT = TypeVar("ClassT", bound=type)
T = TypeVar("T")

GROUPS = {
    "formats": "format",
    "transforms": "transform",
    "branches": "branch",
    "inputs": "input quantizer",
    "finishes": "finish",
    "passes": "pass",
    "methods": "method",
    "schemes": "scheme",
    "families": "family",
}
"""Every group of pieces, with a word for one of them.  Entry points are in ``fqjax.formats`` and so on."""

OBJECTS = {"schemes": "name", "families": "architecture"}
"""Groups whose pieces are objects, not classes, with the attribute that each is looked up by; classes have ``kind``."""

NAME = re.compile(r"[^\W_][\w.-]*")
"""What a piece may be called, beginning with a letter or a digit, so that options and configurations can name it."""

BUILT_IN: dict[str, dict[str, str]] = {
    "formats": {
        "uniform": "fqjax.core.formats.uniform",
        "grouped": "fqjax.core.formats.grouped",
    },
    "transforms": {"diagonal": "fqjax.core.transforms.diagonal"},
    "inputs": {
        "static": "fqjax.core.stored_inputs",
        "per_token": "fqjax.core.stored_inputs",
        "floating": "fqjax.core.stored_inputs",
    },
    "methods": {
        "absmax": "fqjax.methods.absmax",
        "smoothquant": "fqjax.methods.smoothquant",
        "flattenquant": "fqjax.methods.flattenquant",
        "round-to-nearest": "fqjax.methods.round_to_nearest",
        "gptq": "fqjax.methods.gptq",
        "awq": "fqjax.methods.awq",
        "integer-scale": "fqjax.methods.integer_scale",
    },
}
"""The module of every piece of this package, by group and name."""

_registered: dict[str, dict[str, object]] = {group: {} for group in GROUPS}
_broken: dict[str, dict[str, str]] = {}
"""Entry points that could not be loaded, and why, by group and name; a group is there once it has been looked through."""


@overload
def register(piece: ClassT) -> ClassT: ...
@overload
def register(piece: str) -> Callable[[ClassT], ClassT]: ...
def register(piece: ClassT | str) -> ClassT | Callable[[ClassT], ClassT]:
    """Make a class known by its name, the class attribute ``kind``; a decorator.

    Args:
      piece: the class, whose base says in ``group`` what it is; or that group, as in ``@register("formats")``.

    Raises:
      InputError: if the class has no such attribute or it is no name (:data:`NAME`), there is no such group, or another
        class has the name already.
    """
    if isinstance(piece, str):
        _check_group(piece, "piece")
        return lambda cls: _registered_class(piece, cls)
    return _registered_class(getattr(piece, "group", None), piece)


def _registered_class(group: str | None, cls: ClassT) -> ClassT:
    if not isinstance(cls, type):
        raise InputError(f"piece: expected a class, got {type(cls).__name__}")
    if group in OBJECTS:
        raise InputError(
            f"{cls.__qualname__}: {group} are objects; expected a call of register_{GROUPS[group]} with one"
        )
    name = getattr(cls, "kind", None)
    if not isinstance(name, str):
        raise InputError(f"{cls.__qualname__}: expected a class attribute kind, the name it is registered under")
    add(group, name, cls)
    return cls


class Named(Protocol):
    """A scheme (:class:`fqjax.scheme.Scheme`), as far as its registration goes."""

    @property
    def name(self) -> str:
        """The name that it is looked up by."""
        ...


def register_scheme(scheme: Named) -> None:
    """Make a scheme known by its name.

    Raises:
      InputError: if another scheme has the name already, or it is no name (:data:`NAME`).
    """
    name = getattr(scheme, "name", None)
    if not isinstance(name, str) or not hasattr(scheme, "method"):
        raise InputError(f"scheme: expected a fqjax.Scheme, got {type(scheme).__name__}")
    add("schemes", name, scheme)


def add(group: str | None, name: str, piece: object) -> None:
    """Make a piece of any group known by its name.

    Raises:
      InputError: as :func:`register` does.
    """
    group = _check_group(group, name if NAME.fullmatch(name) else "piece")
    if not NAME.fullmatch(name):
        raise InputError(f"{GROUPS[group]} {name!r:.80}: expected a name of letters, digits, '.', '-' and '_'")
    known = _registered[group].setdefault(name, piece)
    if known is not piece and known != piece and _origin(known) != _origin(piece):
        raise InputError(f"{GROUPS[group]} {name!r} is there already, as {_origin(known)}")
    _registered[group][name] = piece


def _check_group(group: str | None, what: str) -> str:
    if group not in GROUPS:
        expected = f"expected one of {', '.join(GROUPS)}"
        close = did_you_mean(group or "", GROUPS)
        raise InputError("; ".join([f"{what}: cannot be registered in {group!r:.80}", expected, *close]))
    return group


def _origin(piece: object) -> str:
    return f"{piece.__module__}.{piece.__qualname__}" if isinstance(piece, type) else repr(piece)


def lookup(group: str, name: str) -> Any:
    """The class, or the scheme, of a name.

    Raises:
      InputError: if there is none, naming those that there are; or its plug-in cannot be loaded.
    """
    found = _registered[group]
    if name not in found and name in BUILT_IN.get(group, ()):
        importlib.import_module(BUILT_IN[group][name])
    if name not in found:
        _load_entry_points(group)
    if name in found:
        return found[name]
    if name in _broken[group]:
        raise InputError(_broken[group][name])
    unknown = f"unknown {GROUPS[group]} {name!r}; the {group} are: {known(group)}"
    raise InputError("; ".join([unknown, *did_you_mean(name, names(group))]))


def import_all(group: str) -> None:
    """Import the module of every piece of a group, those of entry points too."""
    for module in BUILT_IN.get(group, {}).values():
        importlib.import_module(module)
    _load_entry_points(group)


def listed(group: str) -> str:
    """All names of a group in one line."""
    return ", ".join(names(group))


def known(group: str) -> str:
    """All names of a group, and what is wrong with plug-ins that cannot be loaded, as the end of a message."""
    return "; ".join([listed(group), *broken(group)])


def names(group: str) -> list[str]:
    """All names of a group, those of this package first; what cannot be loaded is left out (:func:`broken`)."""
    _load_entry_points(group)
    return list(dict.fromkeys([*BUILT_IN.get(group, ()), *_registered[group]]))


def broken(group: str) -> list[str]:
    """A line on every plug-in of a group that cannot be loaded."""
    _load_entry_points(group)
    return list(_broken[group].values())


def _load_entry_points(group: str) -> None:
    """Loads a group's entry points, once."""
    if group in _broken:
        return
    _broken[group] = {}
    from importlib.metadata import entry_points

    for point in entry_points(group=f"fqjax.{group}"):
        try:
            piece = point.load()
            if not isinstance(piece, types.ModuleType):
                add(group, getattr(piece, OBJECTS.get(group, "kind")), piece)
        except Exception as error:  # Another package's code may raise anything.
            package = point.dist.name if point.dist is not None else point.value
            text = " ".join(f"{type(error).__name__}: {error}".split())
            _broken[group][point.name] = f"{GROUPS[group]} {point.name!r} of {package} cannot be loaded ({text})"


def to_json(piece: object) -> JsonObject:
    """A frozen dataclass as JSON has it: its fields, and its kind if it has one."""
    cls = type(piece)
    kind: JsonObject = {"kind": piece.kind} if hasattr(cls, "kind") else {}  # pyright: ignore[reportAttributeAccessIssue]
    return kind | {name: _plain(getattr(piece, name)) for name in hints_of(cls)}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def from_json(group: str, values: Mapping[str, object], where: str = "") -> Any:
    """The piece that :func:`to_json` described.

    Args:
      group: of the piece.
      values: as JSON gives them.
      where: the file, and the object in it, for messages.

    Raises:
      InputError: if its kind is not known, an entry is missing, unknown or of the wrong type, or the piece refuses them.
    """
    with _located(where):
        return _made(_class_of(group, values), values)


def from_fields(cls: type[T], values: Mapping[str, object], where: str = "") -> T:
    """The same for a given dataclass."""
    with _located(where):
        return _made(cls, values)


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Puts the place before an error's message."""
    try:
        yield
    except InputError as error:
        raise InputError(": ".join(filter(None, (where, str(error))))) from None


def _class_of(group: str, values: Mapping[str, object]) -> type[Any]:
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(kind, str):
        raise InputError(f"{values!r}: expected an object with an entry 'kind', one of {listed(group)}")
    return lookup(group, kind)


def _made(cls: type[T], values: Mapping[str, object]) -> T:
    hints, defaults, label = hints_of(cls), defaults_of(cls), words_of([cls])
    given = {name: value for name, value in values.items() if name != "kind" or not hasattr(cls, "kind")}
    for name in given:
        if name not in hints:
            raise InputError(f"{label}: unknown entry {name!r}; expected some of {', '.join(sorted(hints))}")
    for name in hints:
        if name not in given and name not in defaults:
            raise InputError(f"{label}: no entry {name!r}")
    return cls(
        **{name: check_field(hints[name], _nested(hints[name], value, name), name) for name, value in given.items()}
    )


def _nested(hint: object, value: object, name: str) -> object:
    """A field's value with parts in place of the objects that describe them."""
    if typing.get_origin(hint) is tuple and isinstance(value, list) and is_part(typing.get_args(hint)[0]):
        return tuple(_nested(typing.get_args(hint)[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    parts, _ = alternatives(hint)
    if not parts or not isinstance(value, Mapping):
        return value
    kinds = {getattr(part, "kind", None): part for part in parts}
    if len(parts) == 1 and hasattr(parts[0], "group") and not hasattr(parts[0], "kind"):
        return _made(_class_of(parts[0].group, value), value)
    cls = kinds.get(value.get("kind"), parts[0] if None in kinds else None)
    if cls is None:
        raise InputError(f"{name}: unknown kind {value.get('kind')!r}; expected {words_of(parts)}")
    return _made(cls, value)
