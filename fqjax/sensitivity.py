"""How much the model's output suffers when one layer alone is quantized.

The error of a layer's own output says little about this: a layer that writes small corrections into the residual stream
can be coarse, one that feeds attention scores cannot.  So every layer is tried for real: its block runs with both versions
of each layer behind a switch, then the blocks behind it run as they are.  That costs half as many forward passes as there
are layers, and two compiled programs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from fqjax.blocks import Simulated, chain, run
from fqjax.calibration import as_arguments
from fqjax.linear import QuantizedLinear
from fqjax.progress import track
from fqjax.surgery import replace_modules


class _Number(nnx.Variable):
    """Number of the layer that runs quantized; all probes of a block hold one and the same."""


class Probe(nnx.Module):
    """Runs the quantized layer if its number is up, else the float one."""

    def __init__(self, linear: nnx.Linear, quantized: Simulated, number: int, up: _Number):
        self.linear, self.quantized, self.number, self.up = linear, quantized, number, up

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        return jax.lax.cond(self.up[...] == self.number, self.quantized, self.linear, x)


def output_sensitivity(model: nnx.Module, candidates: Mapping[str, QuantizedLinear], batch: Any) -> dict[str, float]:
    """Runs a batch through the model with one layer quantized at a time.

    Args:
      model: the float model.
      candidates: quantized layers by dotted path.
      batch: one model input, as :func:`fqjax.calibration.calibrate` takes them.

    Returns:
      For each candidate the divergence of the model's output from the float model's (:func:`divergence`).
    """
    parts = chain(model, candidates)
    x, others = parts.begin(batch)
    plain = [nnx.split(block) for block in parts.blocks.values()]
    inputs = []  # of every block
    for block in plain:
        inputs.append(x)
        x = run(parts, block, x, others)
    exact, is_text = parts.end(x), _is_token_batch(as_arguments(batch)[0])
    found: dict[str, float] = {}
    for i, (path, block) in enumerate(track(parts.blocks.items(), "measuring sensitivity", len(plain))):
        start = f"{path}." if path else ""
        names = [name for name in candidates if name.startswith(start)]
        up = _Number(jnp.int32(-1))
        numbers = {name.removeprefix(start): number for number, name in enumerate(names)}
        probed = replace_modules(
            block,
            lambda short, node, numbers=numbers, start=start, up=up: (
                Probe(node, Simulated(candidates[start + short]), numbers[short], up) if short in numbers else node
            ),
        )
        graphdef, up_state, rest = nnx.split(probed, _Number, ...)
        for number, name in enumerate(names):
            x = _run_probed(parts.call, graphdef, up_state, rest, jnp.int32(number), inputs[i], others)
            for later in plain[i + 1 :]:
                x = run(parts, later, x, others)
            found[name] = float(divergence(exact, parts.end(x), is_text))
    return {name: found[name] for name in candidates}


@functools.partial(jax.jit, static_argnums=(0, 1))
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
