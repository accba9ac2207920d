"""Serving: requests of different lengths share a batch, and each takes a free place in it as soon as there is one.

The batch has a fixed number of slots, so that every function of the device is compiled once.  Between two steps the host
looks which requests have ended, hands them out, and puts waiting ones into their slots (continuous batching, Yu et al., Orca,
OSDI 2022).  A prompt goes in piece by piece, one piece a step, while the other slots go on decoding.  There are four
programs, all over one cache and one table of slots that are donated from call to call:

- ``_prefill``: the first piece of a prompt, into a slot whose old content is not looked at;
- ``_extend``: a further piece;
- ``_begin``: the first token after a prompt, and the slot's settings;
- ``_decode``: some tokens for every slot that decodes; the others keep their length, so that what is written after it
  is never seen.

A slot's arithmetic does not depend on its neighbours: a request gets the tokens that :func:`fqjax.generate` gives its prompt
alone with the same settings and seed, up to the rounding of sums in batches of different sizes.

This is a starting point to take over: :func:`serve` is a loop over :class:`Server`, and a network front end would call
its ``submit`` and ``step``.
"""

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from fqjax.inference.generate import (
    GRAPHS,
    as_prompts,
    check_generative,
    check_memory,
    check_settings,
    empty_cache,
    eos_of,
    seed_of,
    take_up,
)
from fqjax.inference.sampling import is_end, sample
from fqjax.layers.record import automatic_axes, split_to_run
from fqjax.models.cache import KeyValueCache, Kind
from fqjax.models.causal_lm import GenerativeModel
from fqjax.models.checks import check_tokens
from fqjax.runtime.arguments import check_type, check_whole
from fqjax.runtime.errors import InputError

NO_TOKEN = -1
"""The token of a slot that does not decode."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue; settings as for :func:`fqjax.generate`.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: how many tokens to append at most.
      temperature: 0 takes the most likely token; above 0 tokens are drawn.
      top_p: in (0, 1]; draw only from the most likely tokens that hold this much probability.
      seed: of the draws.
      name: anything by which the caller knows the request again.
    """

    prompt: object
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    name: object = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A request that has ended.

    Attributes:
      request: as it was submitted.
      tokens: the new tokens, int32 (new,), with the one that ended it if one did; none of a request that was refused.
      reason: "eos" if a token ended it, "length" if there were ``max_new_tokens``, "refused" if it could not be served.
      error: why it was refused; empty if it was not.
    """

    request: Request
    tokens: np.ndarray
    reason: Literal["eos", "length", "refused"]
    error: str = ""


def serve(
    model: GenerativeModel,
    requests: Iterable[Request],
    *,
    slots: int = 8,
    capacity: int = 2048,
    chunk: int = 256,
    burst: int = 1,
    eos_token_id: int | Iterable[int] | None = None,
    kv_cache: Kind | None = None,
) -> Iterator[Finished]:
    """Continues any number of prompts, and yields each as it ends.

    Args:
      model: as for :func:`fqjax.generate`.
      requests: read one at a time, as slots become free.  One that cannot be served is handed out as refused, and ends none
        of the others; an error of the iterable itself is raised when the requests before it have ended.
      slots: how many requests are worked on at once.
      capacity: most tokens of a request, those of its prompt and those appended.
      chunk: tokens of a prompt taken up in one step.
      burst: tokens that every slot decodes in one step: more cost fewer round trips to the device, and let free slots wait.
      eos_token_id: token or tokens that end a request; None takes the model's own, an empty list none.
      kv_cache: as for :func:`fqjax.generate`.

    Yields:
      :class:`Finished`, in the order in which requests end.

    Raises:
      InputError: for settings out of range, when it is called.
    """
    server = Server(
        model,
        slots=slots,
        capacity=capacity,
        chunk=chunk,
        burst=burst,
        eos_token_id=eos_token_id,
        kv_cache=kv_cache,
    )
    if isinstance(requests, Mapping | str | bytes) or not isinstance(requests, Iterable):
        raise InputError(f"requests: expected an iterable of Request, got {type(requests).__name__}")
    return _serve(server, requests)


def _serve(server: "Server", requests: Iterable[Request]) -> Iterator[Finished]:
    failures: list[Exception] = []
    arriving = _until_failure(requests, failures)
    more = True
    while more or server.busy:
        while more and server.free:
            for request in itertools.islice(arriving, 1):
                try:
                    server.submit(request)
                except InputError as error:
                    yield Finished(request=request, tokens=np.zeros(0, np.int32), reason="refused", error=str(error))
                break
            else:
                more = False
        yield from server.step()
    if failures:
        raise failures[0]


def _until_failure(requests: Iterable[Request], failures: list[Exception]) -> Iterator[Request]:
    """The requests up to one that could not be read; the error is kept."""
    try:
        yield from requests
    except Exception as error:  # The caller's code may raise anything; what it gave before is served first.
        failures.append(error)


class Slots(NamedTuple):
    """State of the slots on the device; a row each.

    Attributes:
      token: the last one, which is not in the cache yet.
      step: how many tokens there are.
      limit: how many there may be.
      active: whether it decodes.
      keys: random keys of the draws.
      temperature, top_p: settings of the draws; a temperature of 0 takes the most likely token.
    """

    token: Int32[Array, " slots"]
    step: Int32[Array, " slots"]
    limit: Int32[Array, " slots"]
    active: Bool[Array, " slots"]
    keys: Array
    temperature: Float32[Array, " slots"]
    top_p: Float32[Array, " slots"]


@dataclasses.dataclass
class _Running:
    """State of an occupied slot on the host."""

    request: Request
    prompt: np.ndarray
    taken_up: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)


class Server:
    """A batch of slots, and the requests that wait for one.  Arguments as for :func:`serve`."""

    @automatic_axes()
    def __init__(
        self,
        model: GenerativeModel,
        *,
        slots: int = 8,
        capacity: int = 2048,
        chunk: int = 256,
        burst: int = 1,
        eos_token_id: int | Iterable[int] | None = None,
        kv_cache: Kind | None = None,
    ):
        check_generative(model)
        slots, capacity = check_whole("slots", slots, 1), check_whole("capacity", capacity, 2)
        chunk, burst = check_whole("chunk", chunk, 1), check_whole("burst", burst, 1)
        self.config, self.capacity = getattr(model, "config", None), capacity
        self.chunk, self.burst, self.eos = min(chunk, capacity), burst, eos_of(model, eos_token_id)
        # Whole pieces fit: a write past the capacity would be moved back before it.
        self.whole, self.kv_cache = -(-capacity // self.chunk) * self.chunk, kv_cache
        check_memory(model, slots, self.whole, kv_cache, f"slots {slots}, capacity {capacity}")
        self.waiting: deque[_Running] = deque()
        self.running: list[_Running | None] = [None] * slots
        self.graphdef, self.state = split_to_run(cast(nnx.Module, model))
        self.cache = empty_cache(model, slots, self.whole, kv_cache)
        keys = jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32))
        token, step, limit = (jnp.zeros(slots, jnp.int32) for _ in range(3))
        self.slots = Slots(token, step, limit, jnp.zeros(slots, bool), keys, jnp.zeros(slots), jnp.ones(slots))

    @property
    def busy(self) -> bool:
        """Whether any request waits or is worked on."""
        return bool(self.waiting) or any(running is not None for running in self.running)

    @property
    def free(self) -> bool:
        """Whether one more request would get a slot in the next step."""
        return len(self.waiting) < sum(running is None for running in self.running)

    def submit(self, request: Request) -> None:
        """Lets a request wait for a free slot.

        Raises:
          InputError: if it could not be served: an empty prompt, a token outside the vocabulary, settings out of range, or
            more tokens than the capacity or the model's positions.
        """
        check_type("request", request, Request, "a Request")
        (prompt, *others), single = as_prompts(request.prompt)
        if others or not single:
            raise InputError("request: expected the tokens of one prompt, got several prompts")
        new = check_settings(request.max_new_tokens, request.temperature, request.top_p, request.seed)
        length = len(prompt) + new
        if length > self.capacity:
            raise InputError(
                f"request: {len(prompt)} tokens and {new} new ones; expected at most {self.capacity}, the "
                "capacity of a slot"
            )
        check_tokens(prompt, self.config, length)
        self.waiting.append(_Running(request, prompt.astype(np.int32)))

    @automatic_axes()
    def step(self) -> list[Finished]:
        """Fills free slots, takes up one piece of one prompt, decodes, and returns the requests that have ended."""
        for slot, running in enumerate(self.running):
            if running is None and self.waiting:
                self.running[slot] = self.waiting.popleft()
        self._take_up_piece()
        if any(running is not None and running.tokens for running in self.running):
            self.cache, self.slots, new = _decode(
                self.graphdef, self.state, self.cache, self.slots, self.burst, self.eos
            )
            self._append(np.asarray(new))
        return self._hand_out()

    def _take_up_piece(self) -> None:
        """The next piece of the prompt of which most is in already; at its end, the first token."""
        reading = [i for i, r in enumerate(self.running) if r is not None and r.taken_up < len(r.prompt)]
        if not reading:
            return
        slot = max(reading, key=lambda i: self.running[i].taken_up)  # pyright: ignore[reportOptionalMemberAccess]
        running = self.running[slot]
        assert running is not None
        piece = running.prompt[running.taken_up : running.taken_up + self.chunk]
        count = np.array([len(piece)], np.int32)
        tokens = np.pad(piece, (0, self.chunk - len(piece)))[None]
        if running.taken_up == 0:
            logits, self.cache = _prefill(
                self.graphdef, self.state, self.cache, tokens, count, np.int32(slot), self.whole, self.kv_cache
            )
        else:
            logits, self.cache = _extend(self.graphdef, self.state, self.cache, tokens, count, np.int32(slot))
        running.taken_up += len(piece)
        if running.taken_up == len(running.prompt):
            r = running.request
            settings = np.int32(r.max_new_tokens), np.float32(r.temperature), np.float32(r.top_p)
            self.slots, first = _begin(self.slots, logits, np.int32(slot), seed_of(r.seed), *settings, self.eos)
            running.tokens.append(int(first))

    def _append(self, new: np.ndarray) -> None:
        """Tokens (slots, burst) to those that the requests have."""
        for running, row in zip(self.running, new, strict=True):
            if running is not None:
                running.tokens += [int(token) for token in row if token != NO_TOKEN]

    def _hand_out(self) -> list[Finished]:
        finished = []
        for slot, running in enumerate(self.running):
            if running is None or not running.tokens:
                continue
            ended = running.tokens[-1] in self.eos
            if ended or len(running.tokens) == running.request.max_new_tokens:
                tokens = np.array(running.tokens, np.int32)
                finished.append(Finished(request=running.request, tokens=tokens, reason="eos" if ended else "length"))
                self.running[slot] = None
        return finished


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2)
def _prefill(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: KeyValueCache,
    tokens: Array | np.ndarray,
    count: Array | np.ndarray,
    slot: Array | np.int32,
    capacity: int,
    kv_cache: Kind | None,
) -> tuple[Float32[Array, "1 vocabulary"], KeyValueCache]:
    """The first piece (1, chunk) of a prompt into a slot."""
    model = nnx.merge(graphdef, state)
    logits, filled = take_up(model, tokens, empty_cache(model, 1, capacity, kv_cache), count)
    return logits, _put(cache, filled, slot)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: KeyValueCache,
    tokens: Array | np.ndarray,
    count: Array | np.ndarray,
    slot: Array | np.int32,
) -> tuple[Float32[Array, "1 vocabulary"], KeyValueCache]:
    """A further piece (1, chunk) of a prompt into a slot."""
    held = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, slot, 1, axis=0), cache)
    logits, filled = nnx.merge(graphdef, state).extend(tokens, held, count)
    return logits, _put(cache, filled, slot)


def _put(cache: KeyValueCache, row: KeyValueCache, slot: Array | np.int32) -> KeyValueCache:
    return jax.tree.map(lambda all, one: lax.dynamic_update_slice_in_dim(all, one, slot, axis=0), cache, row)


@functools.partial(jax.jit, static_argnums=7, donate_argnums=0)
def _begin(
    slots: Slots,
    logits: Float32[Array, "1 vocabulary"],
    slot: Array,
    seed: Array,
    limit: Array,
    temperature: Array,
    top_p: Array,
    eos: tuple[int, ...],
) -> tuple[Slots, Int32[Array, ""]]:
    """Picks the first token after a prompt, and lets the slot decode from it."""
    key = jax.random.key(seed)
    first = _pick(logits, key[None], jnp.zeros(1, jnp.int32), temperature[None], top_p[None])[0]
    active = (limit > 1) & ~is_end(first, eos)
    row = (first, jnp.int32(1), limit, active, key, temperature, top_p)
    return Slots(*(all.at[slot].set(one) for all, one in zip(slots, row, strict=True))), first


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=(2, 3), compiler_options=GRAPHS)
def _decode(
    graphdef: nnx.GraphDef, state: nnx.State, cache: KeyValueCache, slots: Slots, burst: int, eos: tuple[int, ...]
) -> tuple[KeyValueCache, Slots, Int32[Array, "slots burst"]]:
    """Up to ``burst`` tokens for every slot that decodes; :data:`NO_TOKEN` for those that do not."""
    model = nnx.merge(graphdef, state)

    def body(carry: tuple[KeyValueCache, Slots], _: None) -> tuple[tuple[KeyValueCache, Slots], Array]:
        cache, s = carry
        logits, cache = model.extend(s.token[:, None], cache, s.active.astype(jnp.int32))
        token = jnp.where(s.active, _pick(logits, s.keys, s.step, s.temperature, s.top_p), s.token)
        step = s.step + s.active
        active = s.active & (step < s.limit) & ~is_end(token, eos)
        new = jnp.where(s.active, token, NO_TOKEN)
        return (cache, s._replace(token=token, step=step, active=active)), new

    (cache, slots), new = lax.scan(body, (cache, slots), length=burst)
    return cache, slots, new.T


def _pick(logits: Array, keys: Array, step: Array, temperature: Array, top_p: Array) -> Int32[Array, " rows"]:
    """A token for each row, drawn as :func:`fqjax.generate` draws its ``step``-th, or the most likely one."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        at = jax.vmap(jax.random.fold_in)(keys, step)
        some = sample(logits, at, jnp.where(temperature > 0, temperature, 1)[:, None], top_p[:, None])
        return jnp.where(temperature > 0, some, likeliest)

    return lax.cond(jnp.any(temperature > 0), drawn, lambda: likeliest)
