"""Configurations as frozen dataclasses that check themselves.

A field's type says which values it may have, with ranges as annotations (``Annotated[float, Ge(0), Le(1)]``).  A field may
hold another configuration, or one of several kinds of them: settings that mean something for some kinds only are fields of
those kinds.  Where a setting means something only for some *values* of another, :meth:`Settings.unused` says so, and setting
it is an error.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeGuard, Union

from annotated_types import Ge, Le

from fqjax.runtime.errors import InputError

Share = Annotated[float, Ge(0), Le(1)]


class Settings:
    """Base of configurations: frozen dataclasses whose fields are checked when they are made.

    Raises:
      InputError: when one is made, if a value is not of its field's type or range, or a setting has no effect.

    Attributes:
      fixed: fields that ``KEY=VALUE`` settings do not change (:mod:`fqjax.runtime.overrides`).
    """

    fixed: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        defaults = defaults_of(type(self))
        for name, hint in hints_of(type(self)).items():
            value = getattr(self, name)
            if value is not defaults.get(name):  # What a class declares as its default needs no check.
                object.__setattr__(self, name, check_field(hint, value, name))
        for key, reason in self.unused():
            *path, name = key.split(".")
            part = functools.reduce(getattr, path, self)
            value = getattr(part, name)
            if value != defaults_of(type(part))[name]:
                raise InputError(f"{key}={value}: {reason}")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Settings that have no effect beside the others, dotted where they are a part's, each with the reason."""
        return iter(())


@functools.cache
def hints_of(cls: type) -> dict[str, object]:
    """The types of a dataclass's fields that are set, by name, with their annotations."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@functools.cache
def defaults_of(cls: type) -> dict[str, object]:
    """The defaults of a dataclass's fields that have one."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def alternatives(hint: object) -> tuple[list[type], list[object]]:
    """The members of a type: classes of configurations, and all others."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    parts = [member for member in members if is_part(member)]
    return parts, [member for member in members if member not in parts]


def is_part(hint: object) -> TypeGuard[type]:
    """Whether a type is that of configurations: a dataclass, or a base of registered ones."""
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "group"))


def check_field(hint: object, value: object, name: str) -> object:
    """A field's value, converted to its type where nothing is lost: whole numbers to floats, lists to tuples.

    Args:
      hint: the field's type; parts are only looked at as to their class.
      value: as Python has it.
      name: of the field, for the message.

    Raises:
      InputError: naming the field, its value, and the kind of value expected.
    """
    parts, others = alternatives(hint)
    if isinstance(value, tuple(parts)):
        return value
    if typing.get_origin(hint) is tuple and is_part(typing.get_args(hint)[0]):
        if not isinstance(value, tuple | list):
            raise InputError(f"{name}={value}: expected a list, each {words_of(typing.get_args(hint)[:1])}")
        return tuple(check_field(typing.get_args(hint)[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if parts and (others in ([], [types.NoneType]) or dataclasses.is_dataclass(value)):
        if value is None and others:
            return value
        raise InputError(f"{name}={value}: expected {words_of([*parts, *others])}")
    from fqjax.runtime.validation import check_setting

    return check_setting(Union[tuple(others)], value, name)  # noqa: UP007


def words_of(members: typing.Iterable[Any]) -> str:
    """Classes of configurations in words: their kinds, or their names."""
    names = ("none" if m is types.NoneType else getattr(m, "kind", m.__name__) for m in members)
    return " or ".join(names)
