"""The next token from its logits: the most likely one, or a draw."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32


def sample(
    logits: Float32[Array, "batch vocabulary"],
    keys: Array,
    temperature: Float32[Array, "*row"],
    top_p: Float32[Array, "*row"],
) -> Int32[Array, " batch"]:
    """Draws one token for each row.

    Args:
      logits: of the next token.
      keys: one random key a row, so that a row's draw does not depend on its neighbours.
      temperature: positive; logits are divided by it.  One for all rows, or (batch, 1).
      top_p: in (0, 1], one for all rows, or (batch, 1); only the most likely tokens are drawn whose probabilities sum to
        this, at least one.
    """
    logits = keep_nucleus(logits / temperature, top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def is_end(token: Int32[Array, "*rows"], eos: tuple[int, ...]) -> Bool[Array, "*rows"]:
    """Whether tokens are among those that end a sequence."""
    return jnp.isin(token, jnp.asarray(eos, jnp.int32))


def keep_nucleus(
    logits: Float[Array, "batch vocabulary"], top_p: Float32[Array, "*row"]
) -> Float[Array, "batch vocabulary"]:
    """Sets to -inf every token outside the smallest set of most likely tokens that holds ``top_p`` of the probability.

    (Nucleus sampling, Holtzman et al., arXiv 1904.09751.)
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
    smallest = jnp.take_along_axis(descending, kept - 1, axis=-1)
    return jnp.where(logits >= smallest, logits, -jnp.inf)
