"""Rounds a model's weights block by block, so that every layer makes up for the errors in front of it.

A block gets its inputs twice: from the float model, and from the blocks before it as they were quantized.  From both the
layers' inputs X and X' are taken, and with Q(X') as the quantized layer will see them, the moments

    G = sum Q(X')^T Q(X'),      C = sum Q(X')^T (X' + r (X - X'))

over all calibration rows; for an expert over those that are sent to it, times the squared weight of its output, and with
hardly any weight over the others.  The weight that makes the best of Q(X') is (G + d)^-1 (C + d) W
(:func:`fqjax.core.gptq.absorb`); it is rounded by GPTQ with G as its Hessian.  Then the quantized block is run, and what it
gives goes to the next one.  The layers of one block see what their neighbours, rounded to the nearest, make of the block's
input.

r says how much of the error of the blocks in front a layer takes back.  A least-squares fit to inputs with errors makes
weights smaller, layer after layer, so r = 1 can cost more than it gains (``scripts/ablation.py`` compares).  Where the
inputs have hardly an error of their own, in INT8, the weight is left where it is and only rounded by GPTQ.

A model that does not say what its blocks are is one block.  Quantized layers are simulated (:mod:`fqjax.blocks`), so that one
compiled program serves all blocks.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from fqjax.blocks import Chain, Feed, Simulated, chain, places, run, sweep
from fqjax.core.gptq import absorb, gptq
from fqjax.core.wide import Grid, WideLinear, represented
from fqjax.host_memory import give_back
from fqjax.linear import QuantizedLinear
from fqjax.surgery import dotted, find_linears, replace_modules
from fqjax.watching import Watcher

DAMPING = 0.01
UNUSED = 1e-3
"""How much a row counts that is not sent to an expert, next to one of which nothing else is used: what an expert that
calibration never or hardly reached is rounded by."""


class Moments(NamedTuple):
    """G and C above, (K, K), of smoothed inputs."""

    gram: Float32[Array, "k k"]
    cross: Float32[Array, "k k"]


class _Rounding(NamedTuple):
    """What becomes of a layer's input: arrays alone, so that 4 or 8 bits are the same to the compiler."""

    smoothing: Float32[Array, " k"]
    multiplier: Float32[Array, " k"]
    limit: Float32[Array, " k"]
    x_scale: Float32[Array, ""] | None

    @classmethod
    def of(cls, grid: Grid) -> "_Rounding":
        return cls(grid.smoothing, grid.multiplier, grid.x_limit, grid.x_scale)


class _Seen(nnx.Variable):
    """The last input of a layer, and how much each of its rows counts: how much of the layer's output is used, squared."""


class _Tap(Watcher):
    """Computes what its layer computes, and keeps the input."""

    def __init__(self, layer: Any):
        self.layer, self.seen, self.counts = layer, _Seen(jnp.zeros(())), _Seen(jnp.zeros(()))

    def __call__(
        self, x: Float[Array, "... k"], *args: Any, shares: Float32[Array, " rows"] | None = None, **kwargs: Any
    ) -> Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        self.seen.set_value(rows)
        self.counts.set_value(jnp.ones(len(rows)) if shares is None else jnp.maximum(shares**2, UNUSED))
        return self.layer(x, *args, **kwargs)


def compensate(
    model: nnx.Module,
    nearest: Mapping[str, QuantizedLinear],
    grids: Mapping[str, Grid],
    batches: Iterable[Any],
    finish: Callable[[str, Callable[[], WideLinear]], QuantizedLinear],
    *,
    upstream: float,
) -> dict[str, QuantizedLinear]:
    """Rounds the weights of all quantized layers anew.

    Args:
      model: the float model.
      nearest: its quantized layers, weights rounded to the nearest, by dotted path.
      grids: the grid of each.
      batches: model inputs, as :func:`fqjax.calibration.calibrate` takes them.
      upstream: r above, in [0, 1].
      finish: makes a layer of its name and of a function that works its integer view out; called block after block.

    Returns:
      The layers, by dotted path.
    """
    parts, done = chain(model, nearest), dict(nearest)
    inside, feed = places(parts.blocks, nearest), Feed(parts, list(batches))

    def step(path: str, block: nnx.Module, inputs: Iterable[Any]) -> Iterator[Any]:
        rough = {short: nearest[name] for short, name in inside[path].items()}
        local = {short: grids[name] for short, name in inside[path].items()}
        named = {short: functools.partial(finish, name) for short, name in inside[path].items()}
        layers = compensated(parts, block, rough, local, feed, inputs, named, upstream)
        done.update({inside[path][short]: layer for short, layer in layers.items()})
        if path != next(reversed(inside)):
            yield from propagated(parts, block, layers, feed, inputs)

    sweep(parts.blocks, lambda: twice(feed), step, "compensating for errors")
    return done


def twice(feed: Feed) -> list[tuple[Any, Any]]:
    """The first block's inputs, from the float model and from the quantized one: they are still the same."""
    return [(x, x) for x in feed.first()]


def compensated(
    parts: Chain,
    block: nnx.Module,
    rough: Mapping[str, QuantizedLinear],
    grids: Mapping[str, Grid],
    feed: Feed,
    inputs: Iterable[tuple[Any, Any]],
    finish: Mapping[str, Callable[[Callable[[], WideLinear]], QuantizedLinear]],
    upstream: float,
) -> dict[str, QuantizedLinear]:
    """Rounds the weights of a block's quantized layers anew; all are named by their dotted path in the block.

    Args:
      parts: what the block belongs to.
      block: of the float model.
      rough: its quantized layers, weights rounded to the nearest.
      grids: the grid of each.
      feed: the batches.
      inputs: of the block, from the float model and from the quantized blocks in front; gone through once, if at all.
      finish: makes each layer of a function that works its integer view out.
      upstream: r above.
    """
    linears = find_linears(block)

    @functools.cache
    def moments() -> dict[str, Moments]:
        found = jax.block_until_ready(_moments(parts.call, block, rough, grids, feed.paired(inputs), upstream))
        give_back()
        return found

    def view(short: str) -> Callable[[], WideLinear]:
        return lambda: _rounded(linears[short].kernel[...].T, grids[short], moments().pop(short))

    return {short: finish[short](view(short)) for short in rough}


def propagated(
    parts: Chain,
    block: nnx.Module,
    layers: Mapping[str, QuantizedLinear],
    feed: Feed,
    inputs: Iterable[tuple[Any, Any]],
) -> Iterator[tuple[Any, Any]]:
    """What the float block gives, and what it gives with quantized layers, for the inputs that :func:`compensated` takes."""
    quantized = nnx.split(replace_modules(block, {short: Simulated(layer) for short, layer in layers.items()}))
    plain = nnx.split(block)
    for (exact, approximate), others in feed.paired(inputs):
        yield run(parts, plain, exact, others), run(parts, quantized, approximate, others)


def _moments(
    call: Callable[..., Any],
    block: nnx.Module,
    rough: Mapping[str, QuantizedLinear],
    grids: Mapping[str, Grid],
    inputs: Iterable[tuple[tuple[Any, Any], Any]],
    upstream: float,
) -> dict[str, Moments]:
    """The moments of all layers of a block, over all batches."""
    exact_def, exact = nnx.split(replace_modules(block, lambda path, node: _Tap(node) if path in rough else node))
    approximate_def, approximate = nnx.split(
        replace_modules(block, {path: _Tap(Simulated(layer)) for path, layer in rough.items()})
    )
    rounding = {path: _Rounding.of(grid) for path, grid in grids.items()}
    shapes = {path: (len(grid.smoothing),) * 2 for path, grid in grids.items()}
    moments = {path: Moments(*(jnp.zeros(shape, jnp.float32) for _ in range(2))) for path, shape in shapes.items()}
    for (x, seen), others in inputs:
        moments = _add(
            call, exact_def, approximate_def, exact, approximate, rounding, upstream, moments, x, seen, others
        )
    return moments


# Donated: moments are the largest arrays there are, and a batch's are added to them in place.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=7)
def _add(
    call: Callable[..., Any],
    exact_def: Any,
    approximate_def: Any,
    exact_state: Any,
    approximate_state: Any,
    rounding: dict[str, _Rounding],
    upstream: float,
    moments: dict[str, Moments],
    x: Any,
    seen: Any,
    others: Any,
) -> dict[str, Moments]:
    """The moments with those of one batch added."""
    exact, approximate = nnx.merge(exact_def, exact_state), nnx.merge(approximate_def, approximate_state)
    call(exact, x, others)
    call(approximate, seen, others)
    wanted, given = _taken(exact), _taken(approximate)
    added = {}
    for path, rule in rounding.items():
        (x_wanted, _), (x_given, counts) = wanted[path], given[path]
        rows = represented(x_given, rule.multiplier, rule.limit, rule.x_scale)
        aim = (x_given + upstream * (x_wanted - x_given)) / rule.smoothing
        weighted = (rows * counts[:, None]).T
        gram, cross = weighted @ rows, weighted @ aim
        added[path] = Moments(moments[path].gram + gram, moments[path].cross + cross)
    return added


def _taken(module: nnx.Module) -> dict[str, tuple[Float32[Array, "rows k"], Float32[Array, " rows"]]]:
    """Every layer's input, and how much its rows count."""
    taps = {dotted(path): node for path, node in nnx.iter_graph(module) if isinstance(node, _Tap)}
    return {path: (tap.seen.get_value(), tap.counts.get_value()) for path, tap in taps.items()}


@jax.jit
def _rounded(weight: Float[Array, "n k"], grid: Grid, moments: Moments) -> WideLinear:
    """The weight that makes up for the errors in its input, rounded so that it makes up for its own."""
    target = weight.astype(jnp.float32) * grid.smoothing
    if grid.x_bits == 4:
        target = absorb(target, moments.gram, moments.cross, damping=DAMPING)
    lowest, largest = grid.code_range
    steps = jnp.broadcast_to(grid.steps, target.shape)

    def quantize_column(column: Array, i: Array) -> Array:
        return jnp.clip(jnp.round(column / steps[:, i]), lowest[i], largest[i]) * steps[:, i]

    return grid.with_smoothed(gptq(target, moments.gram, quantize_column, damping=DAMPING, act_order=True))
