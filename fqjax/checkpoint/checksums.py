"""Checksums of a checkpoint's arrays and of its manifest, by which damage is noticed when they are loaded.

CRC-32 finds every change of up to 32 bits in a row and misses another one time in 2**32; it is the fastest of the checksums
in Python's library.  Whoever changes a checkpoint on purpose can change its checksums too: they are no signature.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax
import numpy as np

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject
from fqjax.runtime.validation import check_value

CHECKSUMS_ENTRY, CHECKSUM_ALGORITHM = "checksums", "crc32"

Arrays = Mapping[tuple[str, ...], jax.Array | np.ndarray]
"""Arrays by path, as in :mod:`fqjax.checkpoint.tree`."""


def with_checksums(manifest: Mapping[str, object], arrays: Arrays) -> JsonObject:
    """The manifest with an entry on what its arrays and the rest of it were when it was written."""
    return with_sums(manifest, checksums(arrays))


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


def with_sums(manifest: Mapping[str, object], sums: Mapping[str, str]) -> JsonObject:
    """The manifest with an entry on checksums, where those of the arrays are known."""
    return {**manifest} | {
        CHECKSUMS_ENTRY: {
            "algorithm": CHECKSUM_ALGORITHM,
            "manifest": manifest_checksum(manifest),
            "arrays": dict(sums),
        }
    }


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
