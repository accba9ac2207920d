"""Everything that quantization finds out, by key: in memory, or in a directory from which an interrupted conversion goes on.

    store["plan", "layers.0.mlp.down_proj"] = value

A key is a tuple of texts, a value whatever :mod:`fqjax.drivers.codec` takes; so a method brings no code of its own
for going on where it stopped.  Activations on their way through the blocks are kept by the pass that carries them
(:meth:`Store.sweep`).

In a directory every value is a file of its own, written under a temporary name and then renamed: whatever the moment a
conversion is killed at, a file that has its final name is complete.  The activations before a block are a folder, which
is renamed when all of them are in it; it is removed once those before the next block are complete.  Quantization is
deterministic, so what is read back is what would have been computed.

    KEY.KEY.safetensors           a value
    activations/PASS.0007/        inputs of the eighth block in one of the passes, a file a batch
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fqjax.drivers.codec import read_value, write_value
from fqjax.drivers.flow import Activations
from fqjax.models.chain import Step, drain, sweep
from fqjax.runtime.files import writing
from fqjax.runtime.progress import track

ACTIVATIONS_FOLDER = "activations"
"""Folder of the activations."""

Key = tuple[str, ...]


class Store:
    """Keeps everything in memory, as long as it lives itself."""

    def __init__(self) -> None:
        self._values: dict[Key, object] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __getitem__(self, key: Key) -> Any:
        return self._values[key]

    def __setitem__(self, key: Key, value: object) -> None:
        self._values[key] = value

    def sweep(
        self,
        name: str,
        blocks: Mapping[str, nnx.Module],
        first: Callable[[], Iterable[Activations]],
        step: Step,
        title: str,
        *,
        keep_last: bool = False,
    ) -> Iterable[Activations]:
        """One pass through the blocks, as :func:`fqjax.models.chain.sweep` has it.

        Args:
          name: of the pass, under which it is taken up again.
          blocks, first, step, keep_last: as for the function.
          title: of the pass, for the progress bar.
        """
        return sweep(blocks, first, step, title, keep_last=keep_last)


class DirectoryStore(Store):
    """Keeps everything in a directory.

    Raises:
      InputError: from every method, if a file in the directory is damaged, or none can be written
        (:class:`fqjax.runtime.files.CannotWrite`).
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def __contains__(self, key: Key) -> bool:
        return self._path(key).is_file()

    def __getitem__(self, key: Key) -> Any:
        return read_value(self._path(key))

    def __setitem__(self, key: Key, value: object) -> None:
        write_value(self._path(key), value)

    def _path(self, key: Key) -> Path:
        return self.directory / f"{'.'.join(key)}.safetensors"

    def sweep(
        self,
        name: str,
        blocks: Mapping[str, nnx.Module],
        first: Callable[[], Iterable[Activations]],
        step: Step,
        title: str,
        *,
        keep_last: bool = False,
    ) -> Iterable[Activations]:
        folder, paths = self.directory / ACTIVATIONS_FOLDER, list(blocks)
        with writing(folder):
            folder.mkdir(exist_ok=True)
        begun = [int(p.name.rpartition(".")[2]) for p in folder.glob(f"{name}.*") if p.suffix[1:].isdigit()]
        done = max(begun, default=0)
        inputs: Iterable[Activations] = _Carried(folder / f"{name}.{done:04d}")
        if not begun:
            inputs = self._carry(folder / f"{name}.0000", first())
        for i in track(range(done, len(paths)), title):
            outputs = step(paths[i], blocks[paths[i]], inputs)
            kept = outputs if i + 1 < len(paths) or keep_last else drain(outputs)
            inputs = self._carry(folder / f"{name}.{i + 1:04d}", kept)
        return inputs

    def _carry(self, folder: Path, outputs: Iterable[Activations]) -> "_Carried":
        """Write activations, and remove those that the same pass had before."""
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with writing(unfinished):
            unfinished.mkdir()
        for i, item in enumerate(outputs):
            write_value(unfinished / f"{i:06d}.safetensors", jax.tree.map(np.asarray, item))
        with writing(folder):
            unfinished.rename(folder)
        for other in folder.parent.iterdir():
            if other != folder and other.name.startswith(folder.name.partition(".")[0] + "."):
                shutil.rmtree(other, ignore_errors=True)
        return _Carried(folder)


class _Carried:
    """Activations in a folder; iterating reads one after the other, and may be repeated."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __iter__(self) -> Iterator[Activations]:
        for path in sorted(self.folder.glob("*.safetensors")):
            yield read_value(path)
