"""Rounds a model's weights block by block, so that every layer makes up for the errors before it.

A block gets its inputs twice: from the float model, and from the blocks before it as they were quantized.  From both the
layers' inputs X and X' are taken, and with Q(X') as the quantized layer will see them, the moments

    G = sum Q(X')^T Q(X'),      C = sum Q(X')^T (X' + r (X - X'))

over all calibration rows, those of every call of a layer that is called several times; for an expert over those that
are sent to it, times the squared weight of its output, and with hardly any weight over the others.  The weight that makes
the best of Q(X') is (G + d)^-1 (C + d) W (:mod:`fqjax.drivers.compensation`); it is rounded by GPTQ with G as its Hessian.
Then the quantized block is run, and what it gives goes to the next one.  The layers of one block see what their neighbours,
rounded to the nearest, make of the block's input.

r says how much of the error of the blocks before a layer takes back.  A least-squares fit to inputs with errors makes
weights smaller, layer after layer, so r = 1 can cost more than it gains (``scripts/ablation.py`` compares).  Where the
inputs have hardly an error of their own, in INT8, the weight is left where it is and only rounded by GPTQ.

A model that does not say what its blocks are is one block.  Quantized layers are simulated (:mod:`fqjax.models.chain`),
so that one compiled program serves all blocks.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int

from fqjax.core.inputs import InputQuantizer
from fqjax.core.layer import LayerPlan, fake_input
from fqjax.core.rounding.gptq import DAMPING
from fqjax.core.transforms.base import Transform
from fqjax.drivers.compensation import Moments, rounded_weight
from fqjax.drivers.flow import Activations, Others, Pair
from fqjax.drivers.passed_rows import count_rows, take_rows, tapped
from fqjax.layers.simulated import Simulated
from fqjax.layers.surgery import find_linears, replace_modules
from fqjax.models.chain import Chain, Feed, run
from fqjax.runtime.compiling import jit
from fqjax.runtime.memory import give_back

STRIPE_ROWS = 512
"""Rows of a moment that are added to at once."""


class _Rounding(NamedTuple):
    """The quantization of a layer's input: arrays alone, so that 4 or 8 bits are the same to the compiler."""

    transform: Transform
    inputs: InputQuantizer


def twice(feed: Feed) -> list[Pair]:
    """The first block's inputs, from the float model and from the quantized one: they are still the same."""
    return [(x, x) for x in feed.first()]


def compensated(
    parts: Chain,
    block: nnx.Module,
    rough: Callable[[], Mapping[str, Simulated]],
    plans: Mapping[str, LayerPlan],
    feed: Feed,
    inputs: Iterable[Pair],
    upstream: float,
    damping: float = DAMPING,
) -> dict[str, Callable[[], Int[Array, "n k"]]]:
    """Round the weights of a block's quantized layers anew; all are named by their dotted path in the block.

    Args:
      parts: what the block belongs to.
      block: of the float model.
      rough: makes its quantized layers, weights rounded to the nearest; called once, if at all.
      plans: the plan of each.
      feed: the batches.
      inputs: of the block, from the float model and from the quantized blocks before; gone through once, if at all.
      upstream: r above.
      damping: of the moments, relative to the mean of their diagonal; more where there is no Cholesky factor.

    Returns:
      For each layer a function that rounds its weight to codes; called once each, as the moments are used up.
    """
    linears = find_linears(block)

    @functools.cache
    def moments() -> dict[str, Moments]:
        return _moments(parts.call, block, rough, plans, feed.paired(inputs), upstream)

    def codes(short: str) -> Int[Array, "n k"]:
        found = moments().pop(short)
        rounded = rounded_weight(linears[short].kernel[...].T, plans[short], found, damping)
        give_back()
        return rounded

    return {short: functools.partial(codes, short) for short in plans}


def propagated(
    parts: Chain,
    block: nnx.Module,
    layers: Mapping[str, Simulated],
    feed: Feed,
    inputs: Iterable[Pair],
) -> Iterator[Pair]:
    """Outputs of the float block, and of it with quantized layers, for the inputs that :func:`compensated` takes."""
    quantized = nnx.split(replace_modules(block, layers))
    plain = nnx.split(block)
    for (exact, approximate), others in feed.paired(inputs):
        yield run(parts, plain, exact, others), run(parts, quantized, approximate, others)


def _moments(
    call: Callable[..., Activations],
    block: nnx.Module,
    rough: Callable[[], Mapping[str, Simulated]],
    plans: Mapping[str, LayerPlan],
    inputs: Iterable[tuple[Pair, Others]],
    upstream: float,
) -> dict[str, Moments]:
    """The moments of all layers of a block, over all batches."""
    linears = find_linears(block)
    exact, approximate = tapped(block, {path: linears[path] for path in plans}), tapped(block, rough())
    rounding = {path: _Rounding(plan.transform, plan.inputs) for path, plan in plans.items()}
    moments = {path: _no_moments(linears[path].in_features, plan) for path, plan in plans.items()}
    for (x, seen), others in inputs:
        counted = count_rows(call, *exact, x, others), count_rows(call, *approximate, seen, others)
        room = tuple((path, max(int(counts[path]) for counts in counted)) for path in plans)
        found = _inputs(
            call, exact[0], approximate[0], room, exact[1], approximate[1], rounding, upstream, x, seen, others
        )
        moments = {path: _with_rows(moments[path], *rows) for path, rows in found.items()}
        jax.block_until_ready(moments)  # Else what the next batches need would be there already.
        give_back()
    return moments


def _no_moments(k: int, plan: LayerPlan) -> Moments:
    gram = jnp.zeros((k, k), jnp.float32)
    return Moments(gram, jnp.zeros_like(gram) if plan.inputs.is_coarse() else None)


@functools.partial(jit, static_argnums=(0, 1, 2, 3))
def _inputs(
    call: Callable[..., Activations],
    exact_def: nnx.GraphDef,
    approximate_def: nnx.GraphDef,
    room: tuple[tuple[str, int], ...],
    exact_state: nnx.State,
    approximate_state: nnx.State,
    rounding: dict[str, _Rounding],
    upstream: float,
    x: Activations,
    seen: Activations,
    others: Others,
) -> dict[str, tuple[Float32[Array, "rows k"], Float32[Array, "rows k"], Float32[Array, "rows k"]]]:
    """For every layer and one batch Q(X') times how much its rows count, Q(X'), and what stands beside it in C."""
    wanted = take_rows(call, exact_def, exact_state, x, others, dict(room))
    given = take_rows(call, approximate_def, approximate_state, seen, others, dict(room))
    found = {}
    for path, rule in rounding.items():
        x_given, weights, _ = given[path]
        # A loop may end later in the quantized model; what it then does has no counterpart.
        paired = jnp.arange(len(x_given)) < wanted[path].number
        x_wanted = jnp.where(paired[:, None], wanted[path].rows, x_given)
        rows = fake_input(rule.transform, rule.inputs, x_given)
        aim = rule.transform.inputs(x_given + upstream * (x_wanted - x_given))
        found[path] = rows * weights[:, None], rows, aim
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
    whole, rest = divmod(len(total), STRIPE_ROWS)

    def add(start: int | Int[Array, ""], width: int, total: Array) -> Array:
        old = lax.dynamic_slice_in_dim(total, start, width, 0)
        product = lax.dynamic_slice_in_dim(left, start, width, 1).T @ right
        return lax.dynamic_update_slice_in_dim(total, old + product, start, 0)

    if whole:
        total = lax.fori_loop(0, whole, lambda i, total: add(i * STRIPE_ROWS, STRIPE_ROWS, total), total)
    return add(whole * STRIPE_ROWS, rest, total) if rest else total
