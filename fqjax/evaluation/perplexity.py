"""Perplexity, by one protocol for every model and scheme.

The text's tokens are cut into windows of ``T - 1``, each preceded by BOS; the model predicts the ``T - 1`` tokens of every
window from those before them; perplexity is the exponential of the mean negative log-likelihood over all of them.  Logits
are float32, and an incomplete last window is dropped.  A model without BOS has windows of ``T`` tokens of the text, of
which it predicts all but the first.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, DTypeLike, Float32, Int32

from fqjax.data.text import cut_windows, usual_window
from fqjax.layers.flattened import Structure, flattened
from fqjax.layers.record import automatic_axes
from fqjax.models.cache import Kind, dtype_of
from fqjax.models.checks import check_model, check_takes, check_tokens, checked_logits
from fqjax.runtime.arguments import check_whole
from fqjax.runtime.errors import InputError
from fqjax.runtime.memory import memory_bytes
from fqjax.runtime.progress import track
from fqjax.runtime.validation import MAX_INDEX

MOST_NATS = 700.0
"""Of loss a token; the exponential of more is no number."""


@automatic_axes()
def perplexity(
    model: nnx.Module,
    token_ids: ArrayLike | Sequence[int] | Mapping[str, object],
    window: int | None = None,
    *,
    windows: int | None = None,
    batch_size: int = 4,
    bos_token_id: int | None = None,
    kv_cache: Kind | None = None,
) -> float:
    """Perplexity of a model on a text.

    Args:
      model: a bundled model, or any NNX module whose call maps int32 tokens [batch, length] to logits.
      token_ids: the text's tokens, without special tokens; or what a tokenizer gives for it, of which padding and the token
        that begins a text are left out.
      window: tokens in a window, BOS among them if there is one; by default 512, or as many as the model has positions.
      windows: evaluate only the first so many; None for all.
      batch_size: windows computed at once.
      bos_token_id: what every window begins with; the model's configuration knows it for bundled models.
      kv_cache: "int8" for what the model predicts over an INT8 cache: every query sees keys and values rounded as such a
        cache holds them, its own among them.  Bundled models only, or one whose call takes ``cache_dtype``.

    Raises:
      InputError: if the text does not fill one window, a token is not in the vocabulary, or the window is longer than
        the model allows.
    """
    check_model(model)
    if not callable(model):
        raise InputError(f"model: {type(model).__name__} cannot be called; expected a module with a method __call__")
    batch_size = check_whole("batch_size", batch_size, 1)
    config = getattr(model, "config", None)
    if bos_token_id is None and not hasattr(config, "bos_token_id"):
        raise InputError("perplexity: the model has no configuration with a BOS token; pass bos_token_id")
    bos = bos_token_id if bos_token_id is not None else getattr(config, "bos_token_id", None)
    bos = None if bos is None else check_whole("bos_token_id", bos, -MAX_INDEX)
    window = usual_window(window, config)
    cut = cut_windows(token_ids, window, bos, windows)
    check_tokens(cut, config, window)
    cache_dtype = dtype_of(kv_cache)
    if cache_dtype is not None:
        check_takes(type(model).__call__, "cache_dtype", f"kv_cache {kv_cache!r}: the model's call")
    structure, leaves = flattened(model)
    total = 0.0
    batch_size = min(batch_size, len(cut))
    batches = [cut[i : i + batch_size] for i in range(0, len(cut), batch_size)]
    for batch in track(batches, "evaluating"):
        # The last batch is filled up so that one compiled program serves all; the filling is not counted.
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        total += float(
            np.asarray(_window_losses(structure, leaves, filled, cache_dtype), np.float64)[: len(batch)].sum()
        )
    if not math.isfinite(total):
        raise InputError("model: its logits are not finite on this text; expected a model that predicts it")
    mean = total / (len(cut) * (window - 1))
    if mean > MOST_NATS:
        raise InputError(f"model: it loses {mean:.4g} nats a token on this text; expected a model that predicts it")
    return math.exp(mean)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _window_losses(
    structure: Structure,
    leaves: tuple[jax.Array, ...],
    windows: Int32[Array, "batch window"] | np.ndarray,
    cache_dtype: DTypeLike | None,
) -> Float32[Array, " batch"]:
    """Sum of negative log-likelihoods over each window.

    Raises:
      InputError: while it is traced, if the model gives no logits, or more than the device has memory for.
    """
    model, read = cast(Callable[..., Array], structure.model(leaves)), windows[:, :-1]
    options = {} if cache_dtype is None else {"cache_dtype": cache_dtype}
    logits = checked_logits(lambda: model(read, **options), read).astype(jnp.float32)
    needed, there = 4 * logits.size, memory_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"batch_size {len(windows)}: the logits take {needed / 1e9:.4g} GB; expected at most the {there / 1e9:.4g} GB "
            "that the device has"
        )
    picked = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked, axis=-1)
