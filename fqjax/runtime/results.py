"""Files for results of commands: whether they can be written is known before the work, and a failure changes nothing."""

import os
import tempfile
from pathlib import Path

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import check_local, exists, write_whole, writing

PROBE = b"0" * 4096
"""What is written on trial: some disks have room for names when they have none for content."""


def check_writable_file(path: Path) -> None:
    """Refuses a file that cannot be written, by writing another in its directory; one that exists stays as it is.

    Raises:
      InputError: naming the file: its directory is missing, closed, read-only or full, or it is a directory itself.
    """
    check_local(path)
    exists(path)  # It says why that cannot be known.
    if path.is_dir():
        raise InputError(f"{path}: a directory; expected a file to write")
    target = Path(os.path.realpath(path))
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise InputError(f"{path}: cannot be written (Permission denied)")
        return
    if not target.parent.is_dir():
        raise InputError(f"{path}: its directory does not exist")
    with writing(path):
        if target.exists():
            with open(target, "r+b"):
                pass
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(PROBE)
            probe.flush()
            os.fsync(probe.fileno())


def write_result(path: Path, content: bytes) -> None:
    """Writes a file so that it is complete, or as it was before; to a link's target, and to a pipe or device as it is.

    Raises:
      CannotWrite: if it cannot be written.
    """
    if not _is_special(path):
        write_whole(Path(os.path.realpath(path)), content)
        return
    with writing(path), open(path, "ab") as file:  # Standard output, which may be a file, holds something already.
        file.write(content)


def _is_special(path: Path) -> bool:
    """Whether it is a pipe or a device, or an open file by its number, which must not be replaced."""
    return path.exists() and (not path.is_file() or os.path.abspath(path).startswith(("/dev/", "/proc/")))
