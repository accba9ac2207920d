"""Prompts: what callers give as tokens, and how they are padded to share programs."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Int32

from fqjax.models.checks import check_ids, check_tokens
from fqjax.models.encodings import rows_of
from fqjax.runtime.arguments import check_unmasked
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason

BUCKET = 64
"""Prompts are padded to a multiple of this, so that lengths share compiled programs."""


def as_prompts(prompt_tokens: object) -> tuple[list[np.ndarray], bool]:
    """A list of prompts, and whether one alone was given.

    Args:
      prompt_tokens: tokens of one prompt or of several; or what a tokenizer gives for them, of which the padding that its
        ``attention_mask`` hides is cut off (:func:`fqjax.models.encodings.rows_of`).

    Raises:
      InputError: if they are none.
    """
    if isinstance(prompt_tokens, Mapping):
        rows, single = rows_of(prompt_tokens, "prompt")
        return as_prompts(rows)[0], single
    is_array = isinstance(prompt_tokens, np.ndarray | jax.Array)
    if not (is_array or isinstance(prompt_tokens, Sequence)) or isinstance(prompt_tokens, str | bytes):
        raise InputError(f"prompt: expected token ids, got {type(prompt_tokens).__name__}")
    if is_array and not prompt_tokens.ndim:
        raise InputError(f"prompt: expected a row of token ids, got {prompt_tokens.dtype} of shape ()")
    if len(prompt_tokens) == 0:
        raise InputError("prompt: empty; expected at least one token")
    check_unmasked("prompt", prompt_tokens)
    try:
        single = np.ndim(prompt_tokens[0]) == 0
        prompts = [np.asarray(p) for p in ([prompt_tokens] if single else prompt_tokens)]
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"prompt: expected a row of integer token ids ({reason(error)})") from None
    for prompt in prompts:
        if not prompt.size:
            raise InputError("prompt: empty; expected at least one token")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise InputError(f"prompt: expected a row of integer token ids, got {prompt.dtype} of shape {prompt.shape}")
        check_ids(prompt)
    return prompts, single


def check_prompts(prompts: Sequence[np.ndarray], config: object, new: int) -> None:
    """Refuses tokens outside the vocabulary, and more positions than the model has for the longest prompt.

    Args:
      prompts: tokens of each.
      config: the model's configuration, or None.
      new: tokens to append.

    Raises:
      InputError: naming the token or the length.
    """
    longest = max(map(len, prompts))
    for prompt in prompts:
        check_tokens(prompt, config, longest + new)


def padded(prompts: Sequence[np.ndarray]) -> tuple[Int32[np.ndarray, "batch width"], Int32[np.ndarray, " batch"]]:
    """Prompts side by side, padded on the right to a multiple of :data:`BUCKET`, and their lengths."""
    width = in_buckets(max(map(len, prompts)))
    tokens = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in prompts]).astype(np.int32)
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def in_buckets(length: int) -> int:
    """The next multiple of :data:`BUCKET`."""
    return -(-length // BUCKET) * BUCKET
