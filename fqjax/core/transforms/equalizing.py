"""Equalization: give the output channels of a layer similar ranges, at no cost and without changing the function.

Where a layer's output reaches the next linear layer through operations that commute with scaling a channel (a product
with a gate, attention over values, ReLU with a positive factor), row n of the first weight may be divided by ``f[n]`` and
the columns of the second that read it multiplied by ``f[n]``.  Per-tensor quantization of the first layer then no longer
suffers from a few rows with large weights, and the second layer's smoothing absorbs the factor.  (Cross-layer
equalization, Nagel et al., arXiv 1906.04721; SmoothQuant and FlattenQuant fold their smoothing along the same paths.)

Factors are powers of two, so nothing is rounded: the model computes the same numbers before and after.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


def equalizing_factors(weight: Float[Array, "n k"], free: Bool[Array, " n"]) -> Float32[Array, " n"]:
    """The factor that each output channel's weights are to be divided by.

    Args:
      weight: (N, K).
      free: which rows may be scaled, (N,).

    Returns:
      The power of two nearest to a row's largest magnitude over the median of all rows'; 1 for rows that are not free
      or hold nothing but zeros.
    """
    largest = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=1)
    middle = jnp.median(largest)
    usable = free & (largest > 0) & (middle > 0)
    ratio = jnp.where(usable, largest / jnp.where(middle > 0, middle, 1.0), 1.0)
    return jnp.exp2(jnp.round(jnp.log2(ratio)))
