"""Text of tokens as they come: whole characters alone, up to a string that stops it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from fqjax.models.causal_lm import TextConfig
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason
from fqjax.runtime.panics import panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 6
"""Tokens before the new ones that are decoded along with them, since what a token is may depend on those before it."""

INCOMPLETE = "\ufffd"
"""What a tokenizer gives for a character of which some bytes are missing."""


def new_text(
    tokenizer: "PreTrainedTokenizerBase",
    config: TextConfig,
    prompt_ids: Sequence[int],
    tokens: Iterable[int],
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The text that tokens add to a prompt, piece by piece, as they come.

    Pieces end at whole characters: a token that is a part of one is held back until the rest has come.  What could be the
    beginning of a string that stops the text is held back, too.  Together they are what
    :func:`fqjax.data.text.decode_new` gives, up to that string.

    Args:
      tokenizer: the model's.
      config: the model's configuration, for the tokens that end a text.
      prompt_ids: the prompt's tokens.
      tokens: the new ones; when the text has ended, no further one is asked for.
      stop: strings of which the first to come ends the text; it is not part of it.

    Yields:
      Pieces of text, none of them empty.

    Raises:
      InputError: if the tokenizer cannot decode the tokens.
    """
    held = ""
    for piece in _pieces(tokenizer, config, prompt_ids, tokens):
        held += piece
        ends = [at for at in (held.find(text) for text in stop) if at >= 0]
        if ends:
            if min(ends):
                yield held[: min(ends)]
            return
        kept = max((_begun(held, text) for text in stop), default=0)
        if len(held) > kept:
            yield held[: len(held) - kept]
            held = held[len(held) - kept :]
    if held:
        yield held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text a string may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _pieces(
    tokenizer: "PreTrainedTokenizerBase", config: TextConfig, prompt_ids: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    decode = _decoder(tokenizer)
    ids = list(prompt_ids)
    # What has been given out is the text of ids[first:given]; from there on tokens wait for a whole character.
    first, given = max(len(ids) - CONTEXT, 0), len(ids)
    for token in tokens:
        ended = token in config.eos_token_id
        if ended and token == tokenizer.eos_token_id:
            break
        ids.append(token)
        before, after = decode(ids[first:given]), decode(ids[first:])
        if len(after) > len(before) and not after.endswith(INCOMPLETE):
            yield after[len(before) :]
            first, given = max(given - CONTEXT, 0), len(ids)
        if ended:
            break
    before, after = decode(ids[first:given]), decode(ids[first:])
    if len(after) > len(before):
        yield after[len(before) :]


def _decoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[int]], str]:
    def decode(ids: list[int]) -> str:
        try:
            with panics_as_errors():
                return cast(str, tokenizer.decode(ids, skip_special_tokens=True))
        except Exception as error:  # The tokenizers package raises nothing more precise.
            raise InputError(f"the tokenizer cannot decode the model's tokens ({reason(error)})") from None

    return decode
