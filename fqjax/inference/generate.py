"""Text generation: the prompts, in pieces if they are long, then bursts of tokens over a static, donated cache.

Prompts of different lengths share a batch by padding on the right.  Every sequence keeps its own length and writes after
it, so positions are those it would have alone, and padding is overwritten before it could be seen.

A call launches a few programs (:mod:`fqjax.inference.programs`) and computes nothing besides; a burst is launched before the
tokens of the one before are read, so that the device does not wait for the host.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jaxtyping import Int32

from fqjax.inference import programs
from fqjax.inference.prompts import as_prompts, check_prompts, in_buckets, padded
from fqjax.inference.sampling import NOT_FINITE
from fqjax.inference.settings import (
    Draws,
    check_memory,
    check_settings,
    ends_array,
    eos_of,
    kinds_of,
    runnable,
    sampling_of,
)
from fqjax.layers.flattened import Flattened
from fqjax.layers.record import automatic_axes
from fqjax.models.cache import KeyValueCache, Kind
from fqjax.models.causal_lm import GenerativeModel
from fqjax.runtime.arguments import check_whole
from fqjax.runtime.errors import InputError

CHUNK = 2048
"""Tokens of a prompt taken up at once, unless told otherwise."""

BURST = 32
"""Tokens decoded in one program where they are all waited for: between two, the host looks whether to go on."""

STREAMED_BURST = 4
"""Tokens decoded in one program where each is handed out."""


@automatic_axes()
def generate(
    model: GenerativeModel,
    prompt_tokens: object,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Iterable[int] | None = None,
    *,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    kv_cache: Kind | None = None,
    prefill_chunk: int = CHUNK,
) -> Int32[np.ndarray, "*batch new"]:
    """Continues one prompt or a batch of prompts.

    Args:
      model: a bundled model, quantized or not, or any NNX module with ``extend`` and ``make_cache``
        (:class:`fqjax.models.causal_lm.CausalLM`); ``prefill`` is used if there is one.
      prompt_tokens: tokens of one prompt, or several prompts of any lengths, each with at least one token; or what a
        tokenizer gives for them, of which padding is cut off.
      max_new_tokens: how many tokens to append at most.
      temperature: 0 takes the most likely token; above 0 tokens are drawn.
      top_p: in (0, 1]; draw only from the most likely tokens that hold this much probability.
      seed: of the draws, any whole number, modulo 2**32; row i of a batch is drawn with seed ``seed + i``.
      eos_token_id: token or tokens that end a sequence; None takes the model's own, an empty list none.
      top_k: draw only from so many of the most likely tokens; 0 for all.
      min_p: in [0, 1]; draw only tokens at least this times as likely as the most likely one; 0 for all.
      repetition_penalty: what logits of tokens are divided by that are in the prompt or the continuation already, if
        positive, and multiplied with if negative; 1 for nothing (arXiv 1909.05858, section 4.1).
      kv_cache: "int8" keeps keys and values as INT8 codes with a scale for each token and head; None in the model's dtype.
      prefill_chunk: tokens of a prompt taken up at once: longer prompts go in piece by piece, in memory that their length
        does not change but for the cache.

    Returns:
      The new tokens, int32: (new,) for one prompt, (batch, new) for several, with ``new = max_new_tokens``; after its
      end a sequence is filled up with the token that ended it.  Every row is what its prompt gives alone.

    Raises:
      InputError: for an empty prompt, a token outside the vocabulary, more tokens than the model has positions,
        settings out of range, or a model whose logits are not finite.
    """
    draws = Draws(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    run, single = _checked(model, prompt_tokens, max_new_tokens, draws, eos_token_id, kv_cache, prefill_chunk, BURST)
    bursts = list(run.bursts())
    new = np.concatenate(bursts, axis=1)
    # Where all sequences have ended early, each is filled up with its last token.
    new = np.pad(new, ((0, 0), (0, run.limit - new.shape[1])), mode="edge")
    return new[0] if single else new


def stream(
    model: GenerativeModel,
    prompt_tokens: object,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Iterable[int] | None = None,
    *,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    kv_cache: Kind | None = None,
    prefill_chunk: int = CHUNK,
    burst: int = STREAMED_BURST,
) -> Iterator[int] | Iterator[Int32[np.ndarray, " batch"]]:
    """:func:`generate`, token by token as they come; :func:`fqjax.data.incremental.new_text` makes text of them.

    All other arguments are those of :func:`generate`.

    Args:
      burst: how many tokens are decoded at a time; fewer come sooner, more take less time in all.

    Returns:
      An iterator over the new tokens: for one prompt an int each, up to the token that ends it, which is among them; for
      several int32 (batch,), until all have ended; one that ended before repeats its last token.

    Raises:
      InputError: as :func:`generate`, when it is called.
    """
    draws = Draws(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    burst = check_whole("burst", burst, 1)
    with automatic_axes():
        run, single = _checked(
            model, prompt_tokens, max_new_tokens, draws, eos_token_id, kv_cache, prefill_chunk, burst
        )
    return _tokens(run, single)


def _tokens(run: "_Run", single: bool) -> Iterator[int] | Iterator[Int32[np.ndarray, " batch"]]:
    with automatic_axes():
        bursts = run.bursts()
    ended = np.zeros(len(run.prompts), bool)
    while True:
        with automatic_axes():  # Not while the caller has its turn.
            columns = next(bursts, None)
        if columns is None:
            return
        for column in columns.T:
            if ended.all():
                return
            ended |= np.isin(column, run.eos)
            yield int(column[0]) if single else column.copy()


def _checked(
    model: GenerativeModel,
    prompt_tokens: object,
    max_new_tokens: int,
    draws: Draws,
    eos_token_id: int | Iterable[int] | None,
    kv_cache: Kind | None,
    prefill_chunk: int,
    burst: int,
) -> tuple["_Run", bool]:
    """A run with settings that have been checked, and whether it is of one prompt alone."""
    run = runnable(model)
    prompts, single = as_prompts(prompt_tokens)
    limit, chunk = check_settings(max_new_tokens, draws), check_whole("prefill_chunk", prefill_chunk, 1)
    check_prompts(prompts, getattr(model, "config", None), limit)
    draws = dataclasses.replace(draws, seed=int(draws.seed))
    eos = eos_of(model, eos_token_id)
    # In buckets, so that other numbers of tokens take the same programs.
    capacity = in_buckets(max(map(len, prompts))) + in_buckets(limit)
    check_memory(model, run.structure, len(prompts), capacity, kv_cache, f"max_new_tokens {limit}")
    return _Run(run, prompts, limit, draws, eos, kv_cache, chunk, capacity, burst), single


@dataclasses.dataclass(frozen=True)
class _Run:
    """Prompts to be continued, with settings that have been checked."""

    model: Flattened
    prompts: list[np.ndarray]
    limit: int
    draws: Draws
    eos: tuple[int, ...]
    kv_cache: Kind | None
    chunk: int
    capacity: int
    burst: int

    def bursts(self) -> Iterator[Int32[np.ndarray, "batch tokens"]]:
        """The new tokens, the first alone, then burst after burst, up to the limit or until all have ended."""
        tokens, counts = padded(self.prompts)
        logits, cache = self._taken_up(tokens, counts)
        # While the device is at work.  On it once: every array that a call brings along is a transfer.
        draws = [dataclasses.replace(self.draws, seed=self.draws.seed + i) for i in range(len(self.prompts))]
        sampling, eos, limit = jax.device_put((sampling_of(draws), ends_array(self.eos), np.int32(self.limit)))
        kinds = kinds_of(draws)
        state, first = programs.begin(logits, cache, (tokens, counts), sampling, eos, kinds)
        launched = [_sent(first)]
        ended, given, read = np.zeros(len(self.prompts), bool), 1, 0
        while launched:
            if given < self.limit:
                state, new = programs.decode(*self.model, state, sampling, limit, eos, self.burst, kinds)
                launched.append(_sent(new))
                given += self.burst
            columns = np.asarray(launched.pop(0))[:, : self.limit - read]
            read += columns.shape[1]
            if (columns == NOT_FINITE).any():
                raise InputError(
                    "model: its logits are not finite after this prompt; expected a model that predicts it"
                )
            yield columns
            ended |= np.isin(columns, self.eos).any(axis=1)
            if ended.all():
                return

    def _taken_up(self, tokens: np.ndarray, counts: np.ndarray) -> tuple[jax.Array, KeyValueCache]:
        """Logits after the prompts, taken up piece by piece, of which shorter ones fill fewer, and the cache with them."""
        logits, cache = None, None
        for start in range(0, tokens.shape[1], self.chunk):
            here = np.clip(counts - start, 0, self.chunk).astype(np.int32)
            if not here.any():
                break  # Nothing but padding.
            piece = tokens[:, start : start + self.chunk]
            if logits is None or cache is None:
                logits, cache = programs.prefill(*self.model, piece, here, self.capacity, self.kv_cache)
            else:
                logits, cache = programs.extend(*self.model, piece, here, cache, logits)
        assert logits is not None and cache is not None
        return logits, cache


def _sent(tokens: jax.Array) -> jax.Array:
    """Tokens whose way to the host has begun."""
    tokens.copy_to_host_async()
    return tokens
