"""Calibration: run data through the model once and keep what quantization needs to know of every linear layer's input.

For each layer that is the largest magnitude of every input channel, and a fixed number of input rows drawn uniformly
from all that passed, on which errors are judged.  The rows are drawn by *bottom-k sampling*: each row gets a random
number, and those with the k largest numbers are kept; merging two such samples gives a sample of the union, so one pass
over data of unknown length suffices.

A model that says what its blocks are goes through it block by block, so that one block is needed at a time; the outputs of
each for all batches are held for the next.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float, Float32

from fqjax.core.excitation import known_channels, with_typical
from fqjax.core.layer import LayerInputs
from fqjax.drivers.codec import keepable
from fqjax.drivers.flow import Activations, Batch, Others
from fqjax.layers.surgery import dotted, find_linears, replace_modules, shorten, spoken
from fqjax.layers.taps import NoSuchLayer, Watcher
from fqjax.models.batches import checked_batches, running
from fqjax.models.chain import Chain, Feed, chain, places, sweep
from fqjax.models.checks import check_model
from fqjax.runtime.arguments import check_texts, check_whole
from fqjax.runtime.compiling import jit
from fqjax.runtime.errors import InputError


@keepable
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one linear layer's input, from calibration.

    Attributes:
      absmax: largest magnitude of each channel, float32 (K,).
      samples: some of the rows, float32 (S, K), in no particular order.
      rows: how many rows counted (:mod:`fqjax.layers.taps`).
      passed: how many rows passed; as many, but for experts, of whose rows those count that are sent to them.

    Of an expert that got fewer rows than are kept as samples, the other tokens' rows fill the sample up, and ``absmax`` is
    that of all of them: what it would meet if they were sent to it.
    """

    absmax: np.ndarray
    samples: np.ndarray
    rows: int
    passed: int

    def span(self) -> "Span":
        """The statistics without samples."""
        return Span(self.absmax, self.rows, self.passed)


@keepable
@dataclasses.dataclass(frozen=True)
class Span:
    """The small part of :class:`Statistics`; the fields are the same."""

    absmax: np.ndarray
    rows: int
    passed: int


def layer_inputs(linear: nnx.Linear, statistics: Statistics, percentile: float = 100.0) -> LayerInputs:
    """A layer and the statistics of its input, as a method sees them.

    Channels that calibration hardly ever excited get a range that is typical of the others (:mod:`fqjax.core.excitation`).

    Args:
      linear: the layer in floating point.
      statistics: of its input.
      percentile: of a channel's magnitudes in the sampled rows, that counts as its largest; at 100 it is the largest of all
        rows that passed.
    """
    weight = linear.kernel[...].T.astype(jnp.float32)
    absmax, samples = jnp.asarray(statistics.absmax), jnp.asarray(statistics.samples)
    if percentile < 100:
        usual = jnp.percentile(jnp.abs(samples), percentile, axis=0)
        absmax = jnp.where(usual > 0, usual, absmax)  # A channel that is mostly zero keeps its largest value.
    return LayerInputs(weight, with_typical(absmax, known_channels(samples)), samples)


MAX_SAMPLE_ROWS = 1 << 20
"""Rows of a layer's input that calibration keeps at most."""


class _Statistic(nnx.Variable):
    """State that calibration accumulates; split from everything else a model holds."""


class Unobservable(Exception):
    """A layer that calibration cannot take note of.

    Attributes:
      path: dotted path in the block.
    """

    def __init__(self, path: str, why: str):
        super().__init__(why)
        self.path = path


NESTED = (
    "the model calls it inside of a transformation of JAX's, such as lax.fori_loop, lax.scan, lax.cond or jit, where "
    "calibration cannot take note of its input; expected nnx.fori_loop and its kin, or that the layer is ignored"
)


class Observer(Watcher):
    """Computes what its linear layer computes, and takes note of the input."""

    def __init__(self, linear: nnx.Linear, sample_rows: int, path: str):
        k, self.path = linear.in_features, path
        self.linear: Callable[..., Array] = linear
        self.absmax, self.absmax_of_all = (_Statistic(jnp.zeros(k, jnp.float32)) for _ in range(2))
        self.samples = _Statistic(jnp.zeros((sample_rows, k), jnp.float32))
        self.lots = _Statistic(jnp.full(sample_rows, -1.0, jnp.float32))
        self.rows, self.passed = (_Statistic(jnp.zeros((), jnp.uint32)) for _ in range(2))

    def __call__(
        self, x: Float[Array, "... k"], *args: object, shares: Float32[Array, " rows"] | None = None, **kwargs: object
    ) -> Array:
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise Unobservable(self.path, f"calibration met {x.dtype} activations; expected real numbers")
        try:
            self._note(x.reshape(-1, x.shape[-1]).astype(jnp.float32), shares)
        except TraceContextError:
            raise Unobservable(self.path, NESTED) from None
        return self.linear(x, *args, **kwargs)

    def _note(self, x: Float32[Array, "rows k"], shares: Float32[Array, " rows"] | None) -> None:
        kept = self.lots[...].shape[0]
        counts = jnp.ones(len(x), bool) if shares is None else shares > 0
        lots = jax.random.uniform(jax.random.fold_in(jax.random.key(0), self.passed[...]), x.shape[:1])
        lots = lots if shares is None else lots + counts  # Rows that count come first.
        # nnx Variables are written through [...]; the merged sample is the `kept` rows with the largest lots.
        self.lots[...], order = jax.lax.top_k(jnp.concatenate([self.lots[...], lots]), kept)
        old = jnp.take(self.samples[...], jnp.minimum(order, kept - 1), axis=0)
        new = jnp.take(x, jnp.maximum(order - kept, 0), axis=0)
        self.samples[...] = jnp.where((order < kept)[:, None], old, new)
        for found, which in ((self.absmax, counts), (self.absmax_of_all, jnp.ones_like(counts))):
            found[...] = jnp.maximum(found[...], jnp.max(jnp.abs(x), axis=0, initial=0, where=which[:, None]))
        self.rows[...] = self.rows[...] + jnp.sum(counts, dtype=jnp.uint32)
        self.passed[...] = self.passed[...] + x.shape[0]


def calibrate(
    model: nnx.Module, batches: Iterable[Batch], names: Iterable[str], *, sample_rows: int = 512
) -> dict[str, Statistics]:
    """Runs the batches through the model and returns the statistics of the named linear layers.

    Args:
      model: any NNX module; it is not changed.  Dropout is off and batch norms use their running averages.
      batches: any iterable of model inputs: an array becomes ``model(array)``, a tuple ``model(*tuple)``, a mapping
        ``model(**mapping)``.  For a language model, int32 tokens [batch, length].
      names: dotted paths of linear layers.
      sample_rows: rows of each layer's input to keep.

    Returns:
      Statistics by name.

    Raises:
      InputError: if there is no batch, if the model does not take one, if a name is none of a linear layer, if a layer is
        never called, or if an activation is not finite.
    """
    check_model(model)
    sample_rows = check_whole("sample_rows", sample_rows, 1, MAX_SAMPLE_ROWS)
    known = find_linears(model)
    for name in (names := check_texts("names", list(names) if isinstance(names, Mapping) else names)):
        if name not in known:
            raise InputError(f"names: {name!r} is no linear layer of the model; expected some of {shorten(known)}")
    parts, found = chain(model, names), {}
    inside, feed = places(parts.blocks, names), Feed(parts, checked_batches(model, batches))

    def step(path: str, block: nnx.Module, inputs: Iterable[Activations]) -> Iterator[Activations]:
        found.update((yield from watch(parts, path, block, inside[path], feed.paired(inputs), sample_rows)))

    sweep(parts.blocks, feed.first, step, "calibrating")
    return {name: found[name] for name in names}


def watch(
    parts: Chain,
    path: str,
    block: nnx.Module,
    names: Mapping[str, str],
    inputs: Iterable[tuple[Activations, Others]],
    sample_rows: int,
) -> Generator[Activations, None, dict[str, Statistics]]:
    """Runs a block and yields its outputs; what is left at the end are the statistics of its linear layers.

    Args:
      parts: what the block belongs to.
      path: dotted path of a block.
      block: that block.
      names: of the linear layers to watch, by dotted path in the block.
      inputs: of the block, each with what it is called with besides.
      sample_rows: rows of each layer's input to keep.

    Raises:
      InputError: as :func:`calibrate` does.
    """
    observed = replace_modules(block, lambda path, node: Observer(node, sample_rows, path) if path in names else node)
    graphdef, statistics, rest = nnx.split(observed, _Statistic, ...)
    wanted, count = len(parts.blocks) > 1, 0
    for x, others in inputs:
        with running(path, count, lambda x=x, others=others: (x, others)), _naming(names):
            statistics, y = jax.block_until_ready(_observe(parts.call, graphdef, wanted, statistics, rest, x, others))
        count += 1
        yield y
    if not count:
        raise InputError("calibration: the data holds no batch")
    found = {dotted(path): node for path, node in nnx.iter_graph(nnx.merge(graphdef, statistics, rest))}
    return {name: _statistics(name, found[path]) for path, name in names.items()}


@contextlib.contextmanager
def _naming(names: Mapping[str, str]) -> Iterator[None]:
    """Names the layer in the model of which a stand-in says why it cannot do its work."""
    try:
        yield
    except (Unobservable, NoSuchLayer) as error:
        raise InputError(f"{spoken(names.get(error.path, error.path))}: {error}") from None


@functools.partial(jit, static_argnums=(0, 1, 2))
def _observe(
    call: Callable[..., Activations],
    graphdef: nnx.GraphDef,
    wanted: bool,
    statistics: nnx.State,
    rest: nnx.State,
    x: Activations,
    others: Others,
) -> tuple[nnx.State, Activations]:
    """The statistics with those of one batch in them, and the block's output if it is wanted."""
    running = nnx.merge(graphdef, statistics, rest)
    y = call(running, x, others)
    return nnx.state(running, _Statistic), y if wanted else None


def _statistics(name: str, observer: Observer) -> Statistics:
    rows, passed = int(observer.rows[...]), int(observer.passed[...])
    if not passed:
        raise InputError(f"{spoken(name)}: calibration never called this layer; call it, or ignore it")
    lots = np.asarray(observer.lots[...])
    absmax = np.asarray((observer.absmax_of_all if rows < min(len(lots), passed) else observer.absmax)[...])
    if not np.isfinite(absmax).all():
        raise InputError(
            f"{spoken(name)}: calibration met a non-finite activation in channel {int(np.argmin(np.isfinite(absmax)))}"
        )
    return Statistics(absmax, np.asarray(observer.samples[...])[lots >= 0], rows, passed)
