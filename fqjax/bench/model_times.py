"""Times of one model on one case: by the clock on the wall, and on a GPU by its own (CUPTI).

A prefill fills an empty cache and gives the logits of the last token; decoding is the loop of :func:`fqjax.generate`,
:data:`DECODED_TOKENS` tokens in one program, over a cache that holds ``length`` tokens, each token the most likely one.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from fqjax.bench.model_cases import Case
from fqjax.inference.generate import decode, prefill
from fqjax.layers.record import split_to_run
from fqjax.models.cache import KeyValueCache
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
    tokens_per_second: float
    compile_seconds: float


@dataclasses.dataclass
class _Calls:
    """Calls of a case's programs: each is given the cache that the call before returned, at the lengths of the first.

    Programs take ``state``, ``before``, the cache, which is donated, and ``after``.
    """

    case: Case
    state: nnx.State
    before: tuple[jax.Array, ...]
    cache: KeyValueCache
    after: tuple[jax.Array | None, ...]

    def seconds(self, program: jax.stages.Compiled) -> float:
        """Seconds of one call."""
        held = jnp.full(self.case.batch, self.case.length if self.case.phase == "decode" else 0, jnp.int32)
        self.cache = jax.block_until_ready(KeyValueCache(self.cache.layers, held))
        start = time.perf_counter()
        _, self.cache = jax.block_until_ready(program(self.state, *self.before, self.cache, *self.after))
        return time.perf_counter() - start

    def least_milliseconds(self, programs: Sequence[jax.stages.Compiled]) -> list[float]:
        """Milliseconds of the shortest call of each program, after one that is not timed."""
        for program in programs:
            self.seconds(program)
        # In turns: what changes meanwhile changes all of them.
        turns = [[self.seconds(program) for program in programs] for _ in range(TIMED_CALLS)]
        return [1e3 * min(seconds) for seconds in zip(*turns, strict=True)]


def measure(model: CausalLM, case: Case, kv_cache: Literal["int8"] | None = None) -> Timed:
    """``milliseconds`` a prefill or a decoded token, tokens a second, the device's part, and seconds to compile.

    A token is what a call of more tokens takes longer; ``call_milliseconds`` is what a call takes besides its tokens.
    """
    prepare = _prepare_prefill if case.phase == "prefill" else _prepare_decoding
    calls, lowered = prepare(model, case, jnp.int8 if kv_cache else None)
    start = time.perf_counter()
    programs = [stage.compile() for stage in lowered.values()]
    compile_seconds = (time.perf_counter() - start) / len(programs)
    whole, *shorter = calls.least_milliseconds(programs)
    ms = (whole - shorter[0]) / (DECODED_TOKENS - SHORT_CALL_TOKENS) if shorter else whole
    call: CallTime = {"call_milliseconds": whole - DECODED_TOKENS * ms} if shorter else {}
    return {
        "milliseconds": ms,
        **call,
        "tokens_per_second": 1e3 * case.batch * (case.length if case.phase == "prefill" else 1) / ms,
        **_device_times(functools.partial(calls.seconds, programs[0]), next(iter(lowered))),
        "compile_seconds": compile_seconds,
    }


def _prepare_prefill(
    model: CausalLM, case: Case, dtype: DTypeLike | None
) -> tuple[_Calls, dict[int, jax.stages.Lowered]]:
    """The calls, and the program by the number of steps that it takes, which is one."""
    graphdef, state = split_to_run(model)
    cache = model.make_cache(case.batch, case.length, dtype)
    tokens = jax.random.randint(jax.random.key(7), (case.batch, case.length), 0, model.config.vocab_size)
    counts = jnp.full(case.batch, case.length, jnp.int32)
    lowered = {1: prefill.lower(graphdef, state, tokens, cache, counts)}
    return _Calls(case, state, (tokens,), cache, (counts,)), lowered


def _prepare_decoding(
    model: CausalLM, case: Case, dtype: DTypeLike | None
) -> tuple[_Calls, dict[int, jax.stages.Lowered]]:
    """The calls, and a longer and a shorter program by the number of steps that each takes."""
    graphdef, state = split_to_run(model)
    cache = model.make_cache(case.batch, case.length + DECODED_TOKENS, dtype)
    after = jax.random.normal(jax.random.key(7), (case.batch, model.config.vocab_size)), None, None
    # One token more, which the logits give.
    lowered = {
        steps: decode.lower(graphdef, state, cache, *after, steps + 1, ())
        for steps in (DECODED_TOKENS, SHORT_CALL_TOKENS)
    }
    return _Calls(case, state, (), cache, after), lowered


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
