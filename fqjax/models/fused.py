"""Linear layers together with the norm, activation or attention before them.

A quantized layer takes its input through the norm or the activation function, or from the parts of a decoding step's
attention, through the quantization and the flattening in one pass
(:mod:`pallas_kernels.quantize`); any other layer is called as
usual, also one that stands in for it while a model is calibrated.
"""

import functools
from collections.abc import Callable
from typing import TypeGuard

from flax import nnx
from jaxtyping import Array, Float, Int32

from fqjax.core.stored_inputs import Quantized
from fqjax.layers.linear import QuantizedLinear
from fqjax.models.attention import attend, decode_step, decodes
from fqjax.models.cache import LayerCache
from fqjax.models.rotary import Rotation
from pallas_kernels import quantize_activated, quantize_normalized, quantized_decode_attention
from pallas_kernels.quantize.reference import activated

LinearLayer = Callable[[Array], Array]
"""A module that is called with (..., K), quantized or not."""


def after_norm(
    linear: LinearLayer,
    norm: nnx.RMSNorm | nnx.LayerNorm,
    x: Float[Array, "*rows k"],
    residual: Float[Array, "*rows k"] | None = None,
) -> tuple[Float[Array, "*rows out"], Float[Array, "*rows k"]]:
    """``linear(norm(x + residual))``, and ``x + residual``.

    Args:
      linear: a module that is called with (..., K).
      norm: over the K channels.
      x: what the layers before have added up to, but for the last one.
      residual: what that one adds; None if nothing is left to be added.
    """
    x, residual = _pending(linear, x, residual)
    if not _quantizes(linear):
        return linear(norm(x)), x
    quantized, x = _normalized(linear, norm, x, residual)
    return linear.multiply(quantized, x.dtype), x


def gated(
    gate_up: LinearLayer,
    down: LinearLayer,
    norm: nnx.RMSNorm | nnx.LayerNorm,
    x: Float[Array, "*rows k"],
    residual: Float[Array, "*rows k"] | None,
    activation: str,
) -> tuple[Float[Array, "*rows out"], Float[Array, "*rows k"]]:
    """``down(activation(gate) * up)`` with ``gate, up = split(gate_up(norm(x + residual)))``, and ``x + residual``.

    Args:
      gate_up, down: modules that are called with (..., K) and (..., half of what gate_up gives).
      norm, x, residual: as for :func:`after_norm`.
      activation: one of :data:`pallas_kernels.quantize.reference.ACTIVATIONS`.
    """
    if not (_quantizes(gate_up) and gate_up.gates and _quantizes(down)):
        y, x = after_norm(gate_up, norm, x, residual)
        return after_activation(down, y, activation, gated=True), x
    quantized, x = _normalized(gate_up, norm, *_pending(gate_up, x, residual))
    hidden = gate_up.gate(quantized, x.dtype, down.input.get_value(), activation)
    return down.multiply(hidden, gate_up.result_dtype(x.dtype)), x


def after_activation(
    linear: LinearLayer, x: Float[Array, "*rows channels"], activation: str, *, gated: bool = False
) -> Float[Array, "*rows out"]:
    """``linear(activation(x))``, or, gated, ``linear(activation(first half) * second half)``.

    Args:
      linear: a module that is called with (..., K).
      x: (..., K), or (..., 2 K) if gated.
      activation: one of :data:`pallas_kernels.quantize.reference.ACTIVATIONS`.
      gated: whether there are two halves.
    """
    if not _quantizes(linear):
        return linear(activated(x, activation, gated))
    quantizer = linear.input.get_value()
    recipe = quantizer.recipe()
    codes, scale, _ = quantize_activated(
        x,
        recipe.multiplier,
        recipe.source,
        recipe.part,
        qmax=recipe.qmax,
        activation=activation,
        gated=gated,
        per_token=recipe.per_token,
    )
    return linear.multiply(quantizer.scaled(codes, scale), x.dtype)


def after_attention(
    linear: LinearLayer,
    qkv: Float[Array, "batch length all_heads dim"],
    kv_heads: int,
    cache: LayerCache | None,
    lengths: Int32[Array, " batch"] | None,
    *,
    rotation: Rotation | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "batch length out"], LayerCache | None]:
    """``linear(attention)``, all heads' channels side by side, and the cache.

    Args:
      linear: a module that is called with (batch, length, heads * dim).
      qkv, kv_heads, cache, lengths, rotation, window: as :func:`fqjax.models.attention.attend` takes them.
    """
    if cache is None or not (decodes(qkv, cache, lengths) and _quantizes(linear)):
        out, cache = attend(qkv, kv_heads, cache, lengths, rotation=rotation, window=window)
        return linear(out.reshape(*out.shape[:2], -1)), cache
    quantizer = linear.input.get_value()
    recipe = quantizer.recipe()
    attention = functools.partial(quantized_decode_attention, qmax=recipe.qmax, per_token=recipe.per_token)
    operands = recipe.multiplier, recipe.source, recipe.part
    codes, scale, arrays = decode_step(attention, qkv, cache, lengths, *operands, rotation=rotation, window=window)
    quantized = quantizer.scaled(codes[:, None], None if scale is None else scale[:, None])
    return linear.multiply(quantized, qkv.dtype), cache.holding(arrays)


def _pending(linear: LinearLayer, x: Array, residual: Array | None) -> tuple[Array, Array | None]:
    """The norm's input and what is yet to be added to it: nothing, unless ``linear`` quantizes and dtypes are the same."""
    if residual is None or (residual.dtype == x.dtype and _quantizes(linear)):
        return x, residual
    return x + residual, None


def _normalized(
    linear: QuantizedLinear, norm: nnx.RMSNorm | nnx.LayerNorm, x: Array, residual: Array | None
) -> tuple[Quantized, Array]:
    """``norm(x + residual)`` as a layer takes it, and ``x + residual``."""
    quantizer, bias = linear.input.get_value(), getattr(norm, "bias", None)
    recipe = quantizer.recipe()
    codes, scale, total = quantize_normalized(
        x,
        recipe.multiplier,
        recipe.source,
        recipe.part,
        epsilon=norm.epsilon,
        qmax=recipe.qmax,
        weight=None if norm.scale is None else norm.scale[...],
        bias=None if bias is None else bias[...],
        center=isinstance(norm, nnx.LayerNorm),
        residual=residual,
        per_token=recipe.per_token,
    )
    return quantizer.scaled(codes, scale), x if total is None else total


def _quantizes(linear: LinearLayer) -> TypeGuard[QuantizedLinear]:
    """Whether a layer's input can be quantized in the pass before it."""
    return isinstance(linear, QuantizedLinear) and linear.fuses
