"""How much the model's output suffers when one layer alone is quantized.

The error of a layer's own output says little about this: a layer that writes small corrections into the residual stream
can be coarse, one that feeds attention scores cannot.  So every layer is tried for real.  One compiled program holds both
versions of each layer behind a switch; running it once for every layer costs as many forward passes as there are layers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from fqjax.calibration import as_arguments, inference_view
from fqjax.linear import QuantizedLinear
from fqjax.progress import track
from fqjax.surgery import replace_modules


class _Switch(nnx.Variable):
    """Number of the layer that runs quantized; one variable, shared by all probes."""


class Probe(nnx.Module):
    """Runs the quantized layer if the switch has its number, else the float one."""

    def __init__(self, linear: nnx.Linear, quantized: QuantizedLinear, number: int, switch: _Switch):
        self.linear, self.quantized, self.number, self.switch = linear, quantized, number, switch

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        return jax.lax.cond(self.switch[...] == self.number, self.quantized, self.linear, x)


def output_sensitivity(model: nnx.Module, candidates: Mapping[str, QuantizedLinear], batch: Any) -> dict[str, float]:
    """Runs a batch through the model with one layer quantized at a time.

    Args:
      model: the float model.
      candidates: quantized layers by dotted path.
      batch: one model input, as :func:`fqjax.calibration.calibrate` takes them.

    Returns:
      For each candidate the divergence of the model's output from the float model's (:func:`divergence`).
    """
    args, kwargs = as_arguments(batch)
    switch = _Switch(jnp.int32(-1))
    numbers = {name: i for i, name in enumerate(candidates)}

    def probe(name: str, node: Any) -> Any:
        return Probe(node, candidates[name], numbers[name], switch) if name in numbers else node

    graphdef, switches, rest = nnx.split(inference_view(replace_modules(model, probe)), _Switch, ...)

    @jax.jit
    def run(rest: Any, number: Int32[Array, ""], args: Any, kwargs: Any) -> Any:
        chosen = jax.tree.map(lambda _: number, switches)
        return nnx.merge(graphdef, chosen, rest)(*args, **kwargs)

    is_text = _is_token_batch(args)
    exact = run(rest, jnp.int32(-1), args, kwargs)
    return {
        name: float(divergence(exact, run(rest, jnp.int32(numbers[name]), args, kwargs), is_text))
        for name in track(numbers, "measuring sensitivity")
    }


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
