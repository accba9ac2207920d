"""The safetensors files of a Hugging Face directory, single or sharded, read tensor by tensor.

Shards count for what they hold, whatever their index lists: another program may read them without it.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike
from safetensors import SafetensorError, safe_open

from fqjax.checkpoint.foreign import foreign_inside
from fqjax.checkpoint.safetensors_header import Stored, bare_header, read_header
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import exists, linked, read_json, reason
from fqjax.runtime.notices import say_once

PIECE_VALUES = 2**22
"""Values that are looked at at once."""

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

SHARD_NAME = re.compile(r"-\d+-of-\d+\.safetensors$")

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


class TensorFiles:
    """Names, shapes and values of a checkpoint's tensors; nothing is kept in memory.

    Args:
      directory: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.
      partial: whether shards may be missing, or consist of a header alone; nothing can be read of those.

    Attributes:
      files: by name of a tensor, the file that it is in; empty if there is neither a file nor an index.
      unlisted: tensors that are in a shard though the index does not list them.
      missing: files of which there is no more than a header.
      on_read: called with the name, the part and the values of whatever is read, before they are cast.

    Raises:
      InputError: naming the file that is missing, truncated or not what the index says, and the tensor if it is one's fault:
        one that is not where the index says, or has other values in another shard.
    """

    def __init__(self, directory: Path, *, partial: bool = False):
        self.directory, self.partial = directory, partial
        self.missing: list[str] = []
        self.on_read: Callable[[str, int | None, np.ndarray], None] | None = None
        self.files = self._locate()
        headers = {file: self._header(file) for file in sorted(set(self.files.values()))}
        for name, file in self.files.items():
            header = headers[file]
            if header is not None and name not in header:
                raise InputError(f"{directory / file}: the index says it holds tensor {name!r}, but it does not")
        known = {file: header for file, header in headers.items() if header is not None}
        self.unlisted = self._take_unlisted(known)
        self._stored = {name: known[file][name] for name, file in self.files.items() if file in known}
        self._check_twice(known)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def has_header(self, name: str) -> bool:
        """Whether the header that describes a tensor is there."""
        return name in self._stored

    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self.files)

    def signature(self) -> dict[str, list[int]]:
        """Size and time of the last change of every file, by its name.

        Raises:
          InputError: if one is not there any more.
        """
        found = {}
        for file in sorted(set(self.files.values())):
            try:
                status = (self.directory / file).stat()
            except OSError as error:
                raise InputError(f"{self.directory / file}: cannot be read ({error.strerror})") from None
            found[file] = [status.st_size, status.st_mtime_ns]
        return found

    def stored(self, name: str) -> Stored:
        """Dtype and shape of a tensor, from its file's header."""
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header.

        Raises:
          InputError: if the tensor is not in floating point.
        """
        dtype, shape = self._stored[name]
        if dtype not in FLOAT_DTYPES:
            path = self.directory / self.files[name]
            raise InputError(f"{path}: tensor {name!r} has dtype {dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
        return shape

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same values: bit by bit in the same dtype, else as numbers.

        Raises:
          InputError: if one cannot be read.
        """
        if one not in self or other not in self:
            return False
        return self._alike(self._stored[one], self._stored[other], (one, self.files[one]), (other, self.files[other]))

    def _alike(self, one: Stored, other: Stored, *places: tuple[str, str]) -> bool:
        """Whether two tensors have the same values, each given by what a header says, its name and its file."""
        if one.shape != other.shape:
            return False
        pieces: Iterable[slice | None] = [None]
        if one.shape:
            rows = max(PIECE_VALUES // max(math.prod(one.shape[1:]), 1), 1)
            pieces = (slice(start, min(start + rows, one.shape[0])) for start in range(0, one.shape[0], rows))
        for piece in pieces:
            a, b = (np.atleast_1d(self._values(name, piece, file)) for name, file in places)
            equal = (
                np.array_equal(a.view(np.uint8), b.view(np.uint8)) if one.dtype == other.dtype else np.array_equal(a, b)
            )
            if not equal:
                return False
        return True

    def _take_unlisted(self, headers: Mapping[str, Mapping[str, Stored]]) -> set[str]:
        """Takes up what shards hold and the index does not list; returns the tensors' names."""
        found: set[str] = set()
        for file, header in headers.items():
            more = sorted(set(header) - set(self.files))
            self.files |= dict.fromkeys(more, file)
            found |= set(more)
        return found

    def _check_twice(self, headers: Mapping[str, Mapping[str, Stored]]) -> None:
        """Refuses a tensor that has other values in a shard than in the one that counts."""
        for file, header in headers.items():
            for name in header:
                first = self.files[name]
                if first == file or {first, file} & set(self.missing):
                    continue
                if not self._alike(self._stored[name], header[name], (name, first), (name, file)):
                    raise InputError(
                        f"{self.directory / file}: tensor {name!r} is in {first} too, with other values; expected it once"
                    )

    def read(self, name: str, dtype: DTypeLike, part: int | None = None) -> np.ndarray:
        """Reads one tensor, or one part of it along its first axis, and casts it.

        Raises:
          InputError: if it holds a value that is not finite, or is not finite in ``dtype``; or if it cannot be read.
        """
        path = self.directory / self.files[name]
        with np.errstate(over="ignore", invalid="ignore"):
            values = self._noted(name, part).astype(dtype, copy=False)
        if not _is_finite(values):
            kind = jnp.dtype(dtype).name
            raise InputError(f"{path}: tensor {name!r} holds a value that is not finite in {kind}")
        return values

    def read_integers(self, name: str) -> np.ndarray:
        """Reads one tensor of integers as it is.

        Raises:
          InputError: if it holds something else, or cannot be read.
        """
        dtype = self._stored[name].dtype
        if dtype[0] not in "IU":
            path = self.directory / self.files[name]
            raise InputError(f"{path}: tensor {name!r} has dtype {dtype}, expected integers")
        return self._noted(name)

    def _noted(self, name: str, part: int | None = None) -> np.ndarray:
        values = self._values(name, part)
        if self.on_read is not None:
            self.on_read(name, part, values)
        return values

    def _values(self, name: str, part: int | slice | None = None, file: str | None = None) -> np.ndarray:
        path = self.directory / (file or self.files[name])
        try:
            with safe_open(path, framework="numpy") as tensors:
                return tensors.get_tensor(name) if part is None else tensors.get_slice(name)[part]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: tensor {name!r} cannot be read ({error})") from None

    def _locate(self) -> dict[str, str]:
        """File of every tensor."""
        index, single = self.directory / INDEX_FILE, exists(self.directory / SINGLE_FILE)
        if exists(index):
            if not single or self._lists_the_single(index):
                return self._read_index(linked(self.directory, INDEX_FILE))
            say_once(
                f"{self.directory}: holds {SINGLE_FILE} beside {INDEX_FILE}; the first is read, the shards are not"
            )
        if single:
            header = self._header(SINGLE_FILE)
            self.missing.clear()  # It is looked at once more.
            return dict.fromkeys(header or (), SINGLE_FILE)
        if self.partial:
            self.missing.append(SINGLE_FILE)
            return {}
        found = foreign_inside(self.directory)
        hint = f"; {found}" if found else ""
        raise InputError(f"{self.directory}: no {SINGLE_FILE} and no {INDEX_FILE}{hint}")

    def _lists_the_single(self, index: Path) -> bool:
        """Whether the single file is one of an index's shards; not if the index cannot be read."""
        try:
            files = read_json(index, "index of safetensors shards").get("weight_map")
        except InputError:
            return False
        return isinstance(files, dict) and SINGLE_FILE in files.values()

    def _read_index(self, index: Path) -> dict[str, str]:
        files = read_json(index, "index of safetensors shards").get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            raise InputError(f"{index}: weight_map must map tensor names to file names")
        for file in sorted(set(files.values())):
            if Path(file).name != file or file in ("", ".."):
                raise InputError(f"{index}: {file!r} is not a file name in this directory")
            if not exists(self.directory / file) and not self.partial:
                raise InputError(f"{self.directory / file}: missing shard, named by {INDEX_FILE}")
        strangers = {path.name for path in self.directory.glob("*.safetensors") if SHARD_NAME.search(path.name)}
        if strangers := sorted(strangers - set(files.values())):
            say_once(f"{self.directory / strangers[0]}: {INDEX_FILE} does not name this shard; it is not read")
        return dict(files)

    def _header(self, file: str) -> dict[str, Stored] | None:
        """Entries of a file's header; None if the file may be missing, and is."""
        if self.partial and not (self.directory / file).exists():
            self.missing.append(file)
            return None
        path = linked(self.directory, file)
        if self.partial and (bare := bare_header(path)) is not None:
            self.missing.append(file)
            return bare
        try:
            with safe_open(path, framework="numpy") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}
                stored = {name: Stored(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            why = reason(error).removeprefix("Error while deserializing header: ")
            raise InputError(f"{path}: truncated, or not a safetensors file ({why})") from None
        try:
            read_header(path)
        except ValueError as error:
            raise InputError(f"{path}: not a valid safetensors file ({error})") from None
        return stored


def _is_finite(values: np.ndarray) -> bool:
    """In pieces: NumPy has to make float32 of bfloat16 first, and an embedding is large."""
    flat = values.reshape(-1)
    return all(
        bool(np.isfinite(flat[i : i + PIECE_VALUES].astype(np.float32)).all())
        for i in range(0, max(flat.size, 1), PIECE_VALUES)
    )
