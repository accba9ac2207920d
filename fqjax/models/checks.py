"""Checks of what a model is called with, before any work."""

import inspect
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from fqjax.runtime.errors import InputError
from fqjax.runtime.validation import MAX_INDEX


def check_tokens(tokens: Int[np.ndarray, "..."], config: object, length: int) -> None:
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


def check_ids(tokens: Int[np.ndarray, "..."]) -> None:
    """Refuses what int32 does not hold, of a model that does not say what its vocabulary is.

    Raises:
      InputError: naming the token.
    """
    for extreme in (int(tokens.min()), int(tokens.max())) if tokens.size else ():
        if abs(extreme) > MAX_INDEX:
            raise InputError(f"token {extreme}: expected a token id, {MAX_INDEX} at most")


def check_takes(function: Callable[..., object], argument: str, what: str) -> None:
    """Refuses a function without an argument of that name.

    Raises:
      InputError: beginning with ``what``.
    """
    if argument not in inspect.signature(function).parameters:
        raise InputError(f"{what} does not take {argument}, as fqjax.models.causal_lm.CausalLM's does")
