"""An engine: requests that come at any time share a batch of slots, and the device is never kept waiting for the host.

The batch has a fixed number of slots, so that every program of the device is compiled once for a few shapes of pieces
(continuous batching, Yu et al., Orca, OSDI 2022).  Keys and values lie in pages (Kwon et al., arXiv 2309.06180): a request
gets a slot as soon as there is one, and pages for all that it may hold.  In every step

1. requests whose time is over, or that were cancelled, leave;
2. waiting requests go into free slots, in the order in which they came;
3. prompts are taken up, several pieces in one call, up to ``chunk`` tokens;
4. every slot that decodes gets ``burst`` tokens;
5. the tokens of the step *before* are read and handed out, while the device is at work.

That a request has ended is thus seen one step late by the host; the device knows at once, and does nothing for it any more.

A request gets the tokens that :func:`fqjax.generate` gives its prompt alone with the same settings and seed, up to the
rounding of sums in batches and pieces of different sizes.
"""

import dataclasses
import functools
import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.inference import slots as programs
from fqjax.inference.memory import Memory
from fqjax.inference.prompts import as_prompts
from fqjax.inference.requests import Finished, Output, Reason, Request, TokenLogprobs
from fqjax.inference.sampling import NO_TOKEN, NOT_FINITE, Kinds
from fqjax.inference.settings import (
    Draws,
    ends_array,
    eos_of,
    kinds_of,
    runnable,
    sampling_of,
)
from fqjax.inference.slots import First, Picked, Slots, Steps
from fqjax.layers.record import automatic_axes
from fqjax.models.cache import Kind
from fqjax.models.causal_lm import GenerativeModel
from fqjax.models.checks import check_tokens
from fqjax.runtime.arguments import check_flag, check_type, check_whole
from fqjax.runtime.errors import InputError, TooLong

LEAST_WIDTH = 64
"""Of a call's pieces, where the widest are not narrower; others are twice as wide, and so on, up to the widest."""

MOST_PASSED = 64
"""Deadlines of requests that have ended, which are kept until they pass or there are more of them."""


class QueueFull(InputError):
    """So many requests wait that one more is refused; it may be submitted again later."""


@dataclasses.dataclass(eq=False)
class _Running:
    """A request that waits or is worked on."""

    ticket: int
    request: Request
    prompt: np.ndarray
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    taken_up: int = 0
    """Tokens of its prompt that are in the cache, or will be when what has been launched has run."""
    launched: int = 0
    """Tokens that have been launched for it."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: Reason | None = None
    """Why it is to end, or has ended."""

    @property
    def decodes(self) -> bool:
        """Whether its prompt has been taken up."""
        return self.taken_up == len(self.prompt)

    @property
    def reports(self) -> bool:
        """Whether it wants logarithms of probabilities."""
        return self.request.logprobs is not None


class _Launched(NamedTuple):
    """Tokens that are on their way to the host, and whose each row is; None where it is nobody's."""

    picked: Picked
    rows: list[_Running | None]


class Engine:
    """A batch of slots, and the requests that wait for one.

    Not thread-safe: one thread calls it, and others hand their requests to that one.

    Args:
      model: as for :func:`fqjax.generate`.
      slots: how many requests are worked on at once.
      capacity: most tokens of a request, those of its prompt and those appended.
      tokens: how many tokens the key-value memory holds in all, in whole pages of
        :data:`fqjax.inference.memory.PAGE`; None for as many as all slots can have.  With fewer, requests wait until there
        is room for all that they may hold.
      chunk: tokens of prompts taken up in one step: more of them bring first tokens sooner, and let the others wait longer
        for their next ones.
      burst: tokens that every slot decodes in one step: more cost fewer round trips to the device, and let free slots wait.
      eos_token_id: token or tokens that end a request; None takes the model's own, an empty list none.
      kv_cache: as for :func:`fqjax.generate`.
      queue: most requests that wait; None for any number.
      shares_prefixes: whether prompts that begin with the same tokens share the pages of these.

    Raises:
      InputError: for settings out of range.
    """

    @automatic_axes()
    def __init__(
        self,
        model: GenerativeModel,
        *,
        slots: int = 8,
        capacity: int = 2048,
        tokens: int | None = None,
        chunk: int = 2048,
        burst: int = 1,
        eos_token_id: int | Iterable[int] | None = None,
        kv_cache: Kind | None = None,
        queue: int | None = None,
        shares_prefixes: bool = True,
    ):
        self._model = runnable(model)
        self._steps = Steps.of(self._model)
        slots, capacity = check_whole("slots", slots, 1), check_whole("capacity", capacity, 2)
        chunk, burst = check_whole("chunk", chunk, 1), check_whole("burst", burst, 1)
        check_flag("shares_prefixes", shares_prefixes)
        self.queue = None if queue is None else check_whole("queue", queue, 0)
        tokens = None if tokens is None else check_whole("tokens", tokens, 1)
        self.config, self.capacity = getattr(model, "config", None), capacity
        self.chunk, self.burst, self.eos = chunk, burst, frozenset(eos_of(model, eos_token_id))
        self.widest = min(chunk, capacity)
        self._ends = jax.device_put(ends_array(sorted(self.eos)))
        self._memory = Memory.of(
            model, self._model.structure, slots, capacity, tokens, self.widest, kv_cache, shares_prefixes
        )
        self.waiting: deque[_Running] = deque()
        self.running: list[_Running | None] = [None] * slots
        self._launched: deque[_Launched] = deque()
        self._leaving: list[_Running] = []
        self._ended: list[_Running] = []
        self._decoding: tuple[list[_Running | None], list[_Running], Kinds, bool] | None = None
        self._deadlines: list[tuple[float, int]] = []
        self._tickets = 0
        self._by_ticket: dict[int, _Running] = {}
        self._cache = self._memory.make(model, slots, kv_cache)
        self._vocabulary = self._logits_shape()[1]
        self._slots = _empty_slots(slots, self._vocabulary)
        self._place = _committed_to(self._model.leaves)
        if self._place is not None:
            # As programs will hand them back: otherwise the first of each would be compiled twice.
            self._cache, self._slots = jax.device_put((self._cache, self._slots), self._place)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is worked on, or has ended without having been handed out."""
        return bool(self.waiting or self._launched or self._by_ticket)

    @property
    def free(self) -> bool:
        """Whether one more request would get a slot in the next step, if there is memory for it."""
        return len(self.waiting) < sum(running is None for running in self.running)

    @property
    def tokens_held(self) -> int:
        """Tokens for which requests have key-value memory."""
        return self._memory.pages.used * self._memory.pages.size

    @property
    def tokens_in_all(self) -> int:
        """Tokens that the key-value memory holds."""
        return self._memory.pages.count * self._memory.pages.size

    def submit(self, request: Request) -> int:
        """Lets a request wait for a free slot.

        Returns:
          Its ticket, a number by which :class:`Output` and :meth:`cancel` name it.

        Raises:
          QueueFull: if too many wait.
          InputError: if it could not be served: an empty prompt, a token outside the vocabulary, settings out of range, or
            more tokens than the capacity or the model's positions.
        """
        check_type("request", request, Request, "a Request")
        (prompt, *others), single = as_prompts(request.prompt)
        if others or not single:
            raise InputError("request: expected the tokens of one prompt, got several prompts")
        request.check()
        length = len(prompt) + int(request.max_new_tokens)
        most = min(self.capacity, self.tokens_in_all)
        if length > most:
            raise TooLong(
                f"request: {len(prompt)} tokens and {request.max_new_tokens} new ones; expected at most {most}, the "
                "capacity of a slot"
            )
        check_tokens(prompt, self.config, length)
        if self.queue is not None and len(self.waiting) >= self.queue + sum(r is None for r in self.running):
            raise QueueFull(f"request: {len(self.waiting)} wait already; expected at most {self.queue} in the queue")
        self._tickets += 1
        until = None if request.deadline is None else time.monotonic() + request.deadline
        running = _Running(self._tickets, request, prompt.astype(np.int32))
        self.waiting.append(running)
        self._by_ticket[running.ticket] = running
        if until is not None:
            if len(self._deadlines) > 2 * len(self._by_ticket) + MOST_PASSED:  # Most are of requests that have ended.
                self._deadlines = [each for each in self._deadlines if each[1] in self._by_ticket]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (until, running.ticket))
        return running.ticket

    def cancel(self, ticket: int) -> None:
        """Ends a request with what it has, in the next step; nothing happens if it has ended."""
        self._end(ticket, "cancelled")

    def _end(self, ticket: int, reason: Reason) -> None:
        running = self._by_ticket.get(ticket)
        if running is not None and running.reason is None:
            running.reason = reason
            self._leaving.append(running)

    @automatic_axes()
    def step(self) -> list[Output]:
        """Launches a step, and returns what the one before has given."""
        self._dismiss()
        self._admit()
        before = len(self._launched)
        self._launch_pieces()
        self._launch_decoding()
        outputs = [output for _ in range(before) for output in self._read(self._launched.popleft())]
        ended, self._ended = self._ended, []
        return outputs + [self._output(running, [], None) for running in ended]

    @automatic_axes()
    def warm_up(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Compiles the programs, before any request comes; but for those of repetition penalties and logarithms of
        probabilities, which are short.

        Args:
          report: called with a word on each, before it is compiled.
        """
        heights = set()
        for width in _widths(self.widest):
            for rows in sorted({1, self.rows(width)}):
                heights.add(rows)
                for fresh in (True, False) if self._memory.pages.shares or width == self.widest else (True,):
                    report(f"prompts, {rows} x {width}{'' if fresh else ', after others'}")
                    self.rehearse(width, rows, fresh)
        report(f"decoding, {len(self.running)} slots")
        for kinds in (Kinds(), Kinds(drawn=True), Kinds(drawn=True, sorted=True)):
            self._advance(kinds, False)
            for rows in heights:
                logits = jnp.zeros((rows, self._vocabulary), device=self._place)
                first = _first([None] * rows, len(self.running))
                self._slots, _ = programs.begin(self._slots, logits, first, self._ends, kinds, False)
        self._slots = programs.release(self._slots, np.ones(len(self.running), bool))
        self.wait()

    def width(self, tokens: int) -> int:
        """How wide a call of pieces is that takes up so many tokens of a prompt, or as many as one can."""
        return next(width for width in _widths(self.widest) if width >= min(tokens, self.widest))

    def rows(self, width: int) -> int:
        """Rows of the largest call of pieces so wide."""
        return min(max(self.chunk // width, 1), len(self.running))

    def rehearse(self, width: int, rows: int, fresh: bool = True) -> None:
        """Launches a call of pieces that are nobody's, which compiles it, or shows what it takes."""
        self._launch([], width, rows, fresh)

    def wait(self) -> None:
        """Until the device has done all that was launched."""
        jax.block_until_ready((self._cache, self._slots))

    def _logits_shape(self) -> tuple[int, ...]:
        """Of a piece of one prompt."""
        piece = self._memory.empty_piece(1, 1, len(self.running))
        run = functools.partial(programs.take_piece, self._model.structure)
        call = functools.partial(run, piece=piece, fresh=True, rows=self._memory.rows)
        logits, _ = jax.eval_shape(lambda leaves, cache: call(leaves, cache), self._model.leaves, self._cache)
        return logits.shape

    def _dismiss(self) -> None:
        """Frees what requests have that were cancelled, or whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            self._end(heapq.heappop(self._deadlines)[1], "deadline")
        if not self._leaving:
            return
        leaving, self._leaving = self._leaving, []
        kept = np.ones(len(self.running), bool)
        for running in leaving:
            if running.slot < 0:
                self.waiting.remove(running)
            elif running.decodes:
                kept[running.slot] = False
            self._free(running)
            self._ended.append(running)
        if not kept.all():
            self._slots = programs.release(self._slots, kept)

    def _admit(self) -> None:
        """Lets the requests that wait into free slots, as long as there are pages for the first of them."""
        for slot, occupied in enumerate(self.running):
            if occupied is not None:
                continue
            if not self.waiting:
                return
            running = self.waiting[0]
            length = len(running.prompt) + int(running.request.max_new_tokens)
            found = self._memory.pages.take(running.prompt, length)
            if found is None:
                return
            self.waiting.popleft()
            running.pages, running.taken_up = found
            running.slot, self.running[slot] = slot, running

    def _launch_pieces(self) -> None:
        """Calls for pieces of prompts, until there are no more, or ``chunk`` tokens are taken up."""
        room = self.chunk
        while room > 0:
            reading = [r for r in self.running if r is not None and not r.decodes]
            if not reading:
                return
            chosen, width = self._choose(sorted(reading, key=lambda r: r.ticket), room)
            if not chosen:
                return
            room -= width * len(chosen)
            self._launch(chosen, width, 1 if len(chosen) == 1 else self.rows(width), not chosen[0].taken_up)

    def _choose(self, reading: list[_Running], room: int) -> tuple[list[_Running], int]:
        """Prompts whose pieces go into one call, and how wide that is: as the first that came needs it.

        Others join it that are as fresh and need no more; the longest first.  A call has one row or as many as it can have;
        where these would be filled by less than half, the first goes alone.
        """
        first = reading[0]
        width = self.width(_left(first))
        if width > room and room < self.chunk:
            return [], width
        rows = min(self.rows(width), room // width)
        if rows < 2 or rows < self.rows(width):
            return [first], width
        alike = [r for r in reading[1:] if bool(r.taken_up) == bool(first.taken_up) and _left(r) <= width]
        chosen = [first, *sorted(alike, key=_left, reverse=True)[: rows - 1]]
        return (chosen if 2 * len(chosen) > rows else chosen[:1]), width

    def _launch(self, chosen: list[_Running], width: int, rows: int, fresh: bool) -> None:
        """A call for the next pieces of some prompts, and for the first tokens of those that end in it."""
        piece = self._memory.empty_piece(rows, width, len(self.running))
        for row, running in enumerate(chosen):
            tokens = running.prompt[running.taken_up : running.taken_up + width]
            piece.tokens[row, : len(tokens)] = tokens
            piece.counts[row], piece.starts[row], piece.slots[row] = len(tokens), running.taken_up, running.slot
            if piece.pages is not None:
                piece.pages[row, : len(running.pages)] = running.pages
            running.taken_up += len(tokens)
            self._memory.pages.publish(running.prompt, running.pages, running.taken_up)
        logits, self._cache = programs.take_piece(*self._model, self._cache, piece, fresh, self._memory.rows)
        ending = [running if running.decodes else None for running in chosen] + [None] * (rows - len(chosen))
        if any(ending):
            self._decoding = None
            first = _first(ending, len(self.running))
            kinds, reports = kinds_of(r.request for r in ending if r), any(r and r.reports for r in ending)
            self._slots, picked = programs.begin(self._slots, logits, first, self._ends, kinds, reports)
            self._send(picked, ending)

    def _launch_decoding(self) -> None:
        if self._decoding is None:  # Looked for once between two changes.
            rows = [r if r is not None and r.decodes else None for r in self.running]
            here = [r for r in rows if r is not None]
            self._decoding = rows, here, kinds_of(r.request for r in here), any(r.reports for r in here)
        rows, here, kinds, reports = self._decoding
        if not here:
            return
        # Not more than the slot that has the furthest to go needs.
        for _ in range(min(self.burst, max(int(r.request.max_new_tokens) - r.launched for r in here))):
            self._send(self._advance(kinds, reports), rows)

    def _advance(self, kinds: Kinds, reports: bool) -> Picked:
        """A token for every slot that decodes."""
        slots = self._slots
        if not any(kinds) and not reports:
            self._cache, self._slots, picked = self._steps.decode(self._cache, slots, self._ends)
            return picked
        logits, self._cache = self._steps.advance(self._cache, slots.token, slots.active)
        self._slots, picked = programs.pick_next(slots, logits, self._ends, kinds, reports)
        return picked

    def _send(self, picked: Picked, rows: list[_Running | None]) -> None:
        """Begins the way of tokens to the host; logarithms of probabilities go along only where they are wanted."""
        if any(rows):
            for array in picked:
                if array is not None:
                    array.copy_to_host_async()
            for running in rows:
                if running is not None:
                    running.launched += 1
            self._launched.append(_Launched(picked, rows))

    def _read(self, launched: _Launched) -> list[Output]:
        """What requests got by a call; of those that have ended since, nothing."""
        outputs, reported = [], None
        tokens = np.asarray(launched.picked.token).tolist()
        for at, (running, token) in enumerate(zip(launched.rows, tokens, strict=True)):
            if running is None or running.reason is not None or token == NO_TOKEN:
                continue
            if token == NOT_FINITE:
                running.reason = "error"
                self._free(running)
                outputs.append(self._output(running, [], None))
                continue
            running.tokens.append(token)
            logprobs = None
            if running.reports:
                reported = reported or _Reported(*map(np.asarray, launched.picked[1:]))
                logprobs = [reported.of(at, running.request.logprobs or 0)]
            if token in self.eos:
                running.reason = "eos"
            elif len(running.tokens) >= running.request.max_new_tokens:
                running.reason = "length"
            if running.reason is not None:
                self._free(running)
            outputs.append(self._output(running, [token], logprobs))
        return outputs

    def _output(self, running: _Running, new: list[int], logprobs: list[TokenLogprobs] | None) -> Output:
        if running.reason is None:
            return Output(running.ticket, new, logprobs, None)
        error = "its logits are not finite; expected a model that predicts it" if running.reason == "error" else ""
        tokens = np.array(running.tokens, np.int32)
        finished = Finished(request=running.request, tokens=tokens, reason=running.reason, error=error)
        return Output(running.ticket, new, logprobs, finished)

    def _free(self, running: _Running) -> None:
        """Gives back what a request has.  What has been launched for it runs before anything that is launched later."""
        self._by_ticket.pop(running.ticket)
        if running.slot >= 0:
            self._memory.pages.give_back(running.pages)
            self.running[running.slot] = self._decoding = None


def _committed_to(leaves: tuple[jax.Array, ...]) -> jax.sharding.Sharding | None:
    """The one device that a model was put on explicitly, as by loading it; None for none, or several."""
    found = {leaf.sharding for leaf in leaves if leaf.committed}
    place = found.pop() if len(found) == 1 else None
    return place if isinstance(place, jax.sharding.SingleDeviceSharding) else None


def _left(running: _Running) -> int:
    """Tokens of a prompt that are still to be taken up."""
    return len(running.prompt) - running.taken_up


def _widths(widest: int) -> list[int]:
    """How wide calls of pieces may be."""
    widths, width = [], LEAST_WIDTH
    while width < widest:
        widths.append(width)
        width *= 2
    return [*widths, widest]


def _first(ending: list[_Running | None], slots: int) -> First:
    """What begins to decode after a call, by the rows of the call."""
    requests = [None if running is None else running.request for running in ending]
    penalized = [r.prompt if r and r.request.repetition_penalty != 1 else np.zeros(0, np.int32) for r in ending]
    longest = max(map(len, penalized))
    width = 1 if not longest else next(w for w in _widths(2**30) if w >= longest)
    return First(
        slots=np.array([slots if running is None else running.slot for running in ending], np.int32),
        limit=np.array([r.max_new_tokens if r else 1 for r in requests], np.int32),
        sampling=sampling_of([r or Draws() for r in requests]),
        prompts=np.stack([np.pad(p, (0, width - len(p)), constant_values=NO_TOKEN) for p in penalized]),
    )


def _empty_slots(slots: int, vocabulary: int) -> Slots:
    sampling = sampling_of([Draws()] * slots)

    @jax.jit
    def make() -> Slots:
        token, step, limit = (jnp.zeros(slots, jnp.int32) for _ in range(3))
        drawn, seen = jax.tree.map(jnp.asarray, sampling), jnp.zeros((slots, vocabulary), bool)
        return Slots(token, step, limit, jnp.zeros(slots, bool), drawn, seen)

    return make()


class _Reported(NamedTuple):
    """Logarithms of probabilities on the host, as in :class:`fqjax.inference.slots.Picked`."""

    logprob: np.ndarray
    top: np.ndarray
    top_logprobs: np.ndarray

    def of(self, row: int, most: int) -> TokenLogprobs:
        """Those of a row's token."""
        top = zip(self.top[row, :most].tolist(), self.top_logprobs[row, :most].tolist(), strict=True)
        return TokenLogprobs(float(self.logprob[row]), list(top))
