"""Perplexity, by one protocol for every model and scheme.

The text's tokens are cut into windows of ``T - 1``, each preceded by BOS; the model predicts the ``T - 1`` tokens of every
window from those before them; perplexity is the exponential of the mean negative log-likelihood over all of them.  Logits
are float32, and an incomplete last window is dropped.
"""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int, Int32

from fqjax.models.cache import Kind, dtype_of
from fqjax.runtime.errors import InputError
from fqjax.runtime.progress import track
from fqjax.runtime.validation import MAX_INDEX


def cut_windows(
    token_ids: Int[np.ndarray, " tokens"], window: int, bos_token_id: int, windows: int | None = None
) -> Int32[np.ndarray, "windows window"]:
    """Cuts a text's tokens into windows of BOS and ``window - 1`` tokens.

    Args:
      token_ids: the whole text, without special tokens.
      window: tokens in a window, BOS among them; at least 2.
      bos_token_id: what every window begins with.
      windows: only so many, from the beginning; None for all.

    Raises:
      InputError: if the text does not fill one window, or a token does not fit into int32.
    """
    token_ids = np.asarray(token_ids).reshape(-1)
    if window < 2:
        raise InputError(f"window {window}: expected at least 2 tokens")
    if windows is not None and windows < 1:
        raise InputError(f"windows {windows}: expected at least 1")
    count = len(token_ids) // (window - 1)
    if not count:
        raise InputError(f"the text has {len(token_ids)} tokens, expected at least {window - 1} for one window")
    count = min(count, windows or count)
    body = token_ids[: count * (window - 1)].reshape(count, window - 1)
    if np.abs(body).max() > MAX_INDEX:
        raise InputError(f"token {body.flat[np.abs(body).argmax()]}: expected a token id")
    return np.concatenate([np.full((count, 1), bos_token_id), body], axis=1).astype(np.int32)


def perplexity(
    model: Any,
    token_ids: Any,
    window: int = 512,
    *,
    windows: int | None = None,
    batch_size: int = 4,
    bos_token_id: int | None = None,
    kv_cache: Kind | None = None,
) -> float:
    """Perplexity of a model on a text.

    Args:
      model: a bundled model, or any NNX module whose call maps int32 tokens [batch, length] to logits.
      token_ids: the text's tokens, without special tokens.
      window: tokens in a window, BOS among them.
      windows: evaluate only the first so many; None for all.
      batch_size: windows computed at once.
      bos_token_id: what every window begins with; the model's configuration knows it for bundled models.
      kv_cache: "int8" for what the model predicts over an INT8 cache: every query sees keys and values rounded as such a
        cache holds them, its own among them.  Bundled models only, or one whose call takes ``cache_dtype``.

    Raises:
      InputError: if the text does not fill one window, a token is not in the vocabulary, or the window is longer than
        the model allows.
    """
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: expected at least 1")
    config = getattr(model, "config", None)
    bos = bos_token_id if bos_token_id is not None else getattr(config, "bos_token_id", None)
    if bos is None:
        raise InputError("perplexity: the model's configuration has no BOS token; pass bos_token_id")
    cut = cut_windows(token_ids, window, bos, windows)
    check_tokens(cut, config, window)
    cache_dtype = dtype_of(kv_cache)
    if cache_dtype is not None:
        check_takes(type(model).__call__, "cache_dtype", f"kv_cache {kv_cache!r}: the model's call")
    graphdef, state = nnx.split(model)
    total = 0.0
    batches = [cut[i : i + batch_size] for i in range(0, len(cut), batch_size)]
    for batch in track(batches, "evaluating"):
        # The last batch is filled up so that one compiled program serves all; the filling is not counted.
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        total += float(np.asarray(_window_losses(graphdef, state, filled, cache_dtype), np.float64)[: len(batch)].sum())
    return math.exp(total / (len(cut) * (window - 1)))


def check_tokens(tokens: Int[np.ndarray, "..."], config: Any, length: int) -> None:
    """Refuses tokens outside the vocabulary and sequences longer than the model has positions.

    Raises:
      InputError: naming the token or the length.
    """
    limit = getattr(config, "max_length", None)
    if limit is not None and length > limit:
        raise InputError(f"a sequence of {length} tokens is longer than the {limit} positions of the model")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or not tokens.size:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"token {low if low < 0 else high} is not in the model's vocabulary of {vocabulary}")


def check_takes(function: Any, argument: str, what: str) -> None:
    """Refuses a function without an argument of that name.

    Raises:
      InputError: beginning with ``what``.
    """
    if argument not in inspect.signature(function).parameters:
        raise InputError(f"{what} does not take {argument}, as fqjax.models.causal_lm.CausalLM's does")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _window_losses(
    graphdef: Any, state: Any, windows: Int32[Array, "batch window"], cache_dtype: Any
) -> Float32[Array, " batch"]:
    """Sum of negative log-likelihoods over each window."""
    kinds = {} if cache_dtype is None else {"cache_dtype": cache_dtype}
    logits = nnx.merge(graphdef, state)(windows[:, :-1], **kinds).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked, axis=-1)
