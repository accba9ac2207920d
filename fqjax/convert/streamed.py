"""A Hugging Face checkpoint's model read part by part, so that no more than one block of it is in memory.

What stands before the blocks and after them, embeddings and head, is a part too: it is read when the first batch
enters or the first result leaves, and dropped when the next block is looked up.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import PathParts
from jaxtyping import DTypeLike

from fqjax.checkpoint.checksums import array_checksum
from fqjax.checkpoint.compressed.config import read_quantization
from fqjax.checkpoint.compressed.read import read_layer
from fqjax.checkpoint.fields import ModelConfig
from fqjax.checkpoint.hugging_face import abstract_model, check_layers, check_tensors, read_source
from fqjax.checkpoint.safetensors import TensorFiles
from fqjax.drivers.store import Store
from fqjax.layers.surgery import dotted, find_linears, replace_modules
from fqjax.models import FAMILIES
from fqjax.models.causal_lm import CausalLM
from fqjax.models.chain import Chain, call_layer, end, inference_view
from fqjax.models.sites import sites_of
from fqjax.rewrites.equalize import rescale
from fqjax.runtime.errors import InputError
from fqjax.runtime.memory import give_back
from fqjax.runtime.progress import track

EMBEDDING_MODULES = ("embed_tokens", "embed_positions")
"""Modules that turn tokens into the first block's input."""

BLOCKS_MODULE = "layers"
"""The list of the blocks."""

ModelT = TypeVar("ModelT", bound=nnx.Module)


class StreamedModel:
    """A model whose arrays stay in the checkpoint's files until they are asked for.

    Args:
      directory: of the checkpoint.
      name: of the architecture.
      config: the family's configuration.
      dtype: of parameters and activations.
      equalized: whether blocks are equalized (:mod:`fqjax.rewrites.equalize`) as they are read.
      files: the checkpoint's files as they are to be; by default as they are.
      seen: keeps the checksum of every tensor that was read, by which one is known that has changed when it is read again.

    Raises:
      InputError: here as :func:`fqjax.load_hf` does; later, if a tensor is not finite, or a file has changed.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        config: ModelConfig,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        equalized: bool = False,
        files: TensorFiles | None = None,
        seen: Store | None = None,
    ):
        self.dtype, self.equalized = dtype, equalized
        self.files = TensorFiles(directory) if files is None else files
        self.signature = self.files.signature()
        self._seen, self._sums = seen or Store(), dict[str, str]()
        self.skeleton = inference_view(abstract_model(name, config, dtype))
        self.sites = sites_of(self.skeleton)
        parameters = dict(nnx.to_flat_state(nnx.state(self.skeleton)))
        self.stored = check_layers(self.files, FAMILIES[name], parameters, read_quantization(directory))
        self.sources = check_tensors(self.files, FAMILIES[name], parameters, self.stored)
        self.outer = list(dict.fromkeys(str(path[0]) for path in parameters if path[0] != BLOCKS_MODULE))
        self._ends: tuple[str, CausalLM] | None = None
        self.files.on_read = self._note

    def chain(self) -> Chain:
        """The model as blocks, each of which is read when it is looked up."""
        return Chain(_Blocks(self), self._begin, call_layer, self._end, self.sites)

    def block(self, index: int) -> nnx.Module:
        """Reads one block."""
        self._begin_reading()
        start = (BLOCKS_MODULE, index)
        block = self._filled(self.skeleton.layers[index], start)
        prefix = f"{dotted(start)}."
        linears = find_linears(block)
        stored = {name.removeprefix(prefix): layer for name, layer in self.stored.items() if name.startswith(prefix)}
        if stored:
            biases = {short: linears[short].bias for short in stored}
            made = {
                short: read_layer(self.files, layer, None if (b := biases[short]) is None else b[...], self.dtype)
                for short, layer in stored.items()
            }
            block = replace_modules(block, made)
        elif self.equalized:
            inside = [site for site in self.sites if site.consumers[0].startswith(prefix)]
            rescale(linears, [site.below(prefix) for site in inside])
        self._compare(dotted(start))
        return block

    def outer_module(self, name: str) -> nnx.Module:
        """Reads one of the modules outside the blocks."""
        self._begin_reading()
        module = self._filled(getattr(self.skeleton, name), (name,))
        self._compare(name)
        return module

    def _begin_reading(self) -> None:
        self._ends, self._sums = None, {}
        give_back()
        self.check_unchanged()

    def _filled(self, module: ModelT, start: PathParts) -> ModelT:
        graphdef, state = nnx.split(module)
        flat = dict(nnx.to_flat_state(state))
        for path, variable in flat.items():
            source = self.sources.get((*start, *path))  # None for weights that are quantized in the checkpoint.
            if source is not None:
                flat[path] = variable.replace(read_source(self.files, source, self.dtype))
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    def _begin(self, tokens: jax.Array) -> tuple[jax.Array, tuple[object, ...]]:
        head = self.skeleton.head_name
        return self._model("begin", () if head in EMBEDDING_MODULES else (head,)).begin(tokens)

    def _end(self, hidden: jax.Array) -> jax.Array:
        unused = () if self.skeleton.head_name in EMBEDDING_MODULES else EMBEDDING_MODULES
        graphdef, state = nnx.split(self._model("end", unused))
        return end(graphdef, state, hidden)

    def _model(self, use: str, unused: tuple[str, ...]) -> CausalLM:
        """The model without blocks, and with modules left empty that have no part in some use of it."""
        if self._ends is None or self._ends[0] != use:
            self._ends = None
            made = {name: self.outer_module(name) for name in self.outer if name not in unused}
            made |= {name: _emptied(getattr(self.skeleton, name)) for name in self.outer if name in unused}
            self._ends = use, replace_modules(self.skeleton, made | {BLOCKS_MODULE: nnx.List([])})
        return self._ends[1]

    def _note(self, tensor: str, part: int | None, values: np.ndarray) -> None:
        self._sums[tensor if part is None else f"{tensor}[{part}]"] = array_checksum(values)

    def _compare(self, path: str) -> None:
        """Compares what was read of a module with what was read of it before, or keeps it for later."""
        found, self._sums = self._sums, {}
        if ("source", path) not in self._seen:
            self._seen["source", path] = found
        before = self._seen["source", path]
        for tensor, checksum in found.items():
            if before.get(tensor) != checksum:
                file = self.files.directory / self.files.files[tensor.partition("[")[0]]
                raise InputError(f"{file}: tensor {tensor!r} has changed since the conversion began; begin anew")

    def check_seen(self) -> None:
        """Reads again what an earlier run read, before anything is done with what it found.

        Raises:
          InputError: naming the first tensor that has changed since.
        """
        paths = [dotted((BLOCKS_MODULE, i)) for i in range(len(self.skeleton.layers))]
        for path in track([path for path in paths if ("source", path) in self._seen], "comparing"):
            self.block(paths.index(path))
        for name in self.outer:
            if ("source", name) in self._seen:
                self.outer_module(name)

    def check_unchanged(self) -> None:
        """Raises an InputError if a file is not what it was when the model was made."""
        now = self.files.signature()
        for name, seen in self.signature.items():
            if now[name] != seen:
                raise InputError(f"{self.files.directory / name}: has changed since the conversion began; begin anew")


class _Blocks(Mapping[str, nnx.Module]):
    """The blocks by dotted path, read anew at every look-up."""

    def __init__(self, model: StreamedModel):
        self.model = model
        self.indices = {dotted((BLOCKS_MODULE, i)): i for i in range(len(model.skeleton.layers))}

    def __getitem__(self, path: str) -> nnx.Module:
        return self.model.block(self.indices[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _emptied(module: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros((0,) * leaf.ndim, leaf.dtype), state))
