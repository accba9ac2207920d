"""Linear layers together with what stands in front of them.

A quantized layer takes its input through the norm or the activation function, the quantization and the flattening in one
pass (:mod:`pallas_kernels.quantization`); any other layer is called as usual, also one that stands in for it while a model
is calibrated.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from fqjax.linear import QuantizedLinear
from pallas_kernels import quantize_activated, quantize_normalized
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


def _quantizes(linear: Any) -> bool:
    """Whether a layer quantizes its input."""
    return isinstance(linear, QuantizedLinear) and linear.input.get_value().bits != 16
