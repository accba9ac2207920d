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
    text = NewText(tokenizer, config, prompt_ids, stop)
    for token in tokens:
        if piece := text.add(token):
            yield piece
        if text.ended:
            break
    if piece := text.end():
        yield piece


class NewText:
    """The same for tokens that are handed in one by one, as they come.

    Args:
      tokenizer, config, prompt_ids, stop: as for :func:`new_text`.

    Attributes:
      ended: whether a token or a string has ended the text.
      stopped: whether a string has.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        config: TextConfig,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
    ):
        self.ended = self.stopped = False
        self._ends, self._plain_end = frozenset(config.eos_token_id), tokenizer.eos_token_id
        self._decode, self._stop, self._held = _decoder(tokenizer), tuple(stop), ""
        # What has been given out is the text of the first of these tokens; the others wait for a whole character.
        self._ids = list(prompt_ids[-CONTEXT:])
        self._given, self._before = len(self._ids), self._decode(self._ids)

    def add(self, token: int) -> str:
        """The text that a token completes; often none.

        Raises:
          InputError: if the tokenizer cannot decode it.
        """
        if self.ended:
            return ""
        self.ended = token in self._ends
        if self.ended and token == self._plain_end:
            return ""
        self._ids.append(token)
        after = self._decode(self._ids)
        if len(after) <= len(self._before) or after.endswith(INCOMPLETE):
            return ""
        piece = after[len(self._before) :]
        self._ids = self._ids[max(self._given - CONTEXT, 0) :]
        self._given, self._before = len(self._ids), self._decode(self._ids)
        return self._until_stop(piece)

    def end(self) -> str:
        """What was held back, when no further token comes."""
        if self.stopped:
            return ""
        piece = self._until_stop(self._decode(self._ids)[len(self._before) :])
        held, self._held, self.ended = self._held, "", True
        self._given, self._before = len(self._ids), self._decode(self._ids)
        return piece if self.stopped else piece + held

    def _until_stop(self, piece: str) -> str:
        """What may be given out of the text that is held and a further piece."""
        held = self._held + piece
        ends = [at for at in (held.find(text) for text in self._stop) if at >= 0]
        if ends:
            self.ended = self.stopped = True
            self._held = ""
            return held[: min(ends)]
        kept = max((_begun(held, text) for text in self._stop), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text a string may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _decoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[int]], str]:
    def decode(ids: list[int]) -> str:
        try:
            with panics_as_errors():
                return cast(str, tokenizer.decode(ids, skip_special_tokens=True))
        except Exception as error:  # The tokenizers package raises nothing more precise.
            raise InputError(f"the tokenizer cannot decode the model's tokens ({reason(error)})") from None

    return decode
