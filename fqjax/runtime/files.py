"""Files of a checkpoint's directory: found, read as JSON, and written, with one line for whatever is wrong with them."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from fqjax.runtime.errors import InputError

JsonObject = dict[str, object]
"""A JSON object as :func:`read_json` gives it and :mod:`json` writes it; its entries are of no known type until checked."""

JsonMapping = Mapping[str, object]
"""The same to be read only."""

MAX_JSON_BYTES = 2**28
"""Bytes of a JSON file beyond which it is not read."""

MAX_REASON_CHARACTERS = 300
"""Characters of an error's message that are shown."""

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""The beginning of gs://bucket/path, also as a path, of which pathlib makes gs:/bucket/path."""

DRIVE = re.compile(r"[A-Za-z]:([/\\]|$)")
"""The beginning of C:/path."""

MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_SHOWN = 200, 3800, 100
"""Bytes of what is written, at most, and characters of it in a message: Linux has 255 and 4096, of which the names take some
that there are until it is whole."""

UNPRINTABLE_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and bytes that are no UTF-8."""


def inside(directory: Path, name: str) -> Path:
    """The path of a file in a directory.

    A symbolic link may lead elsewhere in the directory and, in a snapshot of the Hugging Face cache
    (``snapshots/REVISION/NAME -> ../../blobs/HASH``), to the blobs beside the snapshots; nowhere else.

    Raises:
      InputError: if there is no such file, or it is a link that leads out.
    """
    path = directory / name
    _check_file(path)
    root, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(os.path.realpath(allowed)) for allowed in roots):
        raise InputError(f"{path}: a link to {target}, outside its directory; expected a file or a link inside")
    return path


def linked(directory: Path, name: str) -> Path:
    """The path of a file in a directory of another program's, where links lead wherever their makers wanted.

    People link large files to save space, and the hub's client has filled directories with links into its cache.  A link
    is followed if it belongs to the user, to the owner of the directory, or to the administrator: whoever else could put one
    there must not choose what is read.

    Raises:
      InputError: if there is no such file, or it is another's link, or leads nowhere.
    """
    path = directory / name
    if path.is_symlink():
        if not path.exists():
            raise InputError(f"{path}: a link to {os.readlink(path)}, which is not there; expected a file")
        owner = path.lstat().st_uid
        if owner not in (0, os.geteuid(), os.stat(directory).st_uid):
            raise InputError(f"{path}: a link of another user (id {owner}); expected a file, or a link of your own")
    _check_file(path)
    return path


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "a directory" if path.is_dir() else "not a regular file" if os.path.lexists(path) else "no such file"
        raise InputError(f"{path}: {what}; expected a file")


def read_json(path: Path, what: str) -> JsonObject:
    """Reads a JSON object.

    Args:
      path: the file.
      what: what it should hold, for the message.

    Raises:
      InputError: if the file cannot be read, is not JSON, not an object, or names an entry twice.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not a JSON {what} ({error})") from None
    return content


def reason(error: BaseException) -> str:
    """An error's message in one line, cut where it becomes a list of everything there is; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]}..."


def parse_json(text: str) -> object:
    """Parses JSON in which no object has an entry twice.

    Raises:
      ValueError: if it is not JSON, too deeply nested, or has an entry twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"entry {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return entries


class CannotWrite(InputError):
    """A file could not be written; what was written before it is as good as it was."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system has against writing into one line.

    Raises:
      CannotWrite: naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written ({error.strerror or reason(error)})") from None


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is either complete or absent."""
    with whole(path) as file:
        file.write(content)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that gets its name when it is complete and on the disk.

    Raises:
      CannotWrite: if it cannot be written.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with writing(path):
        try:
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise


def exists(path: Path) -> bool:
    """Whether there is anything of that name, if only a link that leads nowhere.

    Raises:
      InputError: if that cannot be known, for instance where a directory is closed to this user.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # Of a null character or a surrogate, which no name has.
        return False
    except OSError as error:
        raise InputError(f"{path}: cannot be looked at ({error.strerror or reason(error)})") from None
    return True


def check_new(path: Path) -> None:
    """Refuses a path at which a directory cannot be made: one of another machine, or one that exists.

    Raises:
      InputError: naming the path and what was expected.
    """
    check_local(path)
    if exists(path) or path.name == "..":
        raise InputError(f"{path}: exists already; expected a directory to create")


def check_local(path: Path) -> None:
    """Refuses a path that stands for something else than it says, or that nothing could be written at.

    Such are an address, ``gs://bucket/path``, a drive, ``C:/path``, what a shell replaces, ``~/path``, characters that cannot
    be shown, and names so long that those of what is written on the way would be too long.

    Raises:
      InputError: naming the path and what was expected.
    """
    if ADDRESS.match(str(path)):
        raise InputError(f"{path}: not a path on this machine; expected one, such as /data/out or out")
    if DRIVE.match(str(path)) and os.name != "nt":
        raise InputError(
            f"{path}: begins with a drive, which this machine does not have; expected such as /data/out or out"
        )
    check_current_directory(path)
    whole = os.path.abspath(path)
    if str(path).startswith("~"):
        meant = home if (home := os.path.expanduser(path)) != str(path) else whole
        raise InputError(f"{path}: begins with ~, which a shell replaces and nothing else does; expected {meant}")
    if found := UNPRINTABLE_CHARACTERS.search(whole):
        raise InputError(f"{str(path)!r}: has {found[0]!r} in its path; expected characters that can be shown")
    for what, text, most in (("name", path.name, MAX_NAME_BYTES), ("path", whole, MAX_PATH_BYTES)):
        if (size := len(os.fsencode(text))) > most:
            raise InputError(f"{whole[:MAX_SHOWN]}...: its {what} has {size} bytes; expected at most {most}")


def check_current_directory(path: Path) -> None:
    """Refuses a relative path where the directory that it begins at has been removed.

    Raises:
      InputError: naming the path.
    """
    if path.is_absolute():
        return
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"{path}: the current directory cannot be used ({error.strerror}); expected an absolute path"
        ) from None
