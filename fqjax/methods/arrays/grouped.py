"""Grids of grouped weights, with AWQ's scaling and with folded scales (:class:`fqjax.methods.base.Grouped`)."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fqjax.core.codes import qmax
from fqjax.core.formats.uniform import Grid, output
from fqjax.core.integer_scale import fold_scales
from fqjax.core.layer import LayerInputs
from fqjax.methods.base import Grouped

EXPONENTS = tuple(i / 20 for i in range(20))
SHRINKS = tuple(1 - i / 20 for i in range(11))
"""What is tried for the largest weight of a group, relative to it."""


def grids(layer: LayerInputs, method: Grouped, bits: int, *, awq: bool, folded: bool) -> Callable[[Array], Grid]:
    """The same grid for every bound.

    Args:
      layer, bits: see :meth:`fqjax.methods.Method.grids`.
      method: its ``group_size`` and ``activation_bits``.
      awq: whether input channels are scaled by their activations first.
      folded: whether scales are integers that are multiplied into the codes.
    """
    smoothing = _awq_smoothing(layer, method, bits, folded) if awq else jnp.ones_like(layer.x_max)
    grid = _grid(layer, smoothing, method, bits, SHRINKS, folded)
    return lambda _: grid


def _grid(
    layer: LayerInputs,
    smoothing: Float32[Array, " k"],
    method: Grouped,
    bits: int,
    shrinks: tuple[float, ...],
    folded: bool,
) -> Grid:
    k = len(smoothing)
    padding = ((0, 0), (0, -k % method.group_size))  # The last group may have fewer channels.
    weight, samples = jnp.pad(layer.weight * smoothing, padding), jnp.pad(layer.samples / smoothing, padding)
    scales = group_scales(weight, samples, method.group_size, bits, shrinks)
    unit = jnp.float32(1)
    if folded:
        scales, unit = fold_scales(weight, scales, jnp.mean(samples**2, axis=0))
    whole = jnp.ones(k, jnp.int32)
    return Grid(
        smoothing=smoothing,
        x_scale=None,
        w_scale=unit,
        x_pieces=whole,
        w_pieces=whole,
        x_bits=method.layout(bits).activation_bits,
        bits=bits,
        group_scale=scales,
        group_size=method.group_size,
    )


def _awq_smoothing(layer: LayerInputs, method: Grouped, bits: int, folded: bool) -> Float32[Array, " k"]:
    """The smoothing with the least error of the layer's output on the samples, scales from the largest weight of a group."""
    exact = layer.samples @ layer.weight.T
    mean = jnp.mean(jnp.abs(layer.samples), axis=0)

    def smoothing(exponent: Array) -> Float32[Array, " k"]:
        factors = jnp.maximum(mean**exponent, 1e-4)
        return factors / jnp.sqrt(jnp.max(factors) * jnp.min(factors))

    def error(exponent: Array) -> Array:
        quantized = _grid(layer, smoothing(exponent), method, bits, (1.0,), folded).round(layer.weight)
        return jnp.sum((output(quantized, layer.samples) - exact) ** 2)

    exponents = jnp.asarray(EXPONENTS)
    return smoothing(exponents[jnp.argmin(lax.map(error, exponents))])


def group_scales(
    weight: Float32[Array, "n k"],
    samples: Float32[Array, "s k"],
    group_size: int,
    bits: int,
    shrinks: tuple[float, ...] = SHRINKS,
) -> Float32[Array, "groups n"]:
    """The scale of every group that rounds its weights best, judged by the group's part of the output.

    Args:
      weight: (N, K), smoothed.
      samples: rows of the input, smoothed alike.
      group_size: a divisor of K.
      bits: 4, with codes from -8 to 7, or 8.
      shrinks: what is tried, relative to the scale that the group's largest weight asks for.
    """
    n, k = weight.shape
    groups = weight.reshape(n, k // group_size, group_size)
    parts = samples.reshape(len(samples), k // group_size, group_size)
    moments = jnp.einsum("sgi,sgj->gij", parts, parts)
    high = qmax(bits)
    low = -high - 1 if bits == 4 else -high
    largest = jnp.max(jnp.abs(groups), axis=-1)
    whole = jnp.where(largest > 0, largest, 1.0) / (high + 0.5 * (bits == 4))

    def error(shrink: Array) -> Float32[Array, "n groups"]:
        step = (whole * shrink)[..., None]
        change = jnp.clip(jnp.round(groups / step), low, high) * step - groups
        return jnp.einsum("ngi,gij,ngj->ng", change, moments, change)

    best = jnp.argmin(lax.map(error, jnp.asarray(shrinks)), axis=0)
    return (whole * jnp.asarray(shrinks)[best]).T
