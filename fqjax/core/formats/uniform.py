"""A quantized linear layer before its channels are expanded.

Flattening commutes with rounding (:mod:`fqjax.core.channels`), so a layer is fully described, and its error measured, by
codes that may reach several times ``qmax`` on the K original channels.  Everything that decides *how* to quantize works
on this view; only the layer that runs holds the K' expanded channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int16, Int32

from fqjax.core.codes import qmax, steps

NO_CODE = -(2**15)
"""Stands for NaN among codes, which reach 16 * 127 at most; a layer that has it cannot be assembled."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers that a layer's activations and weights may become: everything but the weights' codes.

    Attributes:
      smoothing: what activations are divided by, and weights multiplied by, (K,).
      x_scale: float32 scalar; None gives every token a scale of its own.
      w_scale: float32 scalar, or one for every output channel, (N,).
      x_pieces, w_pieces: pieces each channel is cut into; codes of channel i reach ``pieces[i] * qmax``, int32 (K,).
      x_bits, bits: of the activations, and of the weights; 4 or 8.  Activations in floating point count as 16 bits with a
        scale for every token: what rounding them so would change is less than bfloat16 does.
      group_scale: what ``w_scale`` is multiplied with in each group of ``group_size`` neighbouring input channels, the last
        of which may have fewer, (groups, N), float32 or int32; None without groups.  With groups, codes of 4 bits reach down
        to -8.
    """

    smoothing: Float32[Array, " k"]
    x_scale: Float32[Array, ""] | None
    w_scale: Float32[Array, "..."]
    x_pieces: Int32[Array, " k"]
    w_pieces: Int32[Array, " k"]
    x_bits: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group_scale: Float32[Array, "groups n"] | Int32[Array, "groups n"] | None = None
    group_size: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def multiplier(self) -> Float32[Array, " k"]:
        """What an activation is multiplied with before it is rounded."""
        return 1 / (self.smoothing if self.x_scale is None else self.smoothing * self.x_scale)

    @property
    def expansion(self) -> Float32[Array, ""]:
        """K'/K, before padding."""
        return jnp.mean(self.x_pieces * self.w_pieces)

    @property
    def steps(self) -> Float32[Array, "..."]:
        """The weight's scales, so shaped that they multiply an (N, K) array."""
        each = steps(self.w_scale, self.group_scale, self.group_size)
        return each if self.group_scale is None else each[:, : self.smoothing.shape[0]]

    @property
    def code_range(self) -> tuple[Int32[Array, " k"], Int32[Array, " k"]]:
        """Smallest and largest code of the weight in every channel."""
        largest = self.w_pieces * qmax(self.bits)
        return (-largest if self.group_scale is None or self.bits == 8 else -largest - 1), largest

    def activations(self, x: Float[Array, "rows k"]) -> Float32[Array, "rows k"]:
        """What the layer makes of its input: smoothed, rounded, clipped, and scaled back."""
        return represented(x, self.multiplier, self.x_limit, self.x_scale)

    @property
    def x_limit(self) -> Float32[Array, " k"]:
        """Largest code of the activations in every channel."""
        return (self.x_pieces * qmax(self.x_bits)).astype(jnp.float32)

    def round(self, weight: Float[Array, "n k"]) -> "WideLinear":
        """The layer with its weight, which is not smoothed yet, rounded to the nearest codes."""
        return self.with_smoothed(weight.astype(jnp.float32) * self.smoothing)

    def with_smoothed(self, weight: Float32[Array, "n k"]) -> "WideLinear":
        """The same for a weight that is smoothed already."""
        codes = jnp.clip(jnp.round(weight / self.steps), *self.code_range)
        codes = jnp.where(jnp.isnan(codes), NO_CODE, codes).astype(jnp.int16)
        return WideLinear(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Grid)}, w_codes=codes
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WideLinear(Grid):
    """``y = (x_codes * x_scale) @ (w_codes * w_scale).T``, with a range of its own for the codes of every input channel.

    Attributes:
      w_codes: int16 (N, K): at most 16 pieces of 127; ``NO_CODE`` for a weight that was NaN.
    """

    w_codes: Int16[Array, "n k"]

    @property
    def weight(self) -> Float32[Array, "n k"]:
        """The weight as it is represented, still smoothed."""
        return self.w_codes * self.steps


def represented(
    x: Float[Array, "*rows k"],
    multiplier: Float32[Array, " k"],
    limit: Float32[Array, " k"],
    scale: Float32[Array, ""] | None,
) -> Float32[Array, "*rows k"]:
    """What a layer makes of its input: smoothed, rounded, clipped, and scaled back; without a scale, by one for every row."""
    x = x.astype(jnp.float32) * multiplier
    if scale is None:
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        step = jnp.maximum(largest, 1e-8) / limit[0]  # as pallas_kernels.quantize_per_token has it
        return jnp.round(x / step) * step
    return jnp.clip(jnp.round(x), -limit, limit) * scale


def output(layer: WideLinear, x: Float[Array, "rows k"]) -> Float32[Array, "rows n"]:
    """What the quantized layer computes, in float32 arithmetic on the unexpanded codes."""
    return layer.activations(x) @ layer.weight.T


def relative_error(layer: WideLinear, x: Float[Array, "rows k"], weight: Float[Array, "n k"]) -> Float32[Array, ""]:
    """Mean squared error of the layer's output over the mean square of the unquantized output; 0 if both are 0."""
    return relative_square(output(layer, x), x.astype(jnp.float32) @ weight.astype(jnp.float32).T)


def relative_square(given: Float32[Array, "..."], exact: Float32[Array, "..."]) -> Float32[Array, ""]:
    """Squared difference over the square of what is exact; 0 if both are 0, NaN if one is."""
    error = jnp.sum((given - exact) ** 2)
    return jnp.where(error == 0, 0.0, error / jnp.maximum(jnp.sum(exact**2), jnp.finfo(jnp.float32).tiny))
