"""Conversations as prompts, by the chat template that comes with a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason
from fqjax.runtime.panics import panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def has_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether conversations can be written for the model."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant is to answer.

    The template is rendered in transformers' sandbox: what comes with a checkpoint runs no code of its own.

    Args:
      tokenizer: with a chat template.
      messages: each with a ``role`` ("system", "user" or "assistant") and its ``content``.

    Raises:
      InputError: if there is no template, or it does not take these messages.
    """
    if not has_template(tokenizer):
        raise InputError(
            "the tokenizer has no chat template; expected that of a chat model, or a prompt without --chat"
        )
    try:
        with panics_as_errors():
            text = tokenizer.apply_chat_template(list(map(dict, messages)), add_generation_prompt=True, tokenize=False)
            # The template writes special tokens itself.
            ids = tokenizer(cast(str, text), add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # A template may raise anything.
        raise InputError(f"the tokenizer's chat template does not take these messages ({reason(error)})") from None
    return cast(list[int], ids)
