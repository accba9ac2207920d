"""Remembers what quantization has worked out, so that an interrupted conversion can go on where it stopped.

Everything is written to a file of its own under a temporary name and then renamed: whatever the moment a conversion is
killed at, a file that has its final name is complete.  Quantization is deterministic, so what is read back is what would
have been computed.
"""

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqjax.calibration import Statistics
from fqjax.checkpoint.files import read_json
from fqjax.checkpoint.manifest import abstract_layer, describe_layer
from fqjax.checkpoint.tree import named_leaves, with_leaves
from fqjax.errors import InputError
from fqjax.linear import QuantizedLinear
from fqjax.scheme import Scheme

T = TypeVar("T")


class Memo:
    """Remembers nothing: every result is computed."""

    def statistics(self, compute: Callable[[], dict[str, Statistics]]) -> dict[str, Statistics]:
        """Calibration statistics of all layers."""
        return compute()

    def sensitivities(self, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Sensitivity of every layer."""
        return compute()

    def layer(self, name: str, bits: int, compute: Callable[[], QuantizedLinear], *, stage: str) -> QuantizedLinear:
        """One quantized layer, as it is after a stage of the work."""
        return compute()


class DirectoryMemo(Memo):
    """Remembers in a directory."""

    def __init__(self, directory: Path, scheme: Scheme):
        self.directory, self.scheme = directory, scheme

    def statistics(self, compute: Callable[[], dict[str, Statistics]]) -> dict[str, Statistics]:
        path = self.directory / "statistics.npz"
        if path.is_file():
            return _unpack_statistics(_read_arrays(path))
        result = compute()
        _write_arrays(path, _pack_statistics(result))
        return result

    def sensitivities(self, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        path = self.directory / "sensitivities.json"
        if path.is_file():
            return read_json(path, "record of sensitivities")
        result = compute()
        write_whole(path, json.dumps(result, indent=1).encode())
        return result

    def layer(self, name: str, bits: int, compute: Callable[[], QuantizedLinear], *, stage: str) -> QuantizedLinear:
        path = self.directory / f"{name}.int{bits}.{stage}.npz"
        if path.is_file():
            return self._unpack_layer(name, _read_arrays(path))
        result = compute()
        arrays = {"/".join(key): np.asarray(leaf) for key, leaf in named_leaves(nnx.state(result)).items()}
        entry = json.dumps(describe_layer(result, [self.scheme]))
        _write_arrays(path, {**_bytes_of_bf16(arrays), "entry": np.asarray(entry)})
        return result

    def _unpack_layer(self, name: str, arrays: dict[str, np.ndarray]) -> QuantizedLinear:
        entry = json.loads(str(arrays.pop("entry")))
        skeleton = abstract_layer(name, entry, [dataclasses.asdict(self.scheme)])
        graphdef, state = nnx.split(skeleton)
        leaves = {
            key: jnp.asarray(arrays["/".join(key)].view(jnp.dtype(leaf.dtype)))
            for key, leaf in named_leaves(state).items()
        }
        return nnx.merge(graphdef, with_leaves(state, leaves))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is either complete or absent."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, and it is worked out anew") from None


def _bytes_of_bf16(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """NumPy's files know no bfloat16: such arrays are stored as the 16-bit integers they are in memory."""
    return {key: a.view(np.uint16) if a.dtype == jnp.bfloat16 else a for key, a in arrays.items()}


def _pack_statistics(statistics: dict[str, Statistics]) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(Statistics)]
    return {f"{name}/{field}": getattr(seen, field) for name, seen in statistics.items() for field in fields}


def _unpack_statistics(arrays: dict[str, np.ndarray]) -> dict[str, Statistics]:
    names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
    return {
        name: Statistics(arrays[f"{name}/absmax"], arrays[f"{name}/samples"], int(arrays[f"{name}/rows"]))
        for name in names
    }
