"""Directories that are written: they appear whole, by one rename, and whatever keeps them from it is one line."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import CannotWrite, check_local, reason
from fqjax.runtime.quiet import contained, forget

PATTERN_CHARACTERS = re.compile(r"[\\\[*?]")
"""Characters of a path with which Orbax or TensorStore take it for a pattern, or for another path."""

QUIET_SECONDS, POLL_SECONDS, REMOVAL_SECONDS = 1.0, 0.05, 10.0
"""How long a directory that could not be filled has to stay away, how often that is looked at, and for how long at most."""

UNFINISHED_NAME = ".orbax-checkpoint-tmp"
"""Part of a name by which Orbax knows what is unfinished, and does not read it."""


def check_target(path: Path) -> None:
    """Refuses a path at which Orbax could not write, or not read what it wrote.

    Raises:
      InputError: naming the path and what was expected.
    """
    check_local(path)
    whole = Path(os.path.realpath(path)).as_posix()
    if found := PATTERN_CHARACTERS.search(whole):
        raise InputError(f"{path}: has {found[0]} in its path, which Orbax takes for a pattern; expected another path")
    if UNFINISHED_NAME in whole:
        raise InputError(
            f"{path}: has {UNFINISHED_NAME} in its path, which Orbax takes for unfinished; expected another"
        )


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that does not exist yet, to be made and filled; it gets its name when that is done.

    Nothing is left of it if it cannot be.

    Args:
      path: its name, absolute; its parents are made.

    Raises:
      CannotWrite: naming what cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.saving")
    whole = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        staging.rename(path)
        whole = True
    except CannotWrite as error:
        raise CannotWrite(str(error).replace(str(staging), str(path))) from None
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written ({error.strerror or reason(error)})") from None
    finally:
        if not whole:
            _remove(staging, staging.with_name(staging.name + UNFINISHED_NAME))


def _remove(*directories: Path) -> None:
    """Removes directories until they stay away: threads of Orbax go on making and filling them for a while after an error."""
    now = time.monotonic()
    until, end = now + QUIET_SECONDS, now + REMOVAL_SECONDS
    while now < min(until, end):
        for directory in filter(os.path.lexists, directories):
            shutil.rmtree(directory, ignore_errors=True)
            until = now + QUIET_SECONDS
        time.sleep(POLL_SECONDS)
        now = time.monotonic()


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """One line for whatever keeps Orbax, TensorStore, tokenizers and safetensors from writing; each has errors of its own.

    Raises:
      CannotWrite: naming the path and the reason.
    """
    failure = ""
    with contained() as settle:
        try:
            yield
            return
        except InputError:
            raise
        except Exception as error:  # See above.
            failure = (error.strerror if isinstance(error, OSError) else None) or reason(error)
            forget(error)
        settle()
    raise CannotWrite(f"{path}: cannot be written ({failure})")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, with the permissions of any other file; the package's own can be read by the user alone.

    Raises:
      CannotWrite: naming the file and the reason.
    """
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    with saving(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(contiguous, path, dict(metadata))
        path.chmod(mode & 0o777)
