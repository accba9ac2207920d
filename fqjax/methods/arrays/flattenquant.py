"""Grids with thresholds, by rule or searched for (:mod:`fqjax.methods.flattenquant`)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.channels import count_pieces
from fqjax.core.codes import qmax
from fqjax.core.formats.uniform import Grid
from fqjax.core.layer import LayerInputs
from fqjax.core.threshold_search import ALPHAS, Found, channel_scales, search
from fqjax.core.thresholds import threshold, within_budget
from fqjax.methods.arrays.smoothquant import smooth
from fqjax.methods.flattenquant import FlattenQuant


def grids(layer: LayerInputs, method: FlattenQuant, bits: int, budgets: Float[Array, " b"]) -> Callable[[Array], Grid]:
    """The grid of each bound; see :meth:`fqjax.methods.Method.grids` for the arguments."""
    x_bits = method.activation_bits if bits == 4 else 8
    if method.threshold_rule != "search" or bits == 8:
        return lambda i: _grid(layer, method, x_bits, bits, _by_rule(layer, method, x_bits, bits, budgets[i]))
    found = search(
        layer.weight,
        layer.x_max,
        layer.samples,
        x_bits=x_bits,
        w_bits=bits,
        alphas=None if method.alpha is None else ALPHAS,
        flatten_activations=method.flatten_activations,
        flatten_weights=method.flatten_weights and method.weight_scales == "tensor",
        budgets=budgets,
    )
    return lambda i: _grid(layer, method, x_bits, bits, Found(*(leaf[i] for leaf in found)))


def _grid(layer: LayerInputs, method: FlattenQuant, x_bits: int, bits: int, found: Found) -> Grid:
    w_scale, w_pieces = found.w_threshold / qmax(bits), found.w_pieces
    if method.weight_scales == "channel":
        importance = jnp.mean((layer.samples / found.smoothing) ** 2, axis=0)
        w_scale, w_pieces = channel_scales(layer.weight * found.smoothing, importance, bits), jnp.ones_like(w_pieces)
    return Grid(
        smoothing=found.smoothing,
        x_scale=found.x_threshold / qmax(x_bits),
        w_scale=w_scale,
        x_pieces=found.x_pieces,
        w_pieces=w_pieces,
        x_bits=x_bits,
        bits=bits,
    )


def _by_rule(layer: LayerInputs, method: FlattenQuant, x_bits: int, bits: int, budget: Array) -> Found:
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
