"""Text generation: one prefill, then one jitted loop over a static, donated cache.

Prompts of different lengths share a batch by padding on the right.  Every sequence keeps its own length and writes behind
it, so positions are those it would have alone, and padding is overwritten before it could be seen.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from fqjax.errors import InputError
from fqjax.evaluate import check_tokens
from fqjax.inference.sampling import sample
from fqjax.models.cache import KeyValueCache

BUCKET = 64
"""Prompts are padded to a multiple of this, so that lengths share compiled programs."""


class Sampling(NamedTuple):
    """How tokens are drawn: arrays, so that changing them does not compile again."""

    temperature: Float32[Array, ""]
    top_p: Float32[Array, ""]


def generate(
    model: Any,
    prompt_tokens: Any,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Iterable[int] | None = None,
) -> Int32[np.ndarray, "*batch new"]:
    """Continues one prompt or a batch of prompts.

    Args:
      model: a bundled model, quantized or not, or any NNX module with ``extend`` and ``make_cache``
        (:class:`fqjax.models.causal_lm.CausalLM`).
      prompt_tokens: tokens of one prompt, or several prompts of any lengths, each with at least one token.
      max_new_tokens: how many tokens to append at most.
      temperature: 0 takes the most likely token; above 0 tokens are drawn.
      top_p: in (0, 1]; draw only from the most likely tokens that hold this much probability.
      seed: of the draws; row i of a batch is drawn with seed ``seed + i``.
      eos_token_id: token or tokens that end a sequence; None takes the model's own, an empty list none.

    Returns:
      The new tokens, int32: (new,) for one prompt, (batch, new) for several, with ``new = max_new_tokens``; after its
      end a sequence is filled up with the token that ended it.  Every row is what its prompt gives alone.

    Raises:
      InputError: for an empty prompt, a token outside the vocabulary, more tokens than the model has positions, or
        settings out of range.
    """
    prompts, single = _as_prompts(prompt_tokens)
    _check_settings(max_new_tokens, temperature, top_p)
    config = getattr(model, "config", None)
    longest = max(map(len, prompts))
    for prompt in prompts:
        check_tokens(prompt, config, longest + max_new_tokens)
    eos = getattr(config, "eos_token_id", ()) if eos_token_id is None else eos_token_id
    eos = (eos,) if isinstance(eos, int | np.integer) else tuple(eos)
    width = -(-longest // BUCKET) * BUCKET
    tokens = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in prompts]).astype(np.int32)
    counts = np.array([len(prompt) for prompt in prompts], np.int32)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(prompts), dtype=jnp.uint32) + np.uint32(seed))
    sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p)) if temperature > 0 else None
    graphdef, state = nnx.split(model)
    cache = model.make_cache(len(prompts), width + max_new_tokens)
    logits, cache = _prefill(graphdef, state, tokens, cache, counts)
    new, _ = _decode(graphdef, state, cache, logits, keys, sampling, max_new_tokens, eos)
    return np.asarray(new)[0] if single else np.asarray(new)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(
    graphdef: Any, state: Any, tokens: Int32[Array, "batch width"], cache: KeyValueCache, counts: Int32[Array, " batch"]
) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
    return nnx.merge(graphdef, state).extend(tokens, cache, counts)


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2)
def _decode(
    graphdef: Any,
    state: Any,
    cache: KeyValueCache,
    logits: Float32[Array, "batch vocabulary"],
    keys: Array,
    sampling: Sampling | None,
    steps: int,
    eos: tuple[int, ...],
) -> tuple[Int32[Array, "batch steps"], KeyValueCache]:
    """The loop: append the last token, pick the next; until there are enough, or all sequences have ended."""
    model = nnx.merge(graphdef, state)
    batch = logits.shape[0]

    def pick(logits: Array, step: Array) -> Array:
        if sampling is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), *sampling)

    def body(carry: Any) -> Any:
        step, out, token, ended, cache = carry
        logits, cache = model.extend(token[:, None], cache, jnp.ones(batch, jnp.int32))
        # A sequence that has ended repeats its last token.
        token = jnp.where(ended, token, pick(logits, step))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        return step + 1, out, token, ended | is_end(token), cache

    def unfinished(carry: Any) -> Array:
        step, _, _, ended, _ = carry
        return (step < steps) & ~jnp.all(ended)

    def is_end(token: Array) -> Array:
        return jnp.isin(token, jnp.asarray(eos, jnp.int32))

    first = pick(logits, jnp.int32(0))
    out = jnp.zeros((batch, steps), jnp.int32).at[:, 0].set(first)
    start = (jnp.int32(1), out, first, is_end(first), cache)
    done, out, token, _, cache = jax.lax.while_loop(unfinished, body, start)
    # Where all ended early, the rest is filled with each sequence's last token.
    return jnp.where(jnp.arange(steps) < done, out, token[:, None]), cache


def _as_prompts(prompt_tokens: Any) -> tuple[list[np.ndarray], bool]:
    """A list of prompts, and whether one alone was given."""
    if not isinstance(prompt_tokens, Sequence | np.ndarray | jax.Array) or isinstance(prompt_tokens, str):
        raise InputError(f"prompt: expected token ids, got {type(prompt_tokens).__name__}")
    if len(prompt_tokens) == 0:
        raise InputError("prompt: empty; expected at least one token")
    single = np.ndim(prompt_tokens[0]) == 0
    prompts = [np.asarray(p) for p in ([prompt_tokens] if single else prompt_tokens)]
    for prompt in prompts:
        if not prompt.size:
            raise InputError("prompt: empty; expected at least one token")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise InputError(f"prompt: expected a row of integer token ids, got {prompt.dtype} of shape {prompt.shape}")
    return prompts, single


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: expected at least 1")
    if not temperature >= 0:
        raise InputError(f"temperature {temperature}: expected 0 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p}: expected a number above 0, at most 1")
