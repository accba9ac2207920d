"""Checks of the arguments of public functions; each error names the argument, its value, and what was expected."""

import math
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import check_current_directory, exists
from fqjax.runtime.validation import MAX_INDEX

T = TypeVar("T")

SHOWN_CHARACTERS, SHOWN_DIGITS = 60, 40


def shown(value: object) -> str:
    """A value in a message: short, and in one line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN_DIGITS:
        return "too large a number"
    if not isinstance(value, str | bytes | bool | int | float | complex | np.generic | os.PathLike | types.NoneType):
        return f"of type {type(value).__name__}"
    text = " ".join(repr(value.item() if isinstance(value, np.generic) else value).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def check_whole(name: str, value: object, least: int | None = None, most: int | None = MAX_INDEX) -> int:
    """A whole number in a range, as Python has it.

    Raises:
      InputError: naming the argument.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise InputError(f"{name} {shown(value)}: expected a whole number")
    number = int(value)
    if least is not None and number < least:
        raise InputError(f"{name} {shown(number)}: expected at least {least}")
    if most is not None and number > most:
        raise InputError(f"{name} {shown(number)}: expected at most {most}")
    return number


def check_number(name: str, value: object) -> float:
    """A finite number that is not a truth value.

    Raises:
      InputError: naming the argument.
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan  # pyright: ignore[reportArgumentType]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} {shown(value)}: expected a finite number")
    return number


def check_flag(name: str, value: object) -> bool:
    """A truth value.

    Raises:
      InputError: naming the argument.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} {shown(value)}: expected True or False")
    return bool(value)


def check_path(name: str, value: object) -> Path:
    """The path of a file or directory.

    Raises:
      InputError: naming the argument, if it is no path, an empty one, or holds a null character; naming the path, if it is
        relative to a directory that is not there any more, or cannot be looked at.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{name} {shown(value)}: expected a path")
    path = Path(text)
    check_current_directory(path)
    exists(path)  # It says why that cannot be known, as of a name that is too long.
    return path


def check_float_dtype(name: str, value: object) -> np.dtype:
    """A type of real numbers in floating point.

    Raises:
      InputError: naming the argument.
    """
    import jax.numpy as jnp

    try:
        dtype = np.dtype(value)  # pyright: ignore[reportCallIssue, reportArgumentType]
    except TypeError:
        raise InputError(f"{name} {shown(value)}: expected a dtype, such as jnp.bfloat16") from None
    if value is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4):
        raise InputError(f"{name} {shown(value)}: expected bfloat16, float16 or float32")
    return dtype


def check_type(name: str, value: object, kind: type[T], words: str) -> T:
    """A value of some class.

    Args:
      name: of the argument.
      value: to check.
      kind: the class.
      words: what is expected.

    Raises:
      InputError: naming the argument.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} {shown(value)}: expected {words}")
    return value


def check_texts(name: str, value: object) -> list[str]:
    """Texts from an iterable that is not a text itself.

    Raises:
      InputError: naming the argument.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"{name} {shown(value)}: expected a list of texts")
    return [check_type(f"{name}[{i}]", text, str, "a text") for i, text in enumerate(value)]


def check_unmasked(name: str, value: T) -> T:
    """An array, or a list or tuple of arrays, none of which is masked (:mod:`numpy.ma`): its mask would be lost.

    Raises:
      InputError: naming the argument.
    """
    parts = value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        raise InputError(f"{name}: a masked array; expected one without a mask")
    return value
