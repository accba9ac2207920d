"""Checksums of a checkpoint's arrays, manifest and other files, by which damage is noticed when they are loaded.

CRC-32 finds every change of up to 32 bits in a row and misses another one time in 2**32; it is the fastest of the checksums
in Python's library.  Whoever changes a checkpoint on purpose can change its checksums too: they are no signature.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import jax
import numpy as np

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, reason
from fqjax.runtime.validation import check_value

CHECKSUMS_ENTRY, CHECKSUM_ALGORITHM = "checksums", "crc32"

PIECE_BYTES = 2**20
"""Bytes of a file that are read at once."""

Arrays = Mapping[tuple[str, ...], jax.Array | np.ndarray]
"""Arrays by path, as in :mod:`fqjax.checkpoint.tree`."""


def checksums(arrays: Arrays) -> dict[str, str]:
    """The checksum of every array, by its dotted path.

    Raises:
      InputError: naming an array of which other processes hold a part.
    """
    for name, array in arrays.items():
        if not _is_whole(array):
            raise InputError(
                f"array {'.'.join(name)}: other processes hold a part of it; expected a model that this process holds whole"
            )
    return {".".join(name): array_checksum(array) for name, array in arrays.items()}


def with_sums(
    manifest: Mapping[str, object], sums: Mapping[str, str], files: Mapping[str, str] | None = None
) -> JsonObject:
    """The manifest with an entry on checksums: its own, and those of arrays and of files beside them, which are known."""
    return {**manifest} | {
        CHECKSUMS_ENTRY: {
            "algorithm": CHECKSUM_ALGORITHM,
            "manifest": manifest_checksum(manifest),
            "arrays": dict(sums),
            "files": dict(files or {}),
        }
    }


def file_checksums(directory: Path, paths: Iterable[Path]) -> dict[str, str]:
    """The checksums of those paths that are files, by their names from the directory on."""
    return {path.relative_to(directory).as_posix(): file_checksum(path) for path in sorted(paths) if path.is_file()}


def file_checksum(path: Path) -> str:
    """Eight hexadecimal digits: CRC-32 of a file's bytes."""
    found = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            found = zlib.crc32(piece, found)
    return f"{found:08x}"


def verify_files(manifest: Mapping[str, object], directory: Path, name: str) -> None:
    """Compares a file, or those of a folder, with their checksums in the manifest, where it has any.

    Files that it has none of are passed over: early versions wrote checksums of arrays alone.

    Args:
      manifest: as it was written.
      directory: the checkpoint's.
      name: of the file or folder in it.

    Raises:
      InputError: naming the first file that is missing, cannot be read, or is not what was saved.
    """
    entry = manifest.get(CHECKSUMS_ENTRY)
    recorded = entry.get("files") if isinstance(entry, dict) else None
    for file, expected in recorded.items() if isinstance(recorded, dict) else ():
        if file != name and not file.startswith(f"{name}/"):
            continue
        try:
            found = file_checksum(directory / file)
        except OSError as error:
            raise InputError(f"{directory / file}: cannot be read ({error.strerror or reason(error)})") from None
        if found != expected:
            raise InputError(
                f"{directory / file}: not what was saved, by its checksum; the checkpoint is damaged, or the file was edited "
                f"without removing it from {CHECKSUMS_ENTRY!r} in the manifest"
            )


def verify(manifest: Mapping[str, object], arrays: Arrays, directory: Path, file: str) -> None:
    """Compares arrays and manifest with the checksums in the manifest, where it has any: those of early versions have none.

    Arrays of which other processes hold a part are passed over.

    Raises:
      InputError: naming the first array that is not what was saved, or the manifest.
    """
    if manifest.get(CHECKSUMS_ENTRY) is None:
        return
    entry = cast(JsonObject, manifest[CHECKSUMS_ENTRY])  # Checked below.
    where = f"{directory / file}: {CHECKSUMS_ENTRY}"
    check_value(dict, entry, where, "")
    if entry.get("algorithm") != CHECKSUM_ALGORITHM:
        raise InputError(f"{where}: algorithm {entry.get('algorithm')!r}: expected {CHECKSUM_ALGORITHM!r}")
    recorded = cast(JsonObject, entry.get("arrays"))
    check_value(dict, recorded, where, "arrays")
    for name, array in arrays.items():
        dotted = ".".join(name)
        if dotted not in recorded:
            raise InputError(f"{where}: none of array {dotted}; the checkpoint is damaged")
        if _is_whole(array) and array_checksum(array) != recorded[dotted]:
            raise InputError(
                f"{directory}: array {dotted} is not what was saved, by its checksum; the checkpoint is damaged"
            )
    if manifest_checksum(manifest) != entry.get("manifest"):
        raise InputError(
            f"{directory / file}: not what was saved, by its checksum; the checkpoint is damaged, or the file was edited "
            f"without removing its entry {CHECKSUMS_ENTRY!r}"
        )


def array_checksum(array: jax.Array | np.ndarray) -> str:
    """Eight hexadecimal digits: CRC-32 of the array's elements in C order, little endian, wherever the array is.

    Raises:
      ValueError: for an array of which other processes hold a part.
    """
    host = _on_host(array)
    host = np.ascontiguousarray(host, host.dtype.newbyteorder("<"))
    return f"{zlib.crc32(host.reshape(-1).view(np.uint8).data):08x}"


def manifest_checksum(manifest: Mapping[str, object]) -> str:
    """The same of a manifest but for its entry on checksums, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in manifest.items() if key != CHECKSUMS_ENTRY}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _is_whole(array: jax.Array | np.ndarray) -> bool:
    """Whether this process holds all of an array's elements."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def _on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """An array's values, put together from its shards; JAX is kept from holding on to a copy beside the array."""
    if not isinstance(array, jax.Array):
        return array
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if not _is_whole(array):
        raise ValueError("other processes hold a part of the array")
    host = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            host[shard.index] = np.asarray(shard.data.addressable_data(0))
    return host
