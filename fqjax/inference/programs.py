"""The programs of generation: prompts into a cache of their own, and bursts of tokens after them.

They take a model as :func:`fqjax.layers.flattened.flattened` gives it, and give their caches and states to one another by
donation, so that nothing is copied and nothing is computed outside of them.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from fqjax.inference.sampling import Kinds, Sampling, is_end, pick
from fqjax.inference.settings import empty_cache
from fqjax.layers.flattened import Structure
from fqjax.models.cache import KeyValueCache, Kind
from fqjax.models.causal_lm import GenerativeModel

GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
"""How loops over tokens are compiled: what XLA puts into CUDA graphs by default, and loops.  Without these the host waits for
the device in every turn, to see whether there is another, and then launches some hundred kernels one by one."""

Leaves = tuple[jax.Array, ...]
Tokens = Int32[Array, "batch width"] | np.ndarray
Counts = Int32[Array, " batch"] | np.ndarray


class Decoding(NamedTuple):
    """Sequences that are being continued.

    Attributes:
      cache: what they hold.
      token: the last token of each, which is not in the cache yet.
      step: how many tokens they have got.
      ended: which of them have ended.
      seen: tokens that each has had, where any has a repetition penalty.
    """

    cache: KeyValueCache
    token: Int32[Array, " batch"]
    step: Int32[Array, ""]
    ended: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocabulary"] | None


def generative(structure: Structure, leaves: Leaves) -> GenerativeModel:
    """The model in a program that is traced."""
    return cast(GenerativeModel, structure.model(leaves))


def take_up(
    model: GenerativeModel, tokens: Tokens, cache: KeyValueCache, counts: Counts
) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
    """The model's ``prefill`` of an empty cache, or its ``extend`` if it has no other."""
    return getattr(model, "prefill", model.extend)(tokens, cache, counts)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def prefill(
    structure: Structure, leaves: Leaves, tokens: Tokens, counts: Counts, capacity: int, kv_cache: Kind | None
) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
    """Logits after each prompt (:func:`take_up`), and a new cache with the prompts in it."""
    model = generative(structure, leaves)
    return take_up(model, tokens, empty_cache(model, tokens.shape[0], capacity, kv_cache), counts)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def extend(
    structure: Structure,
    leaves: Leaves,
    tokens: Tokens,
    counts: Counts,
    cache: KeyValueCache,
    before: Float32[Array, "batch vocabulary"],
) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
    """A further piece of each prompt.  Logits of rows whose prompt has ended stay what they were."""
    logits, cache = generative(structure, leaves).extend(tokens, cache, counts)
    return jnp.where(counts[:, None] > 0, logits, before), cache


@functools.partial(jax.jit, static_argnums=5, donate_argnums=1)
def begin(
    logits: Float32[Array, "batch vocabulary"],
    cache: KeyValueCache,
    prompt: tuple[Tokens, Counts],
    sampling: Sampling,
    eos: Int32[Array, " ends"] | np.ndarray,
    kinds: Kinds,
) -> tuple[Decoding, Int32[Array, "batch one"]]:
    """The sequences with their first token, and that token; where any is penalized, with what their prompts hold."""
    seen = None
    if kinds.penalized:
        seen = _mark_prompts(jnp.zeros(logits.shape, bool), *prompt)
    token = pick(logits, jnp.int32(0), sampling, kinds, seen)
    state = Decoding(cache, token, jnp.int32(1), is_end(token, jnp.asarray(eos)), _mark(seen, token))
    return state, token[:, None]


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2, compiler_options=GRAPHS)
def decode(
    structure: Structure,
    leaves: Leaves,
    state: Decoding,
    sampling: Sampling,
    limit: Int32[Array, ""] | np.integer,
    eos: Int32[Array, " ends"] | np.ndarray,
    burst: int,
    kinds: Kinds,
) -> tuple[Decoding, Int32[Array, "batch burst"]]:
    """Continues until there are ``burst`` more tokens, or ``limit`` in all, or all sequences have ended.

    Args:
      structure, leaves: the model.
      state: the sequences; it is donated.
      sampling: how tokens are drawn.
      limit: how many tokens a sequence gets at most, the first among them.
      eos: tokens that end a sequence.
      burst: how many are decoded at most.
      kinds: what any sequence needs of the draws.

    Returns:
      The sequences, and their new tokens; a sequence that has ended repeats its last one.
    """
    model, first = generative(structure, leaves), state.step
    batch, ends = state.token.shape[0], jnp.asarray(eos)

    def body(carry: tuple[Decoding, Array]) -> tuple[Decoding, Array]:
        s, out = carry
        logits, cache = model.extend(s.token[:, None], s.cache, jnp.ones(batch, jnp.int32))
        token = jnp.where(s.ended, s.token, pick(logits, s.step, sampling, kinds, s.seen))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, s.step - first))
        return Decoding(cache, token, s.step + 1, s.ended | is_end(token, ends), _mark(s.seen, token)), out

    def unfinished(carry: tuple[Decoding, Array]) -> Array:
        s, _ = carry
        return (s.step - first < burst) & (s.step < limit) & ~jnp.all(s.ended)

    state, out = jax.lax.while_loop(unfinished, body, (state, jnp.zeros((batch, burst), jnp.int32)))
    # Where all ended early, the rest is filled with each sequence's last token.
    return state, jnp.where(jnp.arange(burst) < state.step - first, out, state.token[:, None])


def _mark(seen: Array | None, token: Array) -> Array | None:
    return None if seen is None else seen.at[jnp.arange(token.shape[0]), token].set(True, mode="drop")


def _mark_prompts(seen: Array, tokens: Tokens, counts: Counts) -> Array:
    """What each prompt holds; padding counts as its last token, which is none of its own only if it has none."""
    width = tokens.shape[1]
    real = jnp.arange(width) < jnp.asarray(counts)[:, None]
    at = jnp.where(real, tokens, seen.shape[1])  # What lies outside is dropped.
    return seen.at[jnp.arange(tokens.shape[0])[:, None], at].set(True, mode="drop")
