"""Plans with thresholds, by rule or searched for (:mod:`fqjax.methods.flattenquant`)."""

from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fqjax.core.channels import count_pieces
from fqjax.core.codes import qmax
from fqjax.core.excitation import known_channels, with_typical
from fqjax.core.formats.uniform import Uniform, UniformGrid
from fqjax.core.inputs import Static
from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.core.stored_inputs import StaticInput
from fqjax.core.threshold_search import SMOOTHING_EXPONENTS, Found, channel_scales, search
from fqjax.core.thresholds import threshold, within_budget
from fqjax.core.transforms.diagonal import Diagonal
from fqjax.drivers.settings import Allocation
from fqjax.methods.arrays.smoothquant import smooth


@runtime_checkable
class FlattenSettings(Protocol):
    """Settings that plans depend on; see :class:`fqjax.methods.flattenquant.FlattenQuant`."""

    @property
    def alpha(self) -> float | None: ...
    @property
    def flatten_activations(self) -> bool: ...
    @property
    def flatten_weights(self) -> bool: ...
    @property
    def activation_bits(self) -> int: ...
    @property
    def weight_scales(self) -> Literal["tensor", "channel"]: ...
    @property
    def threshold_rule(self) -> Literal["tukey", "mean", "search"]: ...
    @property
    def threshold_strength(self) -> float: ...
    @property
    def threshold_strength_int8(self) -> float: ...
    @property
    def max_expansion(self) -> float: ...
    @property
    def allocation(self) -> Allocation: ...


def formats(method: FlattenSettings, bits: int) -> tuple[Uniform, type[StaticInput]]:
    """Stored types of a layer: the weight's format, and the quantizer of its input."""
    return Uniform(bits=bits, granularity=method.weight_scales), StaticInput  # pyright: ignore[reportArgumentType]


def plans(layer: LayerInputs, method: FlattenSettings, bits: int) -> list[LayerPlan]:
    """The plans of a layer, one for every bound on K'/K (:func:`budgets`)."""
    bounds = budgets(layer.weight.shape[1], method, bits)
    found = _plans(layer, method, bits, jnp.asarray(bounds, jnp.float32))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(bounds))]


def budgets(k: int, method: FlattenSettings, bits: int) -> list[float]:
    """Bounds on K'/K: the method's, or, where the bytes of layers are chosen too, as much as fills 0, 1, 2, ... blocks of
    padding.
    """
    if method.allocation.selection != "budget":
        return [method.max_expansion]
    form, _ = formats(method, bits)
    block, first = form.padded(1), form.padded(k)
    most = max(first, int(method.max_expansion * k))
    return list(dict.fromkeys(min(width / k, method.max_expansion) for width in range(first, most + block, block)))


def _plans(layer: LayerInputs, method: FlattenSettings, bits: int, bounds: Float[Array, " b"]) -> LayerPlan:
    """The plans of all bounds, with a leading axis."""
    x_bits = method.activation_bits if bits == 4 else 8
    if method.threshold_rule != "search" or bits == 8:
        return lax.map(
            lambda bound: _plan(layer, method, x_bits, bits, _by_rule(layer, method, x_bits, bits, bound)), bounds
        )
    found = search(
        layer.weight,
        layer.x_max,
        layer.samples,
        x_bits=x_bits,
        w_bits=bits,
        alphas=None if method.alpha is None else SMOOTHING_EXPONENTS,
        flatten_activations=method.flatten_activations,
        flatten_weights=method.flatten_weights and method.weight_scales == "tensor",
        budgets=bounds,
    )
    return lax.map(lambda one: _plan(layer, method, x_bits, bits, one), found)


def _plan(layer: LayerInputs, method: FlattenSettings, x_bits: int, bits: int, found: Found) -> LayerPlan:
    w_scale, w_pieces = found.w_threshold / qmax(bits), found.w_pieces
    if method.weight_scales == "channel":
        moments = jnp.mean((layer.samples / found.smoothing) ** 2, axis=0)
        importance = with_typical(moments, known_channels(layer.samples))
        w_scale, w_pieces = channel_scales(layer.weight * found.smoothing, importance, bits), jnp.ones_like(w_pieces)
    form, _ = formats(method, bits)
    return LayerPlan(
        transform=Diagonal(factors=found.smoothing),
        inputs=Static.of(found.x_threshold / qmax(x_bits), found.x_pieces, x_bits),
        grid=UniformGrid(scale=w_scale, pieces=w_pieces, format=form),
    )


def _by_rule(layer: LayerInputs, method: FlattenSettings, x_bits: int, bits: int, budget: Array) -> Found:
    """Both thresholds by the method's rule, raised as far as the bound on K'/K asks for."""
    smoothing = smooth(layer, method.alpha)
    x, w = layer.x_max / smoothing, jnp.max(jnp.abs(layer.weight), axis=0) * smoothing
    strength = method.threshold_strength if x_bits == 4 else method.threshold_strength_int8
    rule = "tukey" if method.threshold_rule == "search" else method.threshold_rule
    tx, tw = threshold(x, rule, strength), threshold(w, rule, strength)
    # An operand that is not to be flattened is cut at its maximum, which leaves it whole.
    tx = tx if method.flatten_activations else jnp.maximum(jnp.max(x), tx)
    tw = tw if method.flatten_weights and method.weight_scales == "tensor" else jnp.maximum(jnp.max(w), tw)
    tx, tw = within_budget(x, w, tx, tw, (qmax(x_bits), qmax(bits)), budget)
    pieces = count_pieces(x, tx, qmax(x_bits)), count_pieces(w, tw, qmax(bits))
    return Found(smoothing, tx, tw, *pieces, jnp.float32(jnp.nan))
