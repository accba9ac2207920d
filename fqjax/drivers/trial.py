"""How much the model's output suffers when one layer alone is quantized.

The error of a layer's own output says little about this: a layer that writes small corrections into the residual stream
can be coarse, one that feeds attention scores cannot.  So every layer is tried for real: its block runs with both versions
of each layer behind a switch, then the blocks behind it run as they are.  That costs half as many forward passes as there
are layers, and two compiled programs.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.surgery import replace_modules
from fqjax.models.chain import Chain, Feed, Simulated, as_arguments, places, run
from fqjax.runtime.compiling import jit


class _Number(nnx.Variable):
    """Number of the layer that runs quantized; all probes of a block hold one and the same."""


class Probe(nnx.Module):
    """Runs the quantized layer if its number is up, else the float one."""

    def __init__(self, linear: nnx.Linear, quantized: Simulated, number: int, up: _Number):
        self.linear, self.quantized, self.number, self.up = linear, quantized, number, up

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        return jax.lax.cond(self.up[...] == self.number, self.quantized, self.linear, x)


def sensitivities(
    parts: Chain,
    names: Iterable[str],
    low: Callable[[str, nnx.Module], Mapping[str, QuantizedLinear]],
    batch: Any,
    go: Callable[..., Iterable[Any]],
    units: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, float]:
    """Runs a batch through a model with one layer quantized at a time.

    One block is needed at a time: the outputs with each of the layers tried so far go through it.

    Args:
      parts: the float model.
      names: of the layers to try, in the order of the blocks.
      low: (path, block) -> quantized layers by dotted path in the block; called block after block.
      batch: one model input, as :func:`fqjax.drivers.statistics.calibrate` takes them.
      go: goes through the blocks, as :func:`fqjax.models.chain.sweep` does.
      units: layers that are tried together, by a name for them, by which the result has them; each on its own by default.

    Returns:
      For each layer, or unit, the divergence of the model's output from the float model's (:func:`divergence`).
    """
    feed, inside = Feed(parts, [batch]), places(parts.blocks, names)
    unit = {name: label for label, some in (units or {}).items() for name in some}
    labels = {
        path: list(dict.fromkeys(unit.get(name, name) for name in some.values())) for path, some in inside.items()
    }

    def step(path: str, block: nnx.Module, inputs: Iterable[Any]) -> Iterator[Any]:
        # First the exact output; then those with one of the layers in front quantized; then those with one of this block's.
        plain, others, exact = nnx.split(block), None, None
        for x in inputs:
            if others is None:
                (exact, others), *_ = feed.paired([x])
            yield run(parts, plain, x, others)
        numbers = {short: labels[path].index(unit.get(name, name)) for short, name in inside[path].items()}
        graphdef, up, rest = nnx.split(_probed(block, low(path, block), numbers), _Number, ...)
        for number in range(len(labels[path])):
            yield _run_probed(parts.call, graphdef, up, rest, jnp.int32(number), exact, others)

    outputs = iter(go(parts.blocks, feed.first, step, "measuring sensitivity", keep_last=True))
    exact, is_text = parts.end(next(outputs)), _is_token_batch(as_arguments(batch)[0])
    tried = [label for path in parts.blocks for label in labels[path]]
    return {name: float(divergence(exact, parts.end(y), is_text)) for name, y in zip(tried, outputs, strict=True)}


def _probed(block: nnx.Module, low: Mapping[str, QuantizedLinear], numbers: Mapping[str, int]) -> nnx.Module:
    up = _Number(jnp.int32(-1))
    return replace_modules(
        block,
        lambda path, node: Probe(node, Simulated(low[path]), numbers[path], up) if path in numbers else node,
    )


@functools.partial(jit, static_argnums=(0, 1))
def _run_probed(
    call: Callable[..., Any], graphdef: Any, up: Any, rest: Any, number: Int32[Array, ""], x: Any, others: Any
) -> Any:
    chosen = jax.tree.map(lambda _: number, up)
    return call(nnx.merge(graphdef, chosen, rest), x, others)


def divergence(exact: Any, approximate: Any, is_text: bool) -> Float32[Array, ""]:
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


def _floats(tree: Any) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _is_token_batch(args: tuple[Any, ...]) -> bool:
    return bool(args) and jnp.issubdtype(jnp.asarray(args[0]).dtype, jnp.integer)
