"""The safetensors files of a Hugging Face directory, single or sharded, read tensor by tensor."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fqjax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": "bfloat16", "F64": np.float64}


class TensorFiles:
    """Names, shapes and values of a checkpoint's tensors; nothing is kept in memory.

    Args:
      directory: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    Raises:
      InputError: naming the file that is missing, truncated or not what the index says.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files = self._locate()
        self._shapes = {name: shape for file in set(self.files.values()) for name, shape in self._header(file)}
        for name, file in self.files.items():
            if name not in self._shapes:
                raise InputError(f"{directory / file}: the index says it holds tensor {name!r}, but it does not")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Raises:
          InputError: if it is not in floating point or holds a value that is not finite.
        """
        path = self.directory / self.files[name]
        with safe_open(path, framework="numpy") as file:
            kind = file.get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise InputError(f"{path}: tensor {name!r} has dtype {kind}, expected one of {', '.join(FLOATS)}")
            values = file.get_tensor(name)
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(f"{path}: tensor {name!r} holds a value that is not finite")
        return values

    def _locate(self) -> dict[str, str]:
        """File of every tensor."""
        index = self.directory / INDEX
        if index.is_file():
            return self._read_index(index)
        if (self.directory / SINGLE).is_file():
            return {name: SINGLE for name, _ in self._header(SINGLE)}
        others = sorted(p.name for p in self.directory.glob("*.bin")) or sorted(
            p.name for p in self.directory.glob("*.pt")
        )
        hint = f"; {others[0]} is a pickle, which fqjax does not read" if others else ""
        raise InputError(f"{self.directory}: no {SINGLE} and no {INDEX}{hint}")

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            files = json.loads(index.read_text())["weight_map"]
            valid = all(isinstance(k, str) and isinstance(v, str) for k, v in files.items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not an index of safetensors shards ({error})") from None
        if not valid or not files:
            raise InputError(f"{index}: weight_map must map tensor names to file names")
        for file in sorted(set(files.values())):
            if Path(file).name != file:
                raise InputError(f"{index}: {file!r} is not a file name in this directory")
            if not (self.directory / file).is_file():
                raise InputError(f"{self.directory / file}: missing shard, named by {INDEX}")
        return files

    def _header(self, file: str) -> list[tuple[str, tuple[int, ...]]]:
        path = self.directory / file
        try:
            with safe_open(path, framework="numpy") as tensors:
                return [(name, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()]
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from None
