"""Passes: a pass is a named, resumable step over the blocks of a model, of which one is needed at a time."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

from flax import nnx

from fqjax.core.layer import LayerInputs
from fqjax.drivers.flow import Activations, Batch
from fqjax.drivers.method import Method
from fqjax.drivers.statistics import Span, Statistics, layer_inputs
from fqjax.drivers.store import Store
from fqjax.drivers.ties import Units, units_of
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.surgery import find_linears
from fqjax.models.chain import Chain, Feed, places
from fqjax.runtime.errors import InputError

Keep = Callable[[dict[str, QuantizedLinear]], None]
"""Takes the finished layers of a block, by dotted path in the model."""


class Request(Protocol):
    """The request for a quantization (:class:`fqjax.scheme.Scheme`)."""

    @property
    def method(self) -> Method | None:
        """A published method with its settings."""
        ...

    @property
    def sample_rows(self) -> int:
        """Rows of every layer's input kept by calibration."""
        ...

    def kept_in_int8(self, names: Iterable[str]) -> set[str]:
        """Those layers, by dotted path, that are kept out of INT4."""
        ...

    def recipe(self) -> str:
        """The request as text, kept with what is quantized by it."""
        ...


class Run:
    """One quantization: what it was asked for.  What its passes find out is in its store.

    Args:
      store: keeps what the passes find out; an unfinished quantization goes on from there.
      chain: the float model as blocks, equalized where the method says so.
      linears: layers to quantize, by dotted path in the model's order; their arrays are not used and may be abstract.
      request: with a method.
      calibration: model inputs; None where no pass runs the model.
      keep: is given the finished layers, block after block.

    Raises:
      InputError: if the calibration data holds no batch.

    Attributes:
      method, sample_rows, recipe: of the request.
      kept_in_int8: layers that may have no option in INT4.
      units: layers that are quantized alike, by the name of the unit.
      feed: the calibration data; may be gone through once only, unless :attr:`repeats`.
    """

    def __init__(
        self,
        store: Store,
        chain: Chain,
        linears: Mapping[str, nnx.Linear],
        request: Request,
        calibration: Iterable[Batch] | None,
        keep: Keep,
        *,
        repeats: bool,
    ):
        assert request.method is not None
        self.method, self.sample_rows, self.recipe = request.method, request.sample_rows, request.recipe()
        self.kept_in_int8 = request.kept_in_int8(linears)
        self.store, self.chain, self.linears, self.keep = store, chain, linears, keep
        self.units: Units = units_of(linears)
        nothing: tuple[Batch, Iterable[Batch]] = (None, [])
        self.first_batch, batches = nothing if calibration is None else _peek(calibration)
        self.feed = Feed(chain, list(batches) if repeats else batches)
        self.inside = places(chain.blocks, linears)

    def block(self, path: str, block: nnx.Module) -> "BlockRun":
        """One of the blocks as a pass sees it."""
        return BlockRun(self, path, block, self.inside[path], find_linears(block))

    def span(self, name: str) -> Span:
        """The small part of a layer's statistics."""
        return self.store["span", name]

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of every layer for one token."""
        return self.store["macs",]


class BlockRun(NamedTuple):
    """A block, and what is known of its layers.

    Attributes:
      run: the quantization.
      path: dotted path of the block in the model.
      module: the float block.
      names: dotted path in the model of every layer to quantize, by dotted path in the block.
      linears: all linear layers of the block, by dotted path in it.
    """

    run: Run
    path: str
    module: nnx.Module
    names: Mapping[str, str]
    linears: Mapping[str, nnx.Linear]

    def statistics(self, short: str) -> Statistics:
        """Statistics of a layer's input, from calibration."""
        return self.run.store["statistics", self.names[short]]

    def inputs(self, short: str) -> LayerInputs:
        """A layer and the statistics of its input, as a method sees them."""
        percentile = self.run.method.activation_percentile
        return layer_inputs(self.linears[short], self.statistics(short), percentile)


class Pass:
    """Base of the passes.  All that a pass finds out goes into the run's store, so that it can be taken up again.

    Attributes:
      name: under which it is taken up again.
      title: for the progress bar.
      inputs: of the blocks: those of the float model; "both" pairs of them and of those that the quantized blocks before
        give; "none" where no block is run.
      batches: how many of the calibration batches it sees; None for all.
      keeps_outputs: whether :meth:`end` wants the last block's outputs.
      visits: whether the pass goes through the blocks at all, rather than only begins.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    inputs: ClassVar[Literal["float", "both", "none"]] = "float"
    batches: ClassVar[int | None] = None
    keeps_outputs: ClassVar[bool] = False
    visits: ClassVar[bool] = True

    def needed(self, run: Run) -> bool:
        """Whether the pass has anything to do."""
        return True

    def begin(self, run: Run) -> None:
        """Called before the first block, also where the pass is taken up again."""

    def block(self, block: BlockRun, inputs: Iterable[Activations]) -> Iterator[Activations]:
        """Work on a block; yields its outputs, and is iterated to the end whether they are wanted or not."""
        return iter(())

    def end(self, run: Run, outputs: Iterable[Activations]) -> None:
        """Called after the last block."""


def execute(run: Run, passes: Iterable[Pass]) -> None:
    """Carry out passes one after the other."""
    for one in passes:
        if not one.needed(run):
            continue
        one.begin(run)
        if not one.visits:
            continue
        outputs = run.store.sweep(
            one.name,
            run.chain.blocks,
            functools.partial(_first_inputs, one, run),
            functools.partial(_step, one, run),
            one.title,
            keep_last=one.keeps_outputs,
        )
        one.end(run, outputs)


def _step(one: Pass, run: Run, path: str, block: nnx.Module, inputs: Iterable[Activations]) -> Iterator[Activations]:
    return one.block(run.block(path, block), inputs)


def _first_inputs(one: Pass, run: Run) -> Iterable[Activations]:
    """Inputs of the first block, where float and quantized model still agree."""
    if one.inputs == "none":
        return []
    feed = run.feed if one.batches is None else Feed(run.chain, [run.first_batch])
    return [(x, x) for x in feed.first()] if one.inputs == "both" else feed.first()


def _peek(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and an iterable that still begins with it."""
    if isinstance(batches, Sequence) and batches:
        return batches[0], batches  # As it is, so that progress can say how much is left.
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("calibration: the data holds no batch")
    return first, itertools.chain([first], iterator)
