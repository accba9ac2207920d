"""Rounds a model's weights block by block, so that every layer makes up for the errors in front of it.

A block gets its inputs twice: from the float model, and from the blocks before it as they were quantized.  From both the
layers' inputs X and X' are taken, and with Q(X') as the quantized layer will see them, the moments

    G = sum Q(X')^T Q(X'),      C = sum Q(X')^T (X' + r (X - X'))

over all calibration rows; for an expert over those that are sent to it, times the squared weight of its output, and
with hardly any weight over the others.  The weight that makes the best of Q(X') is (G + d)^-1 (C + d) W
(:func:`fqjax.core.rounding.gptq.absorb`); it is rounded by GPTQ with G as its Hessian.  Then the quantized block is
run, and what it gives goes to the next one.  The layers of one block see what their neighbours, rounded to the nearest,
make of the block's input.

r says how much of the error of the blocks in front a layer takes back.  A least-squares fit to inputs with errors makes
weights smaller, layer after layer, so r = 1 can cost more than it gains (``scripts/ablation.py`` compares).  Where the
inputs have hardly an error of their own, in INT8, the weight is left where it is and only rounded by GPTQ.

A model that does not say what its blocks are is one block.  Quantized layers are simulated (:mod:`fqjax.models.chain`),
so that one compiled program serves all blocks.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32

from fqjax.core.formats.uniform import Grid, WideLinear, represented
from fqjax.core.rounding.gptq import Prepared, aim_of, gptq_prepared, prepare, solve_ridge
from fqjax.drivers.settings import Compensated
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.surgery import dotted, find_linears, replace_modules
from fqjax.layers.taps import Watcher
from fqjax.models.chain import Chain, Feed, Simulated, run
from fqjax.runtime.compiling import jit
from fqjax.runtime.memory import give_back

UNUSED = 1e-3
"""How much a row counts that is not sent to an expert, next to one of which nothing else is used: what an expert that
calibration never or hardly reached is rounded by."""

STRIPE = 512
"""Rows of a moment that are added to at once."""


class Moments(NamedTuple):
    """G and C above, (K, K), of smoothed inputs; C is None where the weight is left where it is."""

    gram: Float32[Array, "k k"]
    cross: Float32[Array, "k k"] | None


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


def twice(feed: Feed) -> list[tuple[Any, Any]]:
    """The first block's inputs, from the float model and from the quantized one: they are still the same."""
    return [(x, x) for x in feed.first()]


def compensated(
    parts: Chain,
    block: nnx.Module,
    rough: Callable[[], Mapping[str, QuantizedLinear]],
    grids: Mapping[str, Grid],
    feed: Feed,
    inputs: Iterable[tuple[Any, Any]],
    finish: Mapping[str, Callable[[Callable[[], WideLinear]], QuantizedLinear]],
    rounding: Compensated,
) -> dict[str, QuantizedLinear]:
    """Rounds the weights of a block's quantized layers anew; all are named by their dotted path in the block.

    Args:
      parts: what the block belongs to.
      block: of the float model.
      rough: makes its quantized layers, weights rounded to the nearest; called once, if at all.
      grids: the grid of each.
      feed: the batches.
      inputs: of the block, from the float model and from the quantized blocks in front; gone through once, if at all.
      finish: makes each layer of a function that works its integer view out.
      rounding: its ``upstream`` is r above, its ``damping`` gives d.
    """
    linears = find_linears(block)

    @functools.cache
    def moments() -> dict[str, Moments]:
        return _moments(parts.call, block, rough, grids, feed.paired(inputs), rounding.upstream)

    def view(short: str) -> WideLinear:
        found = moments().pop(short)
        rounded = _rounded(linears[short].kernel[...].T, grids[short], found, rounding.damping)
        give_back()
        return rounded

    return {short: make(functools.partial(view, short)) for short, make in finish.items()}


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
    rough: Callable[[], Mapping[str, QuantizedLinear]],
    grids: Mapping[str, Grid],
    inputs: Iterable[tuple[tuple[Any, Any], Any]],
    upstream: float,
) -> dict[str, Moments]:
    """The moments of all layers of a block, over all batches."""
    exact_def, exact = nnx.split(replace_modules(block, lambda path, node: _Tap(node) if path in grids else node))
    approximate_def, approximate = nnx.split(
        replace_modules(block, {path: _Tap(Simulated(layer)) for path, layer in rough().items()})
    )
    rounding = {path: _Rounding.of(grid) for path, grid in grids.items()}
    moments = {path: _no_moments(grid) for path, grid in grids.items()}
    for (x, seen), others in inputs:
        found = _inputs(call, exact_def, approximate_def, exact, approximate, rounding, upstream, x, seen, others)
        moments = {path: _with_rows(moments[path], *rows) for path, rows in found.items()}
        jax.block_until_ready(moments)  # Else what the next batches need would be there already.
        give_back()
    return moments


def _no_moments(grid: Grid) -> Moments:
    shape = (len(grid.smoothing),) * 2
    gram = jnp.zeros(shape, jnp.float32)
    return Moments(gram, jnp.zeros(shape, jnp.float32) if grid.x_bits == 4 else None)


@functools.partial(jit, static_argnums=(0, 1, 2))
def _inputs(
    call: Callable[..., Any],
    exact_def: Any,
    approximate_def: Any,
    exact_state: Any,
    approximate_state: Any,
    rounding: dict[str, _Rounding],
    upstream: float,
    x: Any,
    seen: Any,
    others: Any,
) -> dict[str, tuple[Float32[Array, "rows k"], Float32[Array, "rows k"], Float32[Array, "rows k"]]]:
    """For every layer and one batch Q(X') times how much its rows count, Q(X'), and what stands beside it in C."""
    exact, approximate = nnx.merge(exact_def, exact_state), nnx.merge(approximate_def, approximate_state)
    call(exact, x, others)
    call(approximate, seen, others)
    wanted, given = _taken(exact), _taken(approximate)
    found = {}
    for path, rule in rounding.items():
        (x_wanted, _), (x_given, counts) = wanted[path], given[path]
        rows = represented(x_given, rule.multiplier, rule.limit, rule.x_scale)
        found[path] = rows * counts[:, None], rows, (x_given + upstream * (x_wanted - x_given)) / rule.smoothing
    return found


def _with_rows(
    moments: Moments, weighted: Float32[Array, "rows k"], rows: Float32[Array, "rows k"], aim: Float32[Array, "rows k"]
) -> Moments:
    cross = None if moments.cross is None else _plus_product(moments.cross, weighted, aim)
    return Moments(_plus_product(moments.gram, weighted, rows), cross)


# Donated, and added to in place: moments are the largest arrays there are.
@functools.partial(jit, donate_argnums=0)
def _plus_product(
    total: Float32[Array, "k k"], left: Float32[Array, "rows k"], right: Float32[Array, "rows k"]
) -> Float32[Array, "k k"]:
    """``total + left.T @ right``, some of its rows at a time."""
    whole, rest = divmod(len(total), STRIPE)

    def add(start: Any, width: int, total: Array) -> Array:
        old = lax.dynamic_slice_in_dim(total, start, width, 0)
        product = lax.dynamic_slice_in_dim(left, start, width, 1).T @ right
        return lax.dynamic_update_slice_in_dim(total, old + product, start, 0)

    if whole:
        total = lax.fori_loop(0, whole, lambda i, total: add(i * STRIPE, STRIPE, total), total)
    return add(whole * STRIPE, rest, total) if rest else total


def _taken(module: nnx.Module) -> dict[str, tuple[Float32[Array, "rows k"], Float32[Array, " rows"]]]:
    """Every layer's input, and how much its rows count."""
    taps = {dotted(path): node for path, node in nnx.iter_graph(module) if isinstance(node, _Tap)}
    return {path: (tap.seen.get_value(), tap.counts.get_value()) for path, tap in taps.items()}


def _rounded(weight: Float[Array, "n k"], grid: Grid, moments: Moments, damping: float) -> WideLinear:
    """The weight that makes up for the errors in its input, rounded so that it makes up for its own.

    The moments are used up.  It goes step by step, so that no more arrays of their size are there at once than must be.
    """
    target = _smoothed(weight, grid.smoothing)
    if moments.cross is not None:
        aim = jax.block_until_ready(_aim_of(target, *moments, damping=damping))
        moments.cross.delete()
        target = _solve_ridge(moments.gram, aim, damping=damping)
        del aim
    prepared = jax.block_until_ready(_prepare(moments.gram, damping=damping))
    return jax.block_until_ready(_round_in_order(target, grid, prepared))


_aim_of = jit(aim_of, static_argnames="damping")
_solve_ridge = jit(solve_ridge, static_argnames="damping")
_prepare = jit(functools.partial(prepare, act_order=True), static_argnames="damping", donate_argnums=0)


@jax.jit
def _smoothed(weight: Float[Array, "n k"], smoothing: Float32[Array, " k"]) -> Float32[Array, "n k"]:
    return weight.astype(jnp.float32) * smoothing


@jit
def _round_in_order(target: Float32[Array, "n k"], grid: Grid, prepared: Prepared) -> WideLinear:
    lowest, largest = grid.code_range
    steps = jnp.atleast_2d(grid.steps)  # Not as large as the weight unless it has groups.

    def quantize_column(column: Array, i: Array) -> Array:
        step = steps[:, i] if steps.shape[1] > 1 else steps[:, 0]
        return jnp.clip(jnp.round(column / step), lowest[i], largest[i]) * step

    return grid.with_smoothed(gptq_prepared(target, prepared, quantize_column))
