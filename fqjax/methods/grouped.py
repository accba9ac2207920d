"""Grouped weights: a scale for every output channel and every group of input channels.  Activations have one for every token,
or, with 16 bits, stay as they are.

Nothing is flattened: a group keeps the codes of its neighbours fine where a channel is large.  The scale of a group is the
one of several that rounds its weights best on the calibration inputs, the largest weight over 7.5 among them.

With ``awq`` (Lin et al., MLSys 2024, arXiv 2306.00978), input channels with large activations are first made larger in the
weight, which gives them more of the group's codes: ``s = mean|x| ** r``, with the exponent that serves the layer's output
best.  AWQ folds s into the layer in front; here quantizing the activations divides by it, so every layer has its own.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fqjax.core.codes import qmax
from fqjax.core.formats.grouped import Grouped, GroupedGrid
from fqjax.core.inputs import Floating, FloatingInput, PerToken, PerTokenInput, StoredInput
from fqjax.core.integer_scale import fold_scales
from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.core.transforms.diagonal import Diagonal
from fqjax.scheme import Scheme

EXPONENTS = tuple(i / 20 for i in range(20))
SHRINKS = tuple(1 - i / 20 for i in range(11))
"""What is tried for the largest weight of a group, relative to it."""


def plans(layer: LayerInputs, scheme: Scheme, bits: int) -> list[LayerPlan]:
    """The one plan of a layer; see :mod:`fqjax.methods` for the arguments."""
    smoothing = _awq_smoothing(layer, scheme, bits) if scheme.awq else jnp.ones_like(layer.x_max)
    return [_plan(layer, smoothing, scheme, bits, SHRINKS)]


def formats(scheme: Scheme, bits: int) -> tuple[Grouped, type[StoredInput]]:
    """What is stored of a layer: the weight's format, and the quantizer of its input."""
    integer = scheme.scales != "float"
    form = Grouped(
        bits=bits,  # pyright: ignore[reportArgumentType]
        group_size=scheme.group_size,
        scales=scheme.scales,
        granularity="channel" if integer else "tensor",
    )
    return form, FloatingInput if bits == 4 and scheme.int4_activation_bits == 16 else PerTokenInput


def _plan(
    layer: LayerInputs, smoothing: Float32[Array, " k"], scheme: Scheme, bits: int, shrinks: tuple[float, ...]
) -> LayerPlan:
    k = len(smoothing)
    padding = ((0, 0), (0, -k % scheme.group_size))  # The last group may have fewer channels.
    weight, samples = jnp.pad(layer.weight * smoothing, padding), jnp.pad(layer.samples / smoothing, padding)
    scales = group_scales(weight, samples, scheme.group_size, bits, shrinks)
    unit = jnp.float32(1)
    if scheme.scales == "folded":
        scales, unit = fold_scales(weight, scales, jnp.mean(samples**2, axis=0))
    x_bits = scheme.int4_activation_bits if bits == 4 else 8
    form, _ = formats(scheme, bits)
    if scheme.scales == "integer":  # They become integers once the codes are known.
        form = dataclasses.replace(form, scales="float", granularity="tensor")
    return LayerPlan(
        transform=Diagonal(factors=smoothing),
        inputs=Floating() if x_bits == 16 else PerToken.of(x_bits),
        grid=GroupedGrid(scale=unit, group_scale=scales, format=form),
    )


def _awq_smoothing(layer: LayerInputs, scheme: Scheme, bits: int) -> Float32[Array, " k"]:
    """The smoothing with the least error of the layer's output on the samples, scales from the largest weight of a group."""
    exact = layer.samples @ layer.weight.T
    mean = jnp.mean(jnp.abs(layer.samples), axis=0)

    def smoothing(exponent: Array) -> Float32[Array, " k"]:
        factors = jnp.maximum(mean**exponent, 1e-4)
        return factors / jnp.sqrt(jnp.max(factors) * jnp.min(factors))

    def error(exponent: Array) -> Array:
        plan = _plan(layer, smoothing(exponent), scheme, bits, (1.0,))
        return jnp.sum((plan.product(layer.samples, plan.round(layer.weight)) - exact) ** 2)

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
