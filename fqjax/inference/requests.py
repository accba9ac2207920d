"""What is asked of an engine, and what it hands out."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from fqjax.inference.settings import Draws, check_settings
from fqjax.runtime.arguments import check_number, check_whole, shown
from fqjax.runtime.errors import InputError

MOST_LOGPROBS = 20
"""Of the most likely tokens whose logarithms of probabilities a request may ask for."""

Reason = Literal["eos", "length", "refused", "cancelled", "deadline", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Draws):
    """A prompt to continue; settings as for :func:`fqjax.generate`.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: how many tokens to append at most.
      logprobs: None, or for how many of the most likely tokens, beside the one taken, logarithms of probabilities are wanted.
      deadline: None, or after how many seconds the request ends with what it has.
      name: anything by which the caller knows the request again.
    """

    prompt: object
    max_new_tokens: int = 64
    logprobs: int | None = None
    deadline: float | None = None
    name: object = None

    def check(self) -> None:
        super().check()
        check_settings(self.max_new_tokens, Draws())
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.deadline is not None and check_number("deadline", self.deadline) <= 0:
            raise InputError(f"deadline {shown(self.deadline)}: expected seconds above 0")


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one token, by the model's logits as they are.

    Attributes:
      logprob: of the token that was taken.
      top: the most likely tokens and theirs, the most likely first.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A request that has ended.

    Attributes:
      request: as it was submitted.
      tokens: the new tokens, int32 (new,), with the one that ended it if one did; none of a request that was refused.
      reason: "eos" if a token ended it, "length" if there were ``max_new_tokens``, "refused" if it could not be served,
        "cancelled" if it was, "deadline" if its time was over, "error" if the model's logits were not finite.
      error: why it was refused, or failed; empty if it was not.
    """

    request: Request
    tokens: Int32[np.ndarray, " new"]
    reason: Reason
    error: str = ""


class Output(NamedTuple):
    """What a request got in a step.

    Attributes:
      ticket: the number under which it was submitted.
      tokens: its new tokens.
      logprobs: of each, where they were asked for.
      finished: the whole request, if it has ended.
    """

    ticket: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    finished: Finished | None
