"""The next token from its logits: the most likely one, or a draw.

Every row of a batch has settings of its own, which are arrays, so that others do not compile anew.  What is drawn for a row
depends on its logits, its settings, its seed and the number of the token alone, never on its neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

NO_TOKEN = -1
"""The token of a sequence that gets none."""

NOT_FINITE = -2
"""The token of a sequence whose logits are not finite."""


class Sampling(NamedTuple):
    """How the tokens of each row are drawn.

    Attributes:
      seed: of the draws.
      temperature: what logits are divided by; 0 takes the most likely token.
      top_p: in (0, 1]; only the most likely tokens are drawn whose probabilities sum to this, at least one.
      min_p: in [0, 1]; only tokens are drawn that are at least this times as likely as the most likely one; 0 for all.
      top_k: only so many of the most likely tokens are drawn; 0 for all.
      penalty: what logits of tokens that were there before are divided by if positive, and multiplied with if negative.
    """

    seed: UInt32[Array, " rows"]
    temperature: Float32[Array, " rows"]
    top_p: Float32[Array, " rows"]
    min_p: Float32[Array, " rows"]
    top_k: Int32[Array, " rows"]
    penalty: Float32[Array, " rows"]


class Kinds(NamedTuple):
    """What any row needs, so that programs leave out what none does; static.  No row's token depends on what others need.

    There are programs for each instead of conditions inside of one: a condition on the device makes a CUDA graph be built
    anew in every call.

    Attributes:
      drawn: whether any has a temperature.
      sorted: whether any of these has a ``top_p`` or a ``top_k``.
      penalized: whether any has a repetition penalty.
    """

    drawn: bool = False
    sorted: bool = False
    penalized: bool = False


def pick(
    logits: Float32[Array, "rows vocabulary"],
    step: Int32[Array, "*rows"],
    sampling: Sampling,
    kinds: Kinds,
    seen: Bool[Array, "rows vocabulary"] | None = None,
) -> Int32[Array, " rows"]:
    """A token for each row.

    Args:
      logits: of the next token.
      step: how many tokens each row has got before this one; one number for all, or (rows,).
      sampling: how they are drawn.
      kinds: what any row needs of it.
      seen: tokens that each row had before, if any has a repetition penalty.

    Returns:
      The tokens; :data:`NOT_FINITE` where the largest logit is not finite.
    """
    if kinds.penalized:
        assert seen is not None
        logits = penalized(logits, seen, sampling.penalty)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if kinds.drawn:
        token = jnp.where(sampling.temperature > 0, _drawn(logits, step, sampling, kinds), token)
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), token, NOT_FINITE)


def _drawn(logits: Array, step: Array, sampling: Sampling, kinds: Kinds) -> Int32[Array, " rows"]:
    """A draw for every row, of which those without a temperature are nobody's."""
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(
        sampling.seed, jnp.broadcast_to(step, sampling.seed.shape)
    )
    columns = [setting[:, None] for setting in (sampling.top_p, sampling.min_p, sampling.top_k)]
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    return sample(logits, keys, temperature, *columns, sorts=kinds.sorted)


def sample(
    logits: Float32[Array, "batch vocabulary"],
    keys: Array,
    temperature: Float32[Array, "*row"],
    top_p: Float32[Array, "*row"],
    min_p: Float32[Array, "*row"] | float = 0.0,
    top_k: Int32[Array, "*row"] | int = 0,
    *,
    sorts: bool = True,
) -> Int32[Array, " batch"]:
    """Draws one token for each row.

    Args:
      logits: of the next token.
      keys: one random key a row, so that a row's draw does not depend on its neighbours.
      temperature: positive; logits are divided by it.  One for all rows, or (batch, 1), as what follows.
      top_p, min_p, top_k: as in :class:`Sampling`.
      sorts: whether any row has a ``top_p`` below 1 or a ``top_k``.
    """
    logits = logits / temperature
    if sorts:
        # A row with neither is left as it is, whatever its neighbours need.
        filtered = (jnp.asarray(top_p) < 1) | (jnp.asarray(top_k) > 0)
        logits = jnp.where(filtered, keep_likeliest(logits, top_p, top_k), logits)
    best = jnp.max(logits, axis=-1, keepdims=True)
    # exp(logit - best) is the likelihood over that of the most likely token.
    logits = jnp.where(jnp.exp(logits - best) >= min_p, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def is_end(token: Int32[Array, "*rows"], eos: Int32[Array, " ends"]) -> Bool[Array, "*rows"]:
    """Whether tokens end a sequence: one of those named, or none at all."""
    return jnp.isin(token, eos) | (token < 0)


def penalized(
    logits: Float32[Array, "rows vocabulary"], seen: Bool[Array, "rows vocabulary"], penalty: Float32[Array, " rows"]
) -> Float32[Array, "rows vocabulary"]:
    """Logits with those of tokens seen before made less likely (CTRL, Keskar et al., arXiv 1909.05858, section 4.1)."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likeliest(
    logits: Float[Array, "batch vocabulary"], top_p: Float32[Array, "*row"], top_k: Int32[Array, "*row"] | int = 0
) -> Float[Array, "batch vocabulary"]:
    """Sets to -inf every token outside the smallest set of most likely tokens that holds ``top_p`` of the probability.

    (Nucleus sampling, Holtzman et al., arXiv 1904.09751.)  Of these, ``top_k`` at most are kept, where it is not 0.  Tokens
    as likely as the last one kept are kept, too.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    kept = jnp.where(jnp.asarray(top_k) > 0, jnp.minimum(kept, top_k), kept)
    smallest = jnp.take_along_axis(descending, jnp.maximum(kept, 1) - 1, axis=-1)
    return jnp.where(logits >= smallest, logits, -jnp.inf)
