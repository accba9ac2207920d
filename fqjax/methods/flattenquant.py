"""FlattenQuant (Zhang et al., LREC-COLING 2024, arXiv 2402.17985).

Smooth, choose a threshold for each operand, cut the channels that pass it into pieces, and quantize with one scale per
tensor, now set by the threshold instead of the largest value:

    x_scale = T_x / qmax,    w_scale = T_w / qmax,    K' = sum_i ceil(max|x_i| / T_x) * ceil(max|w_i| / T_w)

How bits are divided among layers is :mod:`fqjax.core.selection`; what is open in the paper, and how it is settled here,
stands in the documentation.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fqjax.core.codes import qmax
from fqjax.core.flatten import count_pieces
from fqjax.core.thresholds import threshold, within_budget
from fqjax.core.wide import WideLinear, round_weight
from fqjax.methods.smoothquant import smooth
from fqjax.scheme import Scheme


def quantize_linear(weight: Float[Array, "n k"], x_max: Float[Array, " k"], scheme: Scheme, bits: int) -> WideLinear:
    """Quantizes one layer; see :mod:`fqjax.methods` for the arguments."""
    smoothing = smooth(weight, x_max, scheme)
    x_smooth, w_smooth = x_max / smoothing, jnp.max(jnp.abs(weight), axis=0) * smoothing
    x_threshold, w_threshold = _thresholds(x_smooth, w_smooth, scheme, bits)
    limit = qmax(bits)
    x_scale, w_scale = x_threshold / limit, w_threshold / limit
    x_pieces, w_pieces = count_pieces(x_smooth, x_threshold, limit), count_pieces(w_smooth, w_threshold, limit)
    codes = round_weight(weight, smoothing, w_scale, w_pieces, bits)
    return WideLinear(smoothing, x_scale, w_scale, x_pieces, w_pieces, codes, bits)


def _thresholds(x: Float[Array, " k"], w: Float[Array, " k"], scheme: Scheme, bits: int) -> tuple[Array, Array]:
    """Both thresholds, raised as far as the scheme's bound on K'/K asks for."""
    strength = scheme.threshold_strength if bits == 4 else scheme.threshold_strength_int8
    tx, tw = threshold(x, scheme.threshold_rule, strength), threshold(w, scheme.threshold_rule, strength)
    # An operand that is not to be flattened is cut at its maximum, which leaves it whole.
    tx = tx if scheme.flatten_activations else jnp.maximum(jnp.max(x), tx)
    tw = tw if scheme.flatten_weights else jnp.maximum(jnp.max(w), tw)
    return within_budget(x, w, tx, tw, qmax(bits), scheme.max_expansion)
