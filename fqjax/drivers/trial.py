"""How much the model's output suffers when one layer alone is quantized.

The error of a layer's own output says little about this: a layer that writes small corrections into the residual stream
can be coarse, one that feeds attention scores cannot.  So every layer is tried for real: its block runs with both versions
of each layer chosen by a switch, then the blocks after it run as they are.  That costs half as many forward passes as there
are layers, and two compiled programs.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from fqjax.core.layer import LayerPlan
from fqjax.drivers.base import BlockRun, Pass, Run
from fqjax.drivers.flow import Activations, Batch, Others
from fqjax.layers.simulated import Simulated
from fqjax.layers.surgery import replace_modules
from fqjax.layers.taps import StandIn
from fqjax.models.chain import Chain, Feed, as_arguments, places, run, sweep
from fqjax.runtime.compiling import jit


class _Number(nnx.Variable):
    """Number of the layer that runs quantized; all probes of a block hold one and the same."""


class Probe(StandIn):
    """Runs the quantized layer if its number is up, else the float one."""

    def __init__(self, linear: nnx.Linear, quantized: Simulated, number: int, up: _Number):
        self.linear, self.quantized, self.number, self.up = linear, quantized, number, up

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        return jax.lax.cond(self.up[...] == self.number, self.quantized, self.linear, x)


class Trial(Pass):
    """Every layer, or all of a unit together, quantized alone to its last option; ``store["sensitivities",]`` by unit."""

    name, title = "tried", "measuring sensitivity"
    batches, keeps_outputs = 1, True

    def needed(self, run: Run) -> bool:
        options = [run.store["outlines", name] for name in run.linears]
        return run.method.allocation.selection != "kl" and any(len(some) > 1 for some in options)

    def begin(self, run: Run) -> None:
        self.feed = Feed(run.chain, [run.first_batch])

    def block(self, block: BlockRun, inputs: Iterable[Activations]) -> Iterator[Activations]:
        run = block.run
        unit = {name: label for label, names in run.units.items() for name in names}
        labels = list(dict.fromkeys(unit[name] for name in block.names.values()))
        numbers = {short: labels.index(unit[name]) for short, name in block.names.items()}

        def low() -> dict[str, Simulated]:
            plans = {short: run.store["options", name][-1].plan for short, name in block.names.items()}
            return {short: nearest(block.linears[short], plan) for short, plan in plans.items()}

        yield from tried(run.chain, block.module, low, numbers, self.feed, inputs)

    def end(self, run: Run, outputs: Iterable[Activations]) -> None:
        unit = {name: label for label, names in run.units.items() for name in names}
        labels = dict.fromkeys(unit[name] for names in run.inside.values() for name in names.values())
        run.store["sensitivities",] = divergences(run.chain, list(labels), run.first_batch, outputs)


def nearest(linear: nnx.Linear, plan: LayerPlan) -> Simulated:
    """A layer with its weight rounded to the nearest codes of a plan."""
    return Simulated.of(linear, plan, rounded(plan, linear.kernel[...]))


def rounded(plan: LayerPlan, kernel: Float[Array, "k n"]) -> Int[Array, "n k"]:
    """The nearest codes of a linear layer's kernel.

    Not jitted: in one program XLA would multiply with the reciprocal of a row's step, which rounds ties another way.
    """
    return plan.round(kernel.T.astype(jnp.float32))


def sensitivities(
    parts: Chain, names: Iterable[str], low: Callable[[str, nnx.Module], Mapping[str, Simulated]], batch: Batch
) -> dict[str, float]:
    """Run a batch through a model with one layer quantized at a time.

    One block is needed at a time: the outputs with each of the layers tried so far go through it.

    Args:
      parts: the float model.
      names: of the layers to try, in the order of the blocks.
      low: (path, block) -> simulated layers by dotted path in the block; called block after block.
      batch: one model input, as :func:`fqjax.drivers.statistics.calibrate` takes them.

    Returns:
      For each layer the divergence of the model's output from the float model's (:func:`divergence`).
    """
    feed, inside = Feed(parts, [batch]), places(parts.blocks, names := list(names))

    def step(path: str, block: nnx.Module, inputs: Iterable[Activations]) -> Iterator[Activations]:
        numbers = {short: i for i, short in enumerate(inside[path])}
        return tried(parts, block, functools.partial(low, path, block), numbers, feed, inputs)

    outputs = sweep(parts.blocks, feed.first, step, Trial.title, keep_last=True)
    return divergences(parts, [name for path in parts.blocks for name in inside[path].values()], batch, outputs)


def tried(
    parts: Chain,
    block: nnx.Module,
    low: Callable[[], Mapping[str, Simulated]],
    numbers: Mapping[str, int],
    feed: Feed,
    inputs: Iterable[Activations],
) -> Iterator[Activations]:
    """Outputs of a block: of the exact input, of those with a layer of the blocks before quantized, and of the exact input
    with one of this block's layers quantized.

    Args:
      parts: what the block belongs to.
      block: of the float model.
      low: makes its quantized layers, by dotted path in the block; called once.
      numbers: of its layers; those of one number are tried together.
      feed: of one batch.
      inputs: of the block, the exact one first.
    """
    plain, others, exact = nnx.split(block), None, None
    for x in inputs:
        if others is None:
            (exact, others), *_ = feed.paired([x])
        yield run(parts, plain, x, others)
    graphdef, up, rest = nnx.split(_probed(block, low(), numbers), _Number, ...)
    for number in range(max(numbers.values(), default=-1) + 1):
        yield _run_probed(parts.call, graphdef, up, rest, jnp.int32(number), exact, others)


def divergences(parts: Chain, labels: Iterable[str], batch: Batch, outputs: Iterable[Activations]) -> dict[str, float]:
    """Divergence of each of the last block's outputs from the first of them, by a label each."""
    outputs = iter(outputs)
    exact, is_text = parts.end(next(outputs)), _is_token_batch(as_arguments(batch)[0])
    return {name: float(divergence(exact, parts.end(y), is_text)) for name, y in zip(labels, outputs, strict=True)}


def _probed(block: nnx.Module, low: Mapping[str, Simulated], numbers: Mapping[str, int]) -> nnx.Module:
    up = _Number(jnp.int32(-1))
    return replace_modules(
        block,
        lambda path, node: Probe(node, low[path], numbers[path], up) if path in numbers else node,
    )


@functools.partial(jit, static_argnums=(0, 1))
def _run_probed(
    call: Callable[..., Activations],
    graphdef: nnx.GraphDef,
    up: nnx.State,
    rest: nnx.State,
    number: Int32[Array, ""],
    x: Activations,
    others: Others,
) -> Activations:
    chosen = jax.tree.map(lambda _: number, up)
    return call(nnx.merge(graphdef, chosen, rest), x, others)


def divergence(exact: Activations, approximate: Activations, is_text: bool) -> Float32[Array, ""]:
    """Distance of two outputs of a model.

    Args:
      exact, approximate: the model's output with and without approximation: an array, or any tree of arrays.
      is_text: whether the output is logits of a token model.

    Returns:
      For logits, the mean Kullback-Leibler divergence of the next-token distributions, in nats.  For anything else, the
      squared difference of all floating-point outputs over their squared magnitude.
    """
    if is_text and isinstance(exact, jax.Array):
        return _mean_divergence(exact, approximate)
    return _relative_difference(_floats(exact), _floats(approximate))


@jax.jit
def _mean_divergence(exact: Float[Array, "... v"], approximate: Float[Array, "... v"]) -> Float32[Array, ""]:
    log_p = jax.nn.log_softmax(exact.astype(jnp.float32))
    log_q = jax.nn.log_softmax(approximate.astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


@jax.jit
def _relative_difference(exact: list[Array], approximate: list[Array]) -> Float32[Array, ""]:
    error = sum(
        jnp.sum((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2) for a, b in zip(exact, approximate, strict=True)
    )
    power = sum(jnp.sum(a.astype(jnp.float32) ** 2) for a in exact)
    return jnp.asarray(error / jnp.maximum(power, jnp.finfo(jnp.float32).tiny), jnp.float32)


def _floats(tree: object) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _is_token_batch(args: tuple[object, ...]) -> bool:
    return bool(args) and jnp.issubdtype(jnp.asarray(args[0]).dtype, jnp.integer)
