"""A quantized linear layer before its channels are expanded.

Flattening commutes with rounding (:mod:`fqjax.core.flatten`), so a layer is fully described, and its error measured, by
codes that may reach several times ``qmax`` on the K original channels.  Everything that decides *how* to quantize works
on this view; only the layer that runs holds the K' expanded channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int16, Int32

from fqjax.core.codes import qmax, round_to_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WideLinear:
    """``y = (x_codes * x_scale) @ (w_codes * w_scale).T`` with per-tensor scales and per-channel code ranges.

    Attributes:
      smoothing: what activations are divided by, and weights were multiplied by, (K,).
      x_scale, w_scale: float32 scalars.
      x_pieces, w_pieces: pieces each channel is cut into; codes of channel i reach ``pieces[i] * qmax``, int32 (K,).
      w_codes: int16 (N, K): at most 16 pieces of 127.
      bits: 4 or 8, of both operands.
    """

    smoothing: Float32[Array, " k"]
    x_scale: Float32[Array, ""]
    w_scale: Float32[Array, ""]
    x_pieces: Int32[Array, " k"]
    w_pieces: Int32[Array, " k"]
    w_codes: Int16[Array, "n k"]
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def multiplier(self) -> Float32[Array, " k"]:
        """What an activation is multiplied with before it is rounded."""
        return 1 / (self.smoothing * self.x_scale)

    @property
    def expansion(self) -> Float32[Array, ""]:
        """K'/K, before padding."""
        return jnp.mean(self.x_pieces * self.w_pieces)


def round_weight(
    weight: Float[Array, "n k"],
    smoothing: Float32[Array, " k"],
    scale: Float32[Array, ""],
    pieces: Int32[Array, " k"],
    bits: int,
) -> Int16[Array, "n k"]:
    """Codes of the smoothed weight, each channel within its pieces."""
    return round_to_codes(weight * smoothing, scale, pieces * qmax(bits)).astype(jnp.int16)


def output(layer: WideLinear, x: Float[Array, "rows k"]) -> Float32[Array, "rows n"]:
    """What the quantized layer computes, in float32 arithmetic on the unexpanded codes."""
    limit = layer.x_pieces * qmax(layer.bits)
    codes = jnp.clip(jnp.round(x.astype(jnp.float32) * layer.multiplier), -limit, limit)
    return (codes * layer.x_scale) @ (layer.w_codes * layer.w_scale).T


def relative_error(layer: WideLinear, x: Float[Array, "rows k"], weight: Float[Array, "n k"]) -> Float32[Array, ""]:
    """Mean squared error of the layer's output over the mean square of the unquantized output; 0 if both are 0."""
    exact = x.astype(jnp.float32) @ weight.astype(jnp.float32).T
    power = jnp.sum(exact**2)
    error = jnp.sum((output(layer, x) - exact) ** 2)
    return jnp.where(error > 0, error / jnp.maximum(power, jnp.finfo(jnp.float32).tiny), 0.0)
