"""FlattenQuant (Zhang et al., LREC-COLING 2024, arXiv 2402.17985).

Smooth, choose a threshold for each operand, cut the channels that pass it into pieces, and quantize with one scale per
tensor, now set by the threshold instead of the largest value:

    x_scale = T_x / qmax,    w_scale = T_w / qmax,    K' = sum_i ceil(max|x_i| / T_x) * ceil(max|w_i| / T_w)

Thresholds follow a rule, as in the paper, or are searched for (:mod:`fqjax.core.threshold_search`).  With a scale for
every output channel, which costs a Hopper GPU nothing, the weights are not flattened.  How bits are divided among
layers is :mod:`fqjax.core.allocation`; what is open in the paper, and how it is settled here, stands in the
documentation.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fqjax.core.channels import count_pieces
from fqjax.core.codes import qmax
from fqjax.core.formats.uniform import Uniform, UniformGrid
from fqjax.core.inputs import Static, StaticInput
from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.core.threshold_search import ALPHAS, Found, channel_scales, search
from fqjax.core.thresholds import threshold, within_budget
from fqjax.core.transforms.diagonal import Diagonal
from fqjax.methods.smoothquant import smooth
from fqjax.scheme import Scheme


def plans(layer: LayerInputs, scheme: Scheme, bits: int) -> list[LayerPlan]:
    """One plan for every budget (:func:`budgets`); see :mod:`fqjax.methods` for the arguments."""
    bounds = budgets(layer.weight.shape[1], scheme, bits)
    found = _found(layer, scheme, bits, jnp.asarray(bounds, jnp.float32))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(bounds))]


def formats(scheme: Scheme, bits: int) -> tuple[Uniform, type[StaticInput]]:
    """What is stored of a layer: the weight's format, and the quantizer of its input."""
    return Uniform(bits=bits, granularity=scheme.weight_scales), StaticInput  # pyright: ignore[reportArgumentType]


def budgets(k: int, scheme: Scheme, bits: int) -> list[float]:
    """Bounds on K'/K: the scheme's, or, where the bytes of layers are chosen too, as much as fills 0, 1, 2, ... blocks of
    padding.
    """
    if scheme.selection != "budget":
        return [scheme.max_expansion]
    form = Uniform(bits=bits)  # pyright: ignore[reportArgumentType]
    block, first = form.padded(1), form.padded(k)
    most = max(first, int(scheme.max_expansion * k))
    return list(dict.fromkeys(min(width / k, scheme.max_expansion) for width in range(first, most + block, block)))


def _found(layer: LayerInputs, scheme: Scheme, bits: int, bounds: Float[Array, " b"]) -> LayerPlan:
    """The plans of all budgets, with a leading axis."""
    x_bits = scheme.int4_activation_bits if bits == 4 else 8
    if scheme.threshold_rule != "search" or bits == 8:
        return lax.map(
            lambda bound: _plan(layer, scheme, x_bits, bits, _by_rule(layer, scheme, x_bits, bits, bound)), bounds
        )
    found = search(
        layer.weight,
        layer.x_max,
        layer.samples,
        x_bits=x_bits,
        w_bits=bits,
        alphas=None if scheme.alpha is None else ALPHAS,
        flatten_activations=scheme.flatten_activations,
        flatten_weights=scheme.flatten_weights and scheme.weight_scales == "tensor",
        budgets=bounds,
    )
    return lax.map(lambda one: _plan(layer, scheme, x_bits, bits, one), found)


def _plan(layer: LayerInputs, scheme: Scheme, x_bits: int, bits: int, found: Found) -> LayerPlan:
    w_scale, w_pieces = found.w_threshold / qmax(bits), found.w_pieces
    if scheme.weight_scales == "channel":
        importance = jnp.mean((layer.samples / found.smoothing) ** 2, axis=0)
        w_scale, w_pieces = channel_scales(layer.weight * found.smoothing, importance, bits), jnp.ones_like(w_pieces)
    form, _ = formats(scheme, bits)
    return LayerPlan(
        transform=Diagonal(factors=found.smoothing),
        inputs=Static.of(found.x_threshold / qmax(x_bits), found.x_pieces, x_bits),
        grid=UniformGrid(scale=w_scale, pieces=w_pieces, format=form),
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
