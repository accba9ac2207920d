"""Answers in the forms of OpenAI's interface, whole and in pieces."""

import time
import uuid
from collections.abc import Callable
from typing import Any

from fqjax.data.incremental import INCOMPLETE
from fqjax.inference.requests import TokenLogprobs
from fqjax.server.choices import Piece
from fqjax.server.fields import Asked

Json = dict[str, Any]

Reported = list[tuple[int, TokenLogprobs]]


class Answers:
    """Makes the answer of one call.

    Args:
      asked: what the call asked for.
      model: the name of the model.
      text_of: shows a token's text.
    """

    def __init__(self, asked: Asked, model: str, text_of: Callable[[int], str]):
        self.asked, self._text_of = asked, text_of
        kind = "chat.completion" if asked.chat else "text_completion"
        if asked.chat and asked.streamed:
            kind += ".chunk"
        name = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head: Json = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        self._offsets = [0] * len(asked.requests)

    def begin(self) -> list[Json]:
        """What comes before all pieces: in a chat, who speaks."""
        if not self.asked.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(self._choice(i, "delta", delta, None, None)) for i in range(len(self.asked.requests))]

    def piece(self, piece: Piece, tokens: int) -> Json:
        """A piece of a choice, when so many tokens have come in all."""
        logprobs = self._logprobs(piece) if piece.logprobs else None
        if self.asked.chat:
            delta = {"content": piece.text} if piece.text or piece.logprobs else {}
            return self._chunk(self._choice(piece.choice, "delta", delta, logprobs, piece.ending), tokens)
        return self._chunk(self._choice(piece.choice, "text", piece.text, logprobs, piece.ending), tokens)

    def end(self, tokens: int) -> list[Json]:
        """What comes after all pieces: how many tokens there were, if that was asked for."""
        return [self._head | {"choices": [], "usage": self._usage(tokens)}] if self.asked.usage else []

    def whole(self, pieces: list[Piece], tokens: int) -> Json:
        """All at once."""
        choices = []
        for index in range(len(self.asked.requests)):
            own = [piece for piece in pieces if piece.choice == index]
            reported = [each for piece in own for each in piece.logprobs]
            joined = Piece(index, "".join(piece.text for piece in own), reported, own[-1].ending)
            logprobs = self._logprobs(joined) if self._reports else None
            message = {"role": "assistant", "content": joined.text, "refusal": None}
            key, content = ("message", message) if self.asked.chat else ("text", joined.text)
            choices.append(self._choice(index, key, content, logprobs, joined.ending))
        return self._head | {"choices": choices, "usage": self._usage(tokens)}

    @property
    def _reports(self) -> bool:
        return self.asked.requests[0].logprobs is not None

    def _chunk(self, choice: Json, tokens: int = 0) -> Json:
        usage = self._usage(tokens) if self.asked.counted else None
        return self._head | {"choices": [choice]} | ({"usage": usage} if self.asked.usage else {})

    @staticmethod
    def _choice(index: int, key: str, content: object, logprobs: Json | None, ending: str | None) -> Json:
        return {"index": index, key: content, "logprobs": logprobs, "finish_reason": ending}

    def _usage(self, tokens: int) -> Json:
        prompt = self.asked.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _logprobs(self, piece: Piece) -> Json:
        if self.asked.chat:
            return {"content": [self._of_chat(token, found) for token, found in piece.logprobs], "refusal": None}
        texts = [self._text_of(token) for token, _ in piece.logprobs]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[piece.choice])
            self._offsets[piece.choice] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [found.logprob for _, found in piece.logprobs],
            "top_logprobs": [self._top(token, found) for token, found in piece.logprobs],
            "text_offset": offsets,
        }

    def _top(self, taken: int, found: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens by their texts, of which the more likely one counts; with the one that was taken."""
        top: dict[str, float] = {}
        for token, logprob in [*found.top, (taken, found.logprob)]:
            top.setdefault(self._text_of(token), logprob)
        return top

    def _of_chat(self, token: int, found: TokenLogprobs) -> Json:
        top = [self._entry(other, logprob) for other, logprob in found.top]
        return self._entry(token, found.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._text_of(token)
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if INCOMPLETE in text else list(text.encode(errors="replace")),
        }
