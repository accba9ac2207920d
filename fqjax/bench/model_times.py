"""Times of one model on one case: by the clock on the wall, and on a GPU by its own (CUPTI).

A prefill fills an empty cache and gives the logits of the last token; decoding is the loop of :func:`fqjax.generate`,
:data:`DECODED_TOKENS` tokens in one program, over a cache that holds ``length`` tokens, each token the most likely one.
"""

import abc
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp

from fqjax.bench.model_cases import Case
from fqjax.bench.spread import Spread, spread_of
from fqjax.inference.programs import Decoding, decode, prefill
from fqjax.inference.sampling import Kinds
from fqjax.inference.settings import Draws, empty_cache, ends_array, sampling_of
from fqjax.layers.flattened import flattened
from fqjax.models.cache import Kind
from fqjax.models.causal_lm import CausalLM
from pallas_kernels.timing import kernel_times

DECODED_TOKENS = 32
"""Tokens that are decoded in one call."""
SHORT_CALL_TOKENS = 4
"""Tokens of a shorter call, by which a token is told from what every call takes: launching it, and its first token."""
TIMED_CALLS = 15
"""Timed calls of each program, of which the shortest counts."""
LISTED_KERNELS = 12
"""Kernels of a step that are listed, of those that take the longest."""


class KernelTime(TypedDict):
    """A kernel's part of one step."""

    kernel: str
    calls: float
    microseconds: float


class CallTime(TypedDict, total=False):
    """Time that a call takes besides its tokens, where it can be told."""

    call_milliseconds: float


class DeviceTimes(TypedDict, total=False):
    """Times of the GPU's kernels, where there is one."""

    device_milliseconds: float
    kernels: list[KernelTime]


class Timed(CallTime, DeviceTimes):
    """Times of one case."""

    milliseconds: float
    spread: NotRequired[Spread]
    """Of ``milliseconds``, as each of the timed calls gives it; of decoding, each beside the shortest of fewer tokens."""
    tokens_per_second: float
    compile_seconds: float


class _Calls(abc.ABC):
    """Calls of a case's programs, by the number of steps that each takes."""

    lowered: dict[int, jax.stages.Lowered]

    @abc.abstractmethod
    def seconds(self, program: jax.stages.Compiled) -> float:
        """Seconds of one call."""

    def milliseconds(self, programs: Sequence[jax.stages.Compiled]) -> list[list[float]]:
        """Milliseconds of the calls of each program, after one that is not timed."""
        for program in programs:
            self.seconds(program)
        # In turns: what changes meanwhile changes all of them.
        turns = [[self.seconds(program) for program in programs] for _ in range(TIMED_CALLS)]
        return [[1e3 * each for each in seconds] for seconds in zip(*turns, strict=True)]


class _Prefill(_Calls):
    """One program, which makes its cache."""

    def __init__(self, model: CausalLM, case: Case, kv_cache: Kind | None):
        structure, leaves = flattened(model)
        tokens = jax.random.randint(jax.random.key(7), (case.batch, case.length), 0, model.config.vocab_size)
        self.operands = leaves, tokens, jnp.full(case.batch, case.length, jnp.int32)
        self.lowered = {1: prefill.lower(structure, *self.operands, case.length, kv_cache)}

    def seconds(self, program: jax.stages.Compiled) -> float:
        jax.block_until_ready(self.operands)
        start = time.perf_counter()
        jax.block_until_ready(program(*self.operands))
        return time.perf_counter() - start


class _Decoding(_Calls):
    """A longer and a shorter program; each is given the sequences that the call before returned, at their first lengths."""

    def __init__(self, model: CausalLM, case: Case, kv_cache: Kind | None):
        structure, self.leaves = flattened(model)
        self.held, self.sampling = case.length, jax.tree.map(jnp.asarray, sampling_of([Draws()] * case.batch))
        cache = empty_cache(model, case.batch, case.length + DECODED_TOKENS, kv_cache)
        token = jax.random.randint(jax.random.key(7), (case.batch,), 0, model.config.vocab_size)
        self.state = Decoding(cache, token, jnp.int32(0), jnp.zeros(case.batch, bool), None)
        self.rest = self.sampling, jnp.int32(DECODED_TOKENS + 1), jnp.asarray(ends_array(()))
        self.lowered = {
            steps: decode.lower(structure, self.leaves, self.state, *self.rest, steps, Kinds())
            for steps in (DECODED_TOKENS, SHORT_CALL_TOKENS)
        }

    def seconds(self, program: jax.stages.Compiled) -> float:
        batch = self.state.token.shape[0]
        cache = dataclasses.replace(self.state.cache, lengths=jnp.full(batch, self.held, jnp.int32))
        again = self.state._replace(cache=cache, step=jnp.int32(0), ended=jnp.zeros(batch, bool))
        again = jax.block_until_ready(again)
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(program(self.leaves, again, *self.rest))
        return time.perf_counter() - start


def measure(model: CausalLM, case: Case, kv_cache: Kind | None = None) -> Timed:
    """``milliseconds`` a prefill or a decoded token, tokens a second, the device's part, and seconds to compile.

    A token is what a call of more tokens takes longer; ``call_milliseconds`` is what a call takes besides its tokens.
    """
    calls = (_Prefill if case.phase == "prefill" else _Decoding)(model, case, kv_cache)
    start = time.perf_counter()
    programs = [stage.compile() for stage in calls.lowered.values()]
    compile_seconds = (time.perf_counter() - start) / len(programs)
    times = calls.milliseconds(programs)
    whole, *shorter = map(min, times)
    besides, tokens = (shorter[0], DECODED_TOKENS - SHORT_CALL_TOKENS) if shorter else (0.0, 1)
    ms = (whole - besides) / tokens
    call: CallTime = {"call_milliseconds": whole - DECODED_TOKENS * ms} if shorter else {}
    return {
        "milliseconds": ms,
        "spread": spread_of([(each - besides) / tokens for each in times[0]]),
        **call,
        "tokens_per_second": 1e3 * case.batch * (case.length if case.phase == "prefill" else 1) / ms,
        **_device_times(functools.partial(calls.seconds, programs[0]), next(iter(calls.lowered))),
        "compile_seconds": compile_seconds,
    }


def _device_times(call: Callable[[], object], steps: int) -> DeviceTimes:
    """Times of a step's kernels, of one call of so many; none where there is no GPU."""
    if jax.default_backend() != "gpu":
        return {}
    times = kernel_times(call)
    return {"device_milliseconds": sum(us for _, us in times) / 1e3 / steps, "kernels": profile(times, steps)}


def profile(times: Iterable[tuple[str, float]], steps: int) -> list[KernelTime]:
    """Where the time of a step goes: ``kernel``, ``calls`` and ``microseconds``, of one step, the longest first.

    Numbers at the end of names, which tell apart what XLA made several of, are left out.
    """
    found: dict[str, KernelTime] = {}
    for name, microseconds in times:
        name = re.sub(r"[_\d]+$", "", name)
        row = found.setdefault(name, {"kernel": name, "calls": 0.0, "microseconds": 0.0})
        row["calls"] += 1 / steps
        row["microseconds"] += microseconds / steps
    return sorted(found.values(), key=lambda row: -row["microseconds"])[:LISTED_KERNELS]
