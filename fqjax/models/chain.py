"""A model as blocks one after the other.  Those of a language model are alike: what is jitted for one serves all."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, PyTree

from fqjax.layers.record import on_auto_axes
from fqjax.models.causal_lm import CausalLM
from fqjax.models.sites import Site, sites_of
from fqjax.runtime.compiling import jit
from fqjax.runtime.progress import track

ModelT = TypeVar("ModelT", bound=nnx.Module)

Step = Callable[[str, nnx.Module, Iterable[PyTree]], Iterable[PyTree]]
"""Work of a pass on a block: (path, block, its inputs) -> its outputs, in the same order.  Iterating over the outputs is
what does the work."""


class Chain(NamedTuple):
    """A model as blocks one after the other.

    Attributes:
      blocks: module of each, by dotted path; the path of a whole model is empty.  Looking one up may read it from a file, so
        whoever goes through them holds one at a time.
      begin: from a batch to the first block's input, and what every block is called with besides.
      call: runs a block, (block, input, what else) -> output.
      end: from the last block's output to that of the model.
      sites: where the model's linear layers read something.
    """

    blocks: Mapping[str, nnx.Module]
    begin: Callable[[PyTree], tuple[PyTree, PyTree]]
    call: Callable[[PyTree, PyTree, PyTree], PyTree]
    end: Callable[[PyTree], PyTree]
    sites: Sequence[Site]


def chain(model: nnx.Module, names: Iterable[str]) -> Chain:
    """The blocks of a model, as it runs in inference.

    A model that does not say what its blocks are is one, and so is one with any of the layers named outside its blocks.
    """
    # Whatever says what its blocks are says it as a CausalLM does.
    running = cast(CausalLM, inference_view(with_auto_axes(model)))
    blocks = {f"layers.{i}": layer for i, layer in enumerate(running.layers)} if hasattr(running, "begin") else {}
    if not all(name.startswith(tuple(f"{path}." for path in blocks)) for name in names):
        return Chain({"": running}, as_arguments, call_model, lambda output: output, sites_of(model))
    graphdef, state = nnx.split(running)
    return Chain(blocks, running.begin, call_layer, lambda hidden: end(graphdef, state, hidden), sites_of(model))


def call_layer(layer: Callable[..., tuple], x: PyTree, args: PyTree) -> PyTree:
    """Runs one of a language model's layers without a cache; ``Chain.call`` of such a model."""
    return layer(x, None, None, *args)[0]


class Feed:
    """Batches on their way through a chain: the first block's inputs, and what every block is called with besides."""

    def __init__(self, chain: Chain, batches: Iterable[PyTree]):
        self.chain, self.batches = chain, batches
        self.others: list[PyTree] = []

    def first(self) -> Iterator[PyTree]:
        """The first block's inputs, batch by batch."""
        self.others = []
        for batch in self.batches:
            x, rest = self.chain.begin(batch)
            self.others.append(rest)
            yield x

    def paired(self, inputs: Iterable[PyTree]) -> Iterator[tuple[PyTree, PyTree]]:
        """Every batch's input to some block together with what the block is called with besides."""
        for i, x in enumerate(inputs):
            if i == len(self.others):  # A pass that was taken up in the middle began no batch.
                for _ in self.first():
                    pass
            yield x, self.others[i]


def sweep(
    blocks: Mapping[str, nnx.Module],
    first: Callable[[], Iterable[PyTree]],
    step: Step,
    what: str,
    *,
    keep_last: bool = False,
) -> Iterable[PyTree]:
    """Goes through the blocks once, with the outputs of each as the inputs of the next.

    Args:
      blocks: by dotted path; see :class:`Chain`.
      first: the first block's inputs.
      step: what is done with a block.
      what: the pass, for the progress bar.
      keep_last: whether the last block's outputs are wanted.

    Returns:
      The last block's outputs; nothing if they are not wanted.
    """
    inputs, paths = first(), list(blocks)
    if len(paths) == 1 and not isinstance(inputs, list):
        inputs = track(inputs, what)
    for path in track(paths, what) if len(paths) > 1 else paths:
        outputs = step(path, blocks[path], inputs)
        inputs = list(outputs) if path != paths[-1] or keep_last else drain(outputs)
    return inputs


def drain(outputs: Iterable[PyTree]) -> list[PyTree]:
    """Runs through outputs that nobody wants, which does their work; returns none."""
    for _ in outputs:
        pass
    return []


def places(blocks: Iterable[str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For every block the layers in it: dotted path in the model by dotted path in the block."""
    names = list(names)
    starts = {path: f"{path}." if path else "" for path in blocks}
    return {
        path: {name.removeprefix(start): name for name in names if name.startswith(start)}
        for path, start in starts.items()
    }


def with_auto_axes(model: ModelT) -> ModelT:
    """A copy of the model, its arrays on meshes whose axes XLA shards by itself."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(on_auto_axes, state))


def inference_view(model: ModelT) -> ModelT:
    """The model with dropout off and batch norms on their running averages."""
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def as_arguments(batch: PyTree) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
    """Positional and keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, list):
        batch = np.asarray(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def run(chain: Chain, block: tuple[nnx.GraphDef, nnx.State], x: PyTree, others: PyTree) -> PyTree:
    """The output of a block, which is given as ``nnx.split`` gives it, jitted."""
    return _run(chain.call, *block, x, others)


def call_model(model: Callable[..., PyTree], args: PyTree, kwargs: PyTree) -> PyTree:
    """Runs a whole model; ``Chain.call`` of one that is a single block."""
    return model(*args, **kwargs)


@functools.partial(jit, static_argnums=(0, 1))
def _run(call: Callable[..., PyTree], graphdef: nnx.GraphDef, state: nnx.State, x: PyTree, others: PyTree) -> PyTree:
    return call(nnx.merge(graphdef, state), x, others)


@functools.partial(jit, static_argnums=0)
def end(
    graphdef: nnx.GraphDef, state: nnx.State, hidden: Float[Array, "... hidden"]
) -> Float32[Array, "... vocabulary"]:
    """A model's output, of what its last block gives."""
    return nnx.merge(graphdef, state).end(hidden)
