"""Linear layers together with what stands in front of them.

A quantized layer takes its input through the norm or the activation function, or from the parts of a decoding step's
attention, through the quantization and the flattening in one pass (:mod:`pallas_kernels.rows`); any other layer is called as
usual, also one that stands in for it while a model is calibrated.
"""

import functools
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int32

from fqjax.linear import QuantizedLinear
from fqjax.models.attention import attend, decode_step, decodes
from fqjax.models.cache import LayerCache
from fqjax.models.rotary import Rotation
from pallas_kernels import quantize_activated, quantize_normalized, quantized_decode_attention
from pallas_kernels.reference import activated


def after_norm(
    linear: Any,
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
    if residual is not None and (residual.dtype != x.dtype or not _quantizes(linear)):
        x, residual = x + residual, None
    if not _quantizes(linear):
        return linear(norm(x)), x
    quantizer = linear.input.get_value()
    bias = getattr(norm, "bias", None)
    codes, scale, total = quantize_normalized(
        x,
        quantizer.multiplier,
        quantizer.source,
        quantizer.part,
        epsilon=norm.epsilon,
        qmax=quantizer.qmax,
        weight=None if norm.scale is None else norm.scale[...],
        bias=None if bias is None else bias[...],
        center=isinstance(norm, nnx.LayerNorm),
        residual=residual,
        per_token=quantizer.scale is None,
    )
    return linear.multiply(codes, scale, x.dtype), x if total is None else total


def after_activation(
    linear: Any, x: Float[Array, "*rows channels"], activation: str, *, gated: bool = False
) -> Float[Array, "*rows out"]:
    """``linear(activation(x))``, or, gated, ``linear(activation(first half) * second half)``.

    Args:
      linear: a module that is called with (..., K).
      x: (..., K), or (..., 2 K) if gated.
      activation: one of :data:`pallas_kernels.reference.ACTIVATIONS`.
      gated: whether there are two halves.
    """
    if not _quantizes(linear):
        return linear(activated(x, activation, gated))
    quantizer = linear.input.get_value()
    kinds: Any = {"activation": activation, "gated": gated, "per_token": quantizer.scale is None}
    codes, scale, _ = quantize_activated(
        x, quantizer.multiplier, quantizer.source, quantizer.part, qmax=quantizer.qmax, **kinds
    )
    return linear.multiply(codes, scale, x.dtype)


def after_attention(
    linear: Any,
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
    kinds: Any = {"rotation": rotation, "window": window}
    if not (decodes(qkv, cache, lengths) and _quantizes(linear)):
        out, cache = attend(qkv, kv_heads, cache, lengths, **kinds)
        return linear(out.reshape(*out.shape[:2], -1)), cache
    quantizer = linear.input.get_value()
    recipe = quantizer.multiplier, quantizer.source, quantizer.part
    attention = functools.partial(quantized_decode_attention, qmax=quantizer.qmax, per_token=quantizer.scale is None)
    *found, arrays = decode_step(attention, qkv, cache, lengths, *recipe, **kinds)
    codes, scale = (None if array is None else array[:, None] for array in found)
    return linear.multiply(codes, scale, qkv.dtype), LayerCache(*arrays)


def _quantizes(linear: Any) -> bool:
    """Whether a layer quantizes its input."""
    return isinstance(linear, QuantizedLinear) and linear.input.get_value().bits != 16
