"""Keeps what quantization finds out from one pass over a model's blocks to the next: in memory, or in a directory, from which
an interrupted conversion goes on where it stopped.

In a directory everything is a file of its own, written under a temporary name and then renamed: whatever the moment a
conversion is killed at, a file that has its final name is complete.  The activations in front of a block are a folder, which
is renamed when all of them are in it; it is removed once those in front of the next block are complete.  Quantization is
deterministic, so what is read back is what would have been computed.

    statistics.BLOCK.npz          what calibration saw of the block's layers
    options.LAYER.npz             the ways in which a layer can be quantized
    sensitivities.json            what quantizing each layer alone costs the model
    LAYER.int4.nearest1024.npz    a quantized layer that was tried
    LAYER.finished.npz            a quantized layer as it is to be
    activations/PASS.0007/        inputs of the eighth block in one of the passes, a file a batch
"""

import dataclasses
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqjax.checkpoint.manifest import abstract_layer, describe_layer
from fqjax.checkpoint.tree import named_leaves, with_leaves
from fqjax.core.formats.uniform import Grid
from fqjax.drivers.candidates import ARRAYS, Option, Outline
from fqjax.drivers.statistics import Span, Statistics
from fqjax.layers.linear import QuantizedLinear
from fqjax.models.chain import Step, drain, sweep
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import read_json, whole, write_whole, writing
from fqjax.runtime.progress import track

ACTIVATIONS = "activations"

FIXED = [field.name for field in dataclasses.fields(Grid) if field.name not in ARRAYS]
"""The fields of a grid that are whole numbers."""


class Memo:
    """Keeps everything in memory, as long as it lives itself."""

    def __init__(self) -> None:
        self._statistics: dict[str, dict[str, Statistics]] = {}
        self._options: dict[str, list[Option]] = {}
        self._layers: dict[tuple[str, str], QuantizedLinear] = {}

    def sweep(
        self,
        stage: str,
        blocks: Mapping[str, nnx.Module],
        first: Callable[[], Iterable[Any]],
        step: Step,
        what: str,
        *,
        keep_last: bool = False,
    ) -> Iterable[Any]:
        """One pass, as :func:`fqjax.models.chain.sweep` has it; ``stage`` is its name, under which it is taken up again."""
        return sweep(blocks, first, step, what, keep_last=keep_last)

    def keep_statistics(self, path: str, seen: dict[str, Statistics]) -> None:
        """Keeps the statistics of a block's layers, by dotted path in the model."""
        self._statistics[path] = seen

    def statistics(self, path: str) -> dict[str, Statistics]:
        """What :meth:`keep_statistics` was given."""
        return self._statistics[path]

    def spans(self, path: str) -> dict[str, Span]:
        """The small part of :meth:`statistics`."""
        return {name: Span(seen.absmax, seen.rows, seen.passed) for name, seen in self._statistics[path].items()}

    def keep_options(self, name: str, options: list[Option]) -> None:
        """Keeps a layer's options."""
        self._options[name] = options

    def options(self, name: str) -> list[Option]:
        """What :meth:`keep_options` was given."""
        return self._options[name]

    def outlines(self, name: str) -> list[Outline]:
        """The same without arrays."""
        return [option.outline() for option in self._options[name]]

    def sensitivities(self, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Sensitivity of every layer."""
        return compute()

    def layer(self, name: str, kind: str, compute: Callable[[], QuantizedLinear], *, remember: bool) -> QuantizedLinear:
        """One quantized layer, kept if ``remember`` says that it may be asked for again."""
        found = self._layers.get((name, kind))
        if found is None:
            found = compute()
            if remember:
                self._layers[name, kind] = found
        return found


class DirectoryMemo(Memo):
    """Keeps everything in a directory.

    Raises:
      InputError: from every method, if a file in the directory is damaged, or none can be written
        (:class:`fqjax.runtime.files.CannotWrite`).
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def sweep(
        self,
        stage: str,
        blocks: Mapping[str, nnx.Module],
        first: Callable[[], Iterable[Any]],
        step: Step,
        what: str,
        *,
        keep_last: bool = False,
    ) -> Iterable[Any]:
        folder, paths = self.directory / ACTIVATIONS, list(blocks)
        with writing(folder):
            folder.mkdir(exist_ok=True)
        begun = [int(p.name.rpartition(".")[2]) for p in folder.glob(f"{stage}.*") if p.suffix[1:].isdigit()]
        done = max(begun, default=0)
        inputs: Iterable[Any] = _Carried(folder / f"{stage}.{done:04d}")
        if not begun:
            inputs = self._carry(folder / f"{stage}.0000", first())
        for i in track(range(done, len(paths)), what):
            outputs = step(paths[i], blocks[paths[i]], inputs)
            kept = outputs if i + 1 < len(paths) or keep_last else drain(outputs)
            inputs = self._carry(folder / f"{stage}.{i + 1:04d}", kept)
        return inputs

    def _carry(self, folder: Path, outputs: Iterable[Any]) -> "_Carried":
        """Writes activations, and removes those that the same pass had before."""
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with writing(unfinished):
            unfinished.mkdir()
        for i, item in enumerate(outputs):
            arrays = item if isinstance(item, tuple) else (item,)
            _write_arrays(unfinished / f"{i:06d}.npz", {str(k): np.asarray(array) for k, array in enumerate(arrays)})
        with writing(folder):
            unfinished.rename(folder)
        for other in folder.parent.iterdir():
            if other != folder and other.name.startswith(folder.name.partition(".")[0] + "."):
                shutil.rmtree(other, ignore_errors=True)
        return _Carried(folder)

    def keep_statistics(self, path: str, seen: dict[str, Statistics]) -> None:
        fields = [field.name for field in dataclasses.fields(Statistics)]
        arrays = {f"{name}/{field}": getattr(one, field) for name, one in seen.items() for field in fields}
        _write_arrays(self.directory / f"statistics.{path}.npz", arrays)

    def statistics(self, path: str) -> dict[str, Statistics]:
        arrays = _read_arrays(self.directory / f"statistics.{path}.npz")
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        return {
            name: Statistics(arrays[f"{name}/absmax"], arrays[f"{name}/samples"], *_counts(arrays, name))
            for name in names
        }

    def spans(self, path: str) -> dict[str, Span]:
        arrays = _read_arrays(self.directory / f"statistics.{path}.npz", ("/absmax", "/rows", "/passed"))
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        return {name: Span(arrays[f"{name}/absmax"], *_counts(arrays, name)) for name in names}

    def keep_options(self, name: str, options: list[Option]) -> None:
        numbers = [dataclasses.asdict(o.outline()) | {f: getattr(o.grid, f) for f in FIXED} for o in options]
        arrays = {f"{i}/{f}": getattr(o.grid, f) for i, o in enumerate(options) for f in ARRAYS}
        given = {key: np.asarray(array) for key, array in arrays.items() if array is not None}
        _write_arrays(self.directory / f"options.{name}.npz", given | {"numbers": np.asarray(json.dumps(numbers))})

    def options(self, name: str) -> list[Option]:
        arrays = _read_arrays(self.directory / f"options.{name}.npz")
        options = []
        for i, numbers in enumerate(json.loads(str(arrays["numbers"]))):
            parts: dict[str, Any] = {f: arrays.get(f"{i}/{f}") for f in ARRAYS}
            given = {f: None if array is None else jnp.asarray(array) for f, array in parts.items()}
            grid = Grid(**given, **{f: numbers[f] for f in FIXED})
            options.append(Option(**_outline(numbers), grid=grid))
        return options

    def outlines(self, name: str) -> list[Outline]:
        numbers = _read_arrays(self.directory / f"options.{name}.npz", ("numbers",))["numbers"]
        return [Outline(**_outline(one)) for one in json.loads(str(numbers))]

    def sensitivities(self, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        path = self.directory / "sensitivities.json"
        if path.is_file():
            return read_json(path, "record of sensitivities")
        result = compute()
        write_whole(path, json.dumps(result, indent=1).encode())
        return result

    def layer(self, name: str, kind: str, compute: Callable[[], QuantizedLinear], *, remember: bool) -> QuantizedLinear:
        path = self.directory / f"{name}.{kind}.npz"
        if path.is_file():
            return self._unpack_layer(name, _read_arrays(path))
        result = compute()
        if remember:
            self._write_layer(path, result)
        return result

    def keep_finished(self, layers: Mapping[str, QuantizedLinear]) -> None:
        """Keeps layers as they are to be."""
        for name, layer in layers.items():
            self._write_layer(self.directory / f"{name}.finished.npz", layer)

    def finished(self, name: str) -> QuantizedLinear:
        """What :meth:`keep_finished` was given."""
        return self._unpack_layer(name, _read_arrays(self.directory / f"{name}.finished.npz"))

    def _write_layer(self, path: Path, layer: QuantizedLinear) -> None:
        arrays = {"/".join(key): np.asarray(leaf) for key, leaf in named_leaves(nnx.state(layer)).items()}
        entry = describe_layer(layer, [layer.summary.recipe])
        described = {"entry": json.dumps(entry), "recipe": layer.summary.recipe}
        _write_arrays(path, arrays | {name: np.asarray(text) for name, text in described.items()})

    def _unpack_layer(self, name: str, arrays: dict[str, np.ndarray]) -> QuantizedLinear:
        entry = json.loads(str(arrays.pop("entry")))
        skeleton = abstract_layer(name, entry, [json.loads(str(arrays.pop("recipe")))])
        graphdef, state = nnx.split(skeleton)
        leaves: dict[Any, jax.Array] = {key: jnp.asarray(arrays["/".join(key)]) for key in named_leaves(state)}
        return nnx.merge(graphdef, with_leaves(state, leaves))


def _counts(arrays: Mapping[str, np.ndarray], name: str) -> tuple[int, int]:
    return int(arrays[f"{name}/rows"]), int(arrays[f"{name}/passed"])


def _outline(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: numbers[field.name] for field in dataclasses.fields(Outline)}


class _Carried:
    """Activations in a folder; iterating reads one after the other, and may be repeated."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __iter__(self) -> Iterator[Any]:
        for path in sorted(self.folder.glob("*.npz")):
            arrays = _read_arrays(path)
            item = tuple(arrays[str(k)] for k in range(len(arrays)))
            yield item if len(arrays) > 1 else arrays["0"]


BF16 = "|bfloat16"
"""What NumPy's files do not know: such arrays are stored as 16-bit integers, under names with this ending."""


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    stored = {
        f"{key}{BF16}" if a.dtype == jnp.bfloat16 else key: a.view(np.uint16) if a.dtype == jnp.bfloat16 else a
        for key, a in ((key, np.asarray(a)) for key, a in arrays.items())
    }
    with whole(path) as file:
        np.savez(file, **stored)  # pyright: ignore[reportArgumentType]


def _read_arrays(path: Path, endings: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """The arrays of a file whose names have one of some endings."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files if key.endswith(endings)}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged ({error}); remove {path.parent}, and begin anew") from None
    return {key.removesuffix(BF16): a.view(jnp.bfloat16) if key.endswith(BF16) else a for key, a in arrays.items()}
