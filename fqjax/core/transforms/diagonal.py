"""Smoothing: move part of the activations' range into the weights, channel by channel.

With any positive ``s`` of shape (K,), ``(x / s) @ (s * W).T`` equals ``x @ W.T``.  SmoothQuant (arXiv 2211.10438, eq. 4)
chooses ``s = max|x|**alpha / max|w|**(1 - alpha)``; FlattenQuant smooths before it looks for channels to flatten, so
that few are left.  fqjax never folds ``s`` into the layer before: it is part of the one multiply that quantizes.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from fqjax.core.table import Stored, array
from fqjax.core.transforms.base import Recipe
from fqjax.registry import register

SMALLEST_SMOOTHING_FACTOR = 1e-5
"""Lower bound of a factor, so that dividing by it stays finite."""


@register("transforms")
class Diagonal(Stored):
    """Smoothing: inputs are divided by ``factors``, the weight's columns multiplied by them.

    Attributes:
      factors: s, positive, (K,).
    """

    kind: ClassVar[str] = "diagonal"

    factors: Float32[Array, " k"] = array("in", dtype="float32", positive=True)

    def weight(self, w: Float[Array, "n k"]) -> Float32[Array, "n k"]:
        return w.astype(jnp.float32) * self.factors

    def inputs(self, x: Float[Array, "*rows k"]) -> Float32[Array, "*rows k"]:
        return x.astype(jnp.float32) / self.factors

    def bias(self, w: Float[Array, "n k"], b: Float[Array, " n"] | None) -> Float[Array, " n"] | None:
        return b

    def inverse(self) -> "Diagonal":
        return Diagonal(factors=1 / self.factors)

    def recipe(self) -> Recipe:
        return Recipe(self.factors)


def smoothing_factors(
    x_max: Float[Array, " k"], w_max: Float[Array, " k"], alpha: float | Float[Array, ""] = 0.5
) -> Float32[Array, " k"]:
    """The factor that each input channel of the activations is divided by, and of the weights multiplied by.

    Args:
      x_max: largest magnitude of each input channel of the activations, over calibration tokens.
      w_max: largest magnitude of each input channel of the weights, over output channels.
      alpha: migration strength; 0 leaves the weights' range flat, 1 the activations'.

    Returns:
      ``max(x_max**alpha / w_max**(1-alpha), 1e-5)``; 1 for a channel in which either maximum is 0.
    """
    dead = (x_max <= 0) | (w_max <= 0)
    x, w = jnp.where(dead, 1.0, x_max), jnp.where(dead, 1.0, w_max)
    factors = jnp.maximum(x**alpha / w ** (1 - alpha), SMALLEST_SMOOTHING_FACTOR)
    return jnp.where(dead, 1.0, factors).astype(jnp.float32)
