"""The straight-through estimator: rounded values with the gradient of what was rounded (Bengio et al., arXiv 1308.3432)."""

import jax
from jaxtyping import Array, Float


def straight_through(exact: Float[Array, "*shape"], rounded: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``rounded``, whose gradient with respect to ``exact`` is the identity."""
    return exact + jax.lax.stop_gradient(rounded - exact)
