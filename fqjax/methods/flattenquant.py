"""FlattenQuant (Zhang et al., LREC-COLING 2024, arXiv 2402.17985).

Smooth, choose a threshold for each operand, cut the channels that pass it into pieces, and quantize with one scale per
tensor, now set by the threshold instead of the largest value:

    x_scale = T_x / qmax,    w_scale = T_w / qmax,    K' = sum_i ceil(max|x_i| / T_x) * ceil(max|w_i| / T_w)

Thresholds follow a rule, as in the paper, or are searched for (:mod:`fqjax.core.threshold_search`).  With a scale for
every output channel, which costs a Hopper GPU nothing, the weights are not flattened.  How bits are divided among
layers is :mod:`fqjax.core.allocation`; what is open in the paper, and how it is settled here, stands in the
documentation.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.channels import count_pieces
from fqjax.core.codes import qmax
from fqjax.core.formats.uniform import Grid
from fqjax.core.layer import LayerInputs
from fqjax.core.threshold_search import ALPHAS, Found, channel_scales, search
from fqjax.core.thresholds import threshold, within_budget
from fqjax.methods.smoothquant import smooth
from fqjax.scheme import Scheme


def grids(layer: LayerInputs, scheme: Scheme, bits: int, budgets: Float[Array, " b"]) -> Callable[[Array], Grid]:
    """The grid of each budget; see :mod:`fqjax.methods` for the arguments."""
    x_bits = scheme.int4_activation_bits if bits == 4 else 8
    if scheme.threshold_rule != "search" or bits == 8:
        return lambda i: _grid(layer, scheme, x_bits, bits, _by_rule(layer, scheme, x_bits, bits, budgets[i]))
    found = search(
        layer.weight,
        layer.x_max,
        layer.samples,
        x_bits=x_bits,
        w_bits=bits,
        alphas=None if scheme.alpha is None else ALPHAS,
        flatten_activations=scheme.flatten_activations,
        flatten_weights=scheme.flatten_weights and scheme.weight_scales == "tensor",
        budgets=budgets,
    )
    return lambda i: _grid(layer, scheme, x_bits, bits, Found(*(leaf[i] for leaf in found)))


def _grid(layer: LayerInputs, scheme: Scheme, x_bits: int, bits: int, found: Found) -> Grid:
    w_scale, w_pieces = found.w_threshold / qmax(bits), found.w_pieces
    if scheme.weight_scales == "channel":
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


def _by_rule(layer: LayerInputs, scheme: Scheme, x_bits: int, bits: int, budget: Array) -> Found:
    """Both thresholds by the scheme's rule, raised as far as the bound on K'/K asks for."""
    smoothing = smooth(layer, scheme)
    x, w = layer.x_max / smoothing, jnp.max(jnp.abs(layer.weight), axis=0) * smoothing
    strength = scheme.threshold_strength if x_bits == 4 else scheme.threshold_strength_int8
    rule = "tukey" if scheme.threshold_rule == "search" else scheme.threshold_rule
    tx, tw = threshold(x, rule, strength), threshold(w, rule, strength)
    # An operand that is not to be flattened is cut at its maximum, which leaves it whole.
    tx = tx if scheme.flatten_activations else jnp.maximum(jnp.max(x), tx)
    tw = tw if scheme.flatten_weights and scheme.weight_scales == "tensor" else jnp.maximum(jnp.max(w), tw)
    tx, tw = within_budget(x, w, tx, tw, (qmax(x_bits), qmax(bits)), budget)
    pieces = count_pieces(x, tx, qmax(x_bits)), count_pieces(w, tw, qmax(bits))
    return Found(smoothing, tx, tw, *pieces, jnp.float32(jnp.nan))
