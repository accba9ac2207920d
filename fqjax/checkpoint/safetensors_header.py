"""Headers of safetensors files.

The safetensors package checks a file's header against its length before anything is read.  What it does not look for is a
name that occurs twice: :func:`read_header` does.
"""

from pathlib import Path
from typing import NamedTuple, cast

from fqjax.runtime.files import JsonObject, parse_json

MAX_HEADER_BYTES = 100_000_000
"""Bytes of a header, as the safetensors package has it."""


class Stored(NamedTuple):
    """Dtype and shape of a tensor, as its file's header has them."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> tuple[JsonObject, int]:
    """The header of a safetensors file as it stands there, entries by name, and the number of bytes after it.

    Raises:
      ValueError: if it is longer than the file, not a JSON object, or names an entry twice.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        after = path.stat().st_size - 8 - length
        if after < 0 or length > MAX_HEADER_BYTES:
            raise ValueError(f"its header of {length} bytes does not fit into the file")
        header = parse_json(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError(f"its header: expected an object, got {type(header).__name__}")
    return header, after


def bare_header(path: Path) -> dict[str, Stored] | None:
    """Entries of the header of a file that consists of nothing else; None for any other file."""
    try:
        header, after = read_header(path)
        entries = {name: cast(dict, info) for name, info in header.items() if name != "__metadata__"}
        if after or not any(info["data_offsets"][1] for info in entries.values()):
            return None
        return {name: Stored(str(info["dtype"]), tuple(info["shape"])) for name, info in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None
