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
@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers that a layer's activations and weights may become: everything but the weights' codes.

    Attributes:
      smoothing: what activations are divided by, and weights multiplied by, (K,).
      x_scale: float32 scalar.
      w_scale: float32 scalar, or one for every output channel, (N,).
      x_pieces, w_pieces: pieces each channel is cut into; codes of channel i reach ``pieces[i] * qmax``, int32 (K,).
      x_bits, bits: of the activations, and of the weights; 4 or 8.
    """

    smoothing: Float32[Array, " k"]
    x_scale: Float32[Array, ""]
    w_scale: Float32[Array, "..."]
    x_pieces: Int32[Array, " k"]
    w_pieces: Int32[Array, " k"]
    x_bits: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def multiplier(self) -> Float32[Array, " k"]:
        """What an activation is multiplied with before it is rounded."""
        return 1 / (self.smoothing * self.x_scale)

    @property
    def expansion(self) -> Float32[Array, ""]:
        """K'/K, before padding."""
        return jnp.mean(self.x_pieces * self.w_pieces)

    @property
    def row_scale(self) -> Float32[Array, "..."]:
        """The weight's scale, so shaped that it multiplies an (N, K) array."""
        return self.w_scale[:, None] if self.w_scale.ndim else self.w_scale

    def activations(self, x: Float[Array, "rows k"]) -> Float32[Array, "rows k"]:
        """What the layer makes of its input: smoothed, rounded, clipped, and scaled back."""
        limit = self.x_pieces * qmax(self.x_bits)
        return jnp.clip(jnp.round(x.astype(jnp.float32) * self.multiplier), -limit, limit) * self.x_scale

    def round(self, weight: Float[Array, "n k"]) -> "WideLinear":
        """The layer with its weight, which is not smoothed yet, rounded to the nearest codes."""
        return self.with_smoothed(weight.astype(jnp.float32) * self.smoothing)

    def with_smoothed(self, weight: Float32[Array, "n k"]) -> "WideLinear":
        """The same for a weight that is smoothed already."""
        codes = round_to_codes(weight, self.row_scale, self.w_pieces * qmax(self.bits)).astype(jnp.int16)
        return WideLinear(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Grid)}, w_codes=codes
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WideLinear(Grid):
    """``y = (x_codes * x_scale) @ (w_codes * w_scale).T``, with a range of its own for the codes of every input channel.

    Attributes:
      w_codes: int16 (N, K): at most 16 pieces of 127.
    """

    w_codes: Int16[Array, "n k"]

    @property
    def weight(self) -> Float32[Array, "n k"]:
        """The weight as it is represented, still smoothed."""
        return self.w_codes * self.row_scale


def output(layer: WideLinear, x: Float[Array, "rows k"]) -> Float32[Array, "rows n"]:
    """What the quantized layer computes, in float32 arithmetic on the unexpanded codes."""
    return layer.activations(x) @ layer.weight.T


@jax.jit
def relative_error(layer: WideLinear, x: Float[Array, "rows k"], weight: Float[Array, "n k"]) -> Float32[Array, ""]:
    """Mean squared error of the layer's output over the mean square of the unquantized output; 0 if both are 0."""
    exact = x.astype(jnp.float32) @ weight.astype(jnp.float32).T
    power = jnp.sum(exact**2)
    error = jnp.sum((output(layer, x) - exact) ** 2)
    return jnp.where(error > 0, error / jnp.maximum(power, jnp.finfo(jnp.float32).tiny), 0.0)
