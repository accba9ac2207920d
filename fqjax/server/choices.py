"""From what an engine hands out to the choices of an answer: text, why it ended, logarithms of probabilities."""

import functools
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from fqjax.data.incremental import NewText
from fqjax.inference.requests import Output, TokenLogprobs
from fqjax.server.errors import ApiError
from fqjax.server.fields import Asked, Served
from fqjax.server.loop import EngineLoop, Job, Stopped
from fqjax.server.metrics import Clock, Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ending = Literal["stop", "length"]


class Piece(NamedTuple):
    """What a choice has got.

    Attributes:
      choice: its number.
      text: whole characters.
      logprobs: of the tokens since the piece before, each with its token; none where they were not asked for.
      ending: why the choice has ended, if it has.
    """

    choice: int
    text: str
    logprobs: list[tuple[int, TokenLogprobs]]
    ending: Ending | None


class Answering:
    """The choices of a call, as they come.

    Args:
      engine: that works on it.
      job: the requests, one for each choice.
      asked: what the call asked for.
      served: the model.
      metrics: where what has happened is counted.
      began: when the call came, in seconds of ``time.perf_counter``.
    """

    def __init__(self, engine: EngineLoop, job: Job, asked: Asked, served: Served, metrics: Metrics, began: float):
        self.asked, self.tokens = asked, 0
        self._engine, self._job, self._metrics = engine, job, metrics
        make = functools.partial(NewText, served.tokenizer, served.config, stop=asked.stop)
        self._texts = [make(cast(list[int], request.prompt)) for request in asked.requests]
        self._held: list[list[tuple[int, TokenLogprobs]]] = [[] for _ in asked.requests]
        self._open = set(range(len(asked.requests)))
        self._clocks = [Clock(metrics, began) for _ in asked.requests]

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all choices, until all have ended.

        Raises:
          ApiError: if a choice cannot be ended as it should.
        """
        try:
            while self._open:
                for index, output in await self._job.next():
                    if index in self._open and (piece := self._take(index, output)) is not None:
                        yield piece
        except Stopped as error:
            self.close("error")
            raise ApiError(503, str(error)) from None
        except ApiError:
            self.close("error")
            raise

    def close(self, outcome: str = "cancelled") -> None:
        """Ends what has not ended."""
        if self._open:
            self._engine.cancel(self._job, *self._open)
            self._metrics.ended(outcome, len(self._open))
            self._open.clear()

    def _take(self, index: int, output: Output) -> Piece | None:
        text, held = self._texts[index], self._held[index]
        new = ""
        for at, token in enumerate(output.tokens):
            if text.ended:
                break
            self.tokens += 1
            self._clocks[index].token()
            if output.logprobs is not None:
                held.append((token, output.logprobs[at]))
            new += text.add(token)
        ending = self._ending(text, output)
        if ending is not None:
            new += text.end()
            self._close(index, "stop" if text.stopped else ending, output)
        if not new and ending is None:
            return None
        self._held[index] = []
        return Piece(index, new, held, "stop" if text.stopped else ending)

    def _ending(self, text: NewText, output: Output) -> Ending | None:
        if text.ended:
            return "stop"
        if output.finished is None:
            return None
        if output.finished.reason in ("cancelled", "deadline"):  # By the server: what a client gave up is not read.
            raise ApiError(503, "the server is stopping")
        if output.finished.reason == "error":
            raise ApiError(500, f"the request has failed: {output.finished.error}")
        return "stop" if output.finished.reason == "eos" else "length"

    def _close(self, index: int, ending: Ending, output: Output) -> None:
        self._open.discard(index)
        if output.finished is None:
            self._engine.cancel(self._job, index)
        self._metrics.ended(ending)


def token_texts(tokenizer: "PreTrainedTokenizerBase") -> Callable[[int], str]:
    """What shows a token's text, with the space before it, as logarithms of probabilities name tokens."""
    anchor = tokenizer("a", add_special_tokens=False, verbose=False).input_ids[-1:]
    before = cast(str, tokenizer.decode(anchor))

    @functools.lru_cache(maxsize=1 << 16)
    def text_of(token: int) -> str:
        return cast(str, tokenizer.decode([*anchor, token])).removeprefix(before)

    return text_of
