"""Plans with grouped weights, with AWQ's scaling and with folded scales (:class:`fqjax.methods.base.GroupedMethod`)."""

from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from fqjax.core.codes import qmax
from fqjax.core.excitation import known_channels, with_typical
from fqjax.core.formats.grouped import Grouped, GroupedGrid
from fqjax.core.inputs import Floating, PerToken
from fqjax.core.integer_scale import fold_scales
from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.core.stored_inputs import FLOATING_BITS, FloatingInput, PerTokenInput, StoredInput
from fqjax.core.transforms.diagonal import Diagonal

AWQ_EXPONENTS = tuple(i / 20 for i in range(20))
"""Candidates for the exponent of the mean activation in AWQ's scaling."""
GROUP_SCALE_FRACTIONS = tuple(1 - i / 20 for i in range(11))
"""Candidates for the largest weight of a group that is not clipped, relative to its largest."""


@runtime_checkable
class GroupSettings(Protocol):
    """Settings that plans of grouped weights depend on."""

    @property
    def group_size(self) -> int:
        """Neighbouring input channels that share a scale."""
        ...

    @property
    def activation_bits(self) -> int:
        """Bits of the activations of layers with 4-bit weights."""
        ...


def formats(
    method: GroupSettings, bits: int, scales: Literal["float", "integer", "folded"] = "float"
) -> tuple[Grouped, type[StoredInput]]:
    """Stored types of a layer: the weight's format, with scales of some kind, and the quantizer of its input.

    Codes of 8 bits leave no room for scales that are folded; theirs, the same integers, stay beside them.
    """
    scales = "integer" if scales == "folded" and bits == 8 else scales
    form = Grouped(
        bits=bits,  # pyright: ignore[reportArgumentType]
        group_size=method.group_size,
        scales=scales,
        granularity="tensor" if scales == "float" else "channel",
    )
    return form, FloatingInput if activation_bits(method, bits) == FLOATING_BITS else PerTokenInput


def activation_bits(method: GroupSettings, bits: int) -> int:
    """Bits of the activations of a layer whose weight has ``bits``."""
    return method.activation_bits if bits == 4 else 8


def plans(layer: LayerInputs, method: GroupSettings, bits: int, *, awq: bool, folded: bool) -> list[LayerPlan]:
    """The one plan of a layer.

    Args:
      layer, bits: see :meth:`fqjax.drivers.method.Method.plans`.
      method: its ``group_size`` and ``activation_bits``.
      awq: whether input channels are scaled by their activations first.
      folded: whether scales are integers that are multiplied into the codes.
    """
    plain = _plan(layer, jnp.ones_like(layer.x_max), method, bits, GROUP_SCALE_FRACTIONS, folded)
    if not awq:
        return [plain]
    scaled = _plan(layer, _awq_smoothing(layer, method, bits, folded), method, bits, GROUP_SCALE_FRACTIONS, folded)
    # Factors are chosen before the scales: with the scales that are chosen then they may do worse than none.
    exact = layer.samples @ layer.weight.T
    better = _squared_error(scaled, layer, exact) <= _squared_error(plain, layer, exact)
    return [jax.tree.map(lambda one, other: jnp.where(better, one, other), scaled, plain)]


def _plan(
    layer: LayerInputs,
    smoothing: Float32[Array, " k"],
    method: GroupSettings,
    bits: int,
    shrinks: tuple[float, ...],
    folded: bool,
) -> LayerPlan:
    k = len(smoothing)
    padding = ((0, 0), (0, -k % method.group_size))  # The last group may have fewer channels.
    weight, samples = jnp.pad(layer.weight * smoothing, padding), jnp.pad(layer.samples / smoothing, padding)
    scales = group_scales(weight, samples, method.group_size, bits, shrinks)
    unit = jnp.float32(1)
    if folded:
        importance = with_typical(jnp.mean(samples**2, axis=0), known_channels(samples))
        scales, unit = fold_scales(weight, scales, importance)
    x_bits = activation_bits(method, bits)
    form, _ = formats(method, bits, "folded" if folded else "float")
    return LayerPlan(
        transform=Diagonal(factors=smoothing),
        inputs=Floating() if x_bits == FLOATING_BITS else PerToken.of(x_bits),
        grid=GroupedGrid(scale=unit, group_scale=scales, format=form),
    )


def _awq_smoothing(layer: LayerInputs, method: GroupSettings, bits: int, folded: bool) -> Float32[Array, " k"]:
    """The smoothing with the least error of the layer's output on the samples, scales from the largest weight of a group."""
    exact = layer.samples @ layer.weight.T
    mean = with_typical(jnp.mean(jnp.abs(layer.samples), axis=0), known_channels(layer.samples))

    def smoothing(exponent: Array) -> Float32[Array, " k"]:
        factors = jnp.maximum(mean**exponent, 1e-4)
        return factors / jnp.sqrt(jnp.max(factors) * jnp.min(factors))

    def error(exponent: Array) -> Array:
        return _squared_error(_plan(layer, smoothing(exponent), method, bits, (1.0,), folded), layer, exact)

    exponents = jnp.asarray(AWQ_EXPONENTS)
    return smoothing(exponents[jnp.argmin(lax.map(error, exponents))])


def _squared_error(plan: LayerPlan, layer: LayerInputs, exact: Float32[Array, "s n"]) -> Float32[Array, ""]:
    """Squared error of the output on the samples, the weight rounded to the nearest."""
    rounded = plan.grid.weight(plan.round(layer.weight))
    return jnp.sum((plan.output(layer.samples, rounded, layer.weight) - exact) ** 2)


def group_scales(
    weight: Float32[Array, "n k"],
    samples: Float32[Array, "s k"],
    group_size: int,
    bits: int,
    shrinks: tuple[float, ...] = GROUP_SCALE_FRACTIONS,
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
