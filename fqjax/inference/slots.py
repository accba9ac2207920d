"""The programs of an engine: pieces of prompts, first tokens, and steps of decoding, over slots that share one cache.

All of them take the cache and the slots from one another by donation.  A slot's arithmetic does not depend on its neighbours:

- :func:`take_piece`: pieces of some prompts, into the slots' memory;
- :func:`begin`: the first token after some prompts, and the settings of their slots;
- :func:`advance`: logits after the last token of every slot that decodes, and
- :func:`pick_next`: its next token; :func:`decode` is both;
- :func:`release`: slots that are to decode no longer.

Rows that stand for no slot have one that is out of range: what they write is dropped, or goes to page 0.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from fqjax.inference.programs import GRAPHS, Leaves, generative, take_up
from fqjax.inference.requests import MOST_LOGPROBS
from fqjax.inference.sampling import NO_TOKEN, Kinds, Sampling, is_end, pick
from fqjax.inference.settings import empty_cache
from fqjax.layers.flattened import Flattened, Structure
from fqjax.models.cache import KeyValueCache, Kind

Ends = Int32[Array, " ends"] | Int32[np.ndarray, " ends"]


class Slots(NamedTuple):
    """State of the slots; a row each.

    Attributes:
      token: the last one, which is not in the cache yet.
      step: how many tokens there are.
      limit: how many there may be.
      active: whether it decodes.
      sampling: how tokens are drawn.
      seen: tokens that were there before, of slots with a repetition penalty.
    """

    token: Int32[Array, " slots"]
    step: Int32[Array, " slots"]
    limit: Int32[Array, " slots"]
    active: Bool[Array, " slots"]
    sampling: Sampling
    seen: Bool[Array, "slots vocabulary"]


class Piece(NamedTuple):
    """Pieces of prompts, a row each.

    Attributes:
      tokens: padded on the right.
      counts: how many of them are real.
      starts: how many are in the cache before.
      slots: whose they are; one that is out of range for none.
      pages: of these slots.
    """

    tokens: Int32[np.ndarray, "rows width"]
    counts: Int32[np.ndarray, " rows"]
    starts: Int32[np.ndarray, " rows"]
    slots: Int32[np.ndarray, " rows"]
    pages: Int32[np.ndarray, "rows n"] | None


class First(NamedTuple):
    """What begins to decode, a row each; a slot that is out of range for none.

    Attributes:
      slots: which.
      limit, sampling: as for :class:`Slots`.
      prompts: tokens that a repetition penalty counts as seen, padded with :data:`NO_TOKEN`.
    """

    slots: Int32[np.ndarray, " rows"]
    limit: Int32[np.ndarray, " rows"]
    sampling: Sampling
    prompts: Int32[np.ndarray, "rows width"]


class Picked(NamedTuple):
    """A token for each row, :data:`NO_TOKEN` for rows that got none, and logarithms of probabilities if any reports them.

    Attributes:
      token: of each row.
      logprob: of that token.
      top, top_logprobs: the most likely tokens, and theirs.
    """

    token: Int32[Array, " rows"]
    logprob: Float32[Array, " rows"] | None
    top: Int32[Array, "rows most"] | None
    top_logprobs: Float32[Array, "rows most"] | None


class Rows(NamedTuple):
    """How an empty cache is made that has a row for each sequence.

    Attributes:
      capacity, kv_cache: as :func:`fqjax.inference.settings.empty_cache` takes them.
    """

    capacity: int
    kv_cache: Kind | None


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
def take_piece(
    structure: Structure, leaves: Leaves, cache: KeyValueCache, piece: Piece, fresh: bool, rows: Rows | None
) -> tuple[Float32[Array, "rows vocabulary"], KeyValueCache]:
    """Pieces of prompts, into their slots.

    Args:
      structure, leaves: the model.
      cache: of all slots; it is donated.
      piece: the tokens.
      fresh: whether nothing stands before any of them.
      rows: for a cache in which each slot has a row; None for one of pages.

    Returns:
      Logits after each piece, and the cache.
    """
    model, slots = generative(structure, leaves), jnp.asarray(piece.slots)
    if rows is not None:
        if fresh:
            logits, new = take_up(model, piece.tokens, empty_cache(model, len(piece.counts), *rows), piece.counts)
        else:
            held = jax.tree.map(lambda all: all.at[slots].get(mode="clip"), cache)
            logits, new = model.extend(piece.tokens, held, piece.counts)
        return logits, jax.tree.map(lambda all, some: all.at[slots].set(some, mode="drop"), cache, new)
    assert cache.pages is not None and piece.pages is not None
    starts, pages = jnp.asarray(piece.starts), jnp.asarray(piece.pages)
    held = KeyValueCache(cache.layers, starts, pages)
    run = functools.partial(take_up, model) if fresh else model.extend
    logits, new = run(piece.tokens, held, piece.counts)
    lengths = cache.lengths.at[slots].set(starts + piece.counts, mode="drop")
    return logits, KeyValueCache(new.layers, lengths, cache.pages.at[slots].set(pages, mode="drop"))


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def begin(
    slots: Slots, logits: Float32[Array, "rows vocabulary"], first: First, eos: Ends, kinds: Kinds, reports: bool
) -> tuple[Slots, Picked]:
    """Picks the first token after prompts, and lets their slots decode from it; arguments as for :func:`pick_next`."""
    rows, vocabulary = logits.shape
    prompts = jnp.where(jnp.asarray(first.prompts) < 0, vocabulary, first.prompts)  # What lies outside is dropped.
    seen = jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], prompts].set(True, mode="drop")
    token = pick(logits, jnp.int32(0), first.sampling, kinds, seen)
    picked = _picked(logits, token, reports)
    active = (jnp.asarray(first.limit) > 1) & ~is_end(token, jnp.asarray(eos))
    seen = seen.at[jnp.arange(rows), token].set(True, mode="drop")
    new = Slots(token, jnp.ones(rows, jnp.int32), jnp.asarray(first.limit), active, first.sampling, seen)
    at = jnp.asarray(first.slots)
    return jax.tree.map(lambda all, some: all.at[at].set(some, mode="drop"), slots, new), picked


def _advanced(
    structure: Structure,
    leaves: Leaves,
    cache: KeyValueCache,
    token: Int32[Array, " slots"],
    active: Bool[Array, " slots"],
) -> tuple[Float32[Array, "slots vocabulary"], KeyValueCache]:
    """Logits after the last tokens; slots that do not decode keep what they had.

    What these write goes after their length, where the next piece of their prompt overwrites it, or to page 0.
    """
    model, counts = generative(structure, leaves), active.astype(jnp.int32)
    if not isinstance(cache, KeyValueCache) or cache.pages is None:
        return model.extend(token[:, None], cache, counts)
    # Their pages may be somebody else's by now.
    lengths, pages = jnp.where(active, cache.lengths, 0), jnp.where(active[:, None], cache.pages, 0)
    logits, new = model.extend(token[:, None], KeyValueCache(cache.layers, lengths, pages), counts)
    return logits, KeyValueCache(new.layers, cache.lengths + active, cache.pages)


def _picked_next(
    slots: Slots, logits: Float32[Array, "slots vocabulary"], eos: Ends, kinds: Kinds, reports: bool
) -> tuple[Slots, Picked]:
    """Picks the next token of every slot that decodes.

    Args:
      slots: which are donated.
      logits: after their last tokens.
      eos: tokens that end a request.
      kinds: what any of them needs of the draws.
      reports: whether any of them wants logarithms of probabilities.

    Returns:
      The slots, and their tokens, :data:`NO_TOKEN` for those that do not decode.
    """
    s = slots
    token = jnp.where(s.active, pick(logits, s.step, s.sampling, kinds, s.seen), s.token)
    picked = _picked(logits, token, reports)._replace(token=jnp.where(s.active, token, NO_TOKEN))
    step = s.step + s.active
    active = s.active & (step < s.limit) & ~is_end(token, jnp.asarray(eos))
    seen = s.seen
    if kinds.penalized:  # Otherwise nobody reads it.
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True, mode="drop")
    return s._replace(token=token, step=step, active=active, seen=seen), picked


def _decoded(
    structure: Structure, leaves: Leaves, cache: KeyValueCache, slots: Slots, eos: Ends
) -> tuple[KeyValueCache, Slots, Picked]:
    """The most likely next token of every slot that decodes: :func:`advance` and :func:`pick_next` in one program.

    One call costs the host less than two, which shows where few slots decode.  Other draws take the two, since a program
    with the model in it is long to compile.
    """
    logits, cache = _advanced(structure, leaves, cache, slots.token, slots.active)
    return cache, *_picked_next(slots, logits, eos, Kinds(), False)


decode = jax.jit(_decoded, static_argnums=0, donate_argnums=(2, 3), compiler_options=GRAPHS)
advance = jax.jit(_advanced, static_argnums=0, donate_argnums=2, compiler_options=GRAPHS)
pick_next = jax.jit(_picked_next, static_argnums=(3, 4), donate_argnums=0)


HELD_BYTES = 2**18
"""Arrays of a model below this size go into the programs of a step on a GPU."""


class Steps(NamedTuple):
    """The programs of a step for one model.

    Attributes:
      decode, advance: :func:`decode` and :func:`advance` without the model.
    """

    decode: Callable[[KeyValueCache, Slots, Ends], tuple[KeyValueCache, Slots, Picked]]
    advance: Callable[[KeyValueCache, Array, Array], tuple[Array, KeyValueCache]]

    @classmethod
    def of(cls, model: Flattened, holds: bool | None = None) -> "Steps":
        """Programs that hold a model's small arrays, which go with them, or those that all models of its structure share.

        A step of decoding can take a GPU less than the host needs to hand it over with some hundred arrays.

        Args:
          model: as programs take it.
          holds: whether they hold small arrays; None for where there is one GPU and that helps.
        """
        devices = {device for leaf in model.leaves for device in leaf.devices()}
        if holds is None:
            holds = len(devices) == 1 and next(iter(devices)).platform == "gpu"
        if not holds:
            return cls(functools.partial(decode, *model), functools.partial(advance, *model))
        structure, leaves = model.structure.holding(model.leaves, HELD_BYTES)
        # Functions of their own, so that what is compiled goes with them.
        own_decode = jax.jit(functools.partial(_decoded, structure), donate_argnums=(1, 2), compiler_options=GRAPHS)
        own_advance = jax.jit(functools.partial(_advanced, structure), donate_argnums=1, compiler_options=GRAPHS)
        return cls(functools.partial(own_decode, leaves), functools.partial(own_advance, leaves))


@functools.partial(jax.jit, donate_argnums=0)
def release(slots: Slots, kept: Bool[np.ndarray, " slots"]) -> Slots:
    """The slots, of which only those kept still decode."""
    return slots._replace(active=slots.active & kept)


def _picked(logits: Float32[Array, "rows vocabulary"], token: Array, reports: bool) -> Picked:
    """Tokens, and logarithms of probabilities by the logits as they are."""
    if not reports:
        return Picked(token, None, None, None)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    values, top = lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[1]))
    return Picked(token, jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=1)[:, 0], top, values)
