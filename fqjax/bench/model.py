"""Times of whole models: taking up prompts and decoding, every scheme beside bfloat16 in one run.

Weights are random (:mod:`fqjax.bench.random_models`).  A prefill fills an empty cache and gives the logits of the last token;
decoding is the loop of :func:`fqjax.generate`, :data:`DECODED_TOKENS` tokens in one program, over a cache that holds
``length`` tokens, each token the most likely one.  Times are those of the clock on the wall, the least of several;
``device_milliseconds`` are those of the GPU's kernels alone (CUPTI), so that what lies between is the host's.
"""

import dataclasses
import functools
import gc
import re
import time
from collections.abc import Callable, Iterable
from typing import Literal, NotRequired, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx

from fqjax.bench.environment import Environment, describe, environment
from fqjax.bench.kernels import ceilings
from fqjax.bench.random_models import Config, random_model, unit_macs
from fqjax.checkpoint.hugging_face import abstract_model
from fqjax.core.stored_inputs import FloatingInput
from fqjax.drivers.ties import units_of
from fqjax.inference.generate import decode, prefill
from fqjax.layers.record import split_to_run
from fqjax.layers.surgery import select_linears
from fqjax.models.cache import KeyValueCache
from fqjax.models.causal_lm import CausalLM
from fqjax.presets import resolve_scheme
from fqjax.runtime.errors import InputError
from fqjax.scheme import Scheme
from pallas_kernels.timing import kernel_times

BASELINE_SCHEME = "bf16"
"""The scheme that the others are compared with."""
DECODED_TOKENS = 32
"""Tokens that are decoded in one call."""
SHORT_CALL_TOKENS = 4
"""Tokens of a shorter call, by which a token is told from what every call takes: launching it, and its first token."""
TIMED_CALLS = 15
"""Timed calls of each program, of which the shortest counts."""
LISTED_KERNELS = 12
"""Kernels of a step that are listed, of those that take the longest."""
Phase = Literal["prefill", "decode"]
INT8_HEAD_SUFFIX, INT8_CACHE_SUFFIX = "+int8-head", "+int8-cache"
"""Ends of the name of a scheme where the output head, or the keys and values, are INT8 too."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A case that is timed: so many sequences of so many tokens; with "decode", so many are in the cache."""

    phase: Phase
    batch: int
    length: int


GPU_CASES = (
    *(Case("prefill", *shape) for shape in ((1, 2048), (4, 2048), (1, 8192))),
    *(Case("decode", batch, length) for length in (512, 4096) for batch in (1, 16, 64)),
)
CPU_CASES = (Case("prefill", 1, 128), Case("decode", 1, 128), Case("decode", 4, 128))
"""Cases that are timed where there is no GPU."""
SCHEMES = (
    "bf16",
    "flattenquant-w8a8",
    "flattenquant-hopper",
    "flattenquant-hopper-int4",
    "flattenquant",
    "w4a8",
    "w4a8-integer-scale",
    "w4a8-integer-scale-folded",
    "w4a16",
)


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


class CaseOfScheme(TypedDict):
    """A case, with the model and the scheme."""

    model: str
    scheme: str
    phase: Phase
    batch: int
    length: int


class ModelRow(CaseOfScheme, Timed):
    """One measured case."""

    date: NotRequired[str]
    device_bytes: int
    floor_milliseconds: float | None
    ratio_to_bf16: float | None


class Skipped(TypedDict):
    """A scheme, or one of its cases, that was not measured, and why."""

    model: str
    scheme: str
    phase: NotRequired[Phase]
    batch: NotRequired[int]
    length: NotRequired[int]
    why: str


class ModelResult(Environment):
    """All measured cases, with the ceilings of the device, and those that were not measured."""

    ceilings: dict[str, float]
    extra_channels: float
    rows: list[ModelRow]
    skipped: list[Skipped]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A scheme as it is measured: its output head may be INT8 (``scheme.head``), and so may the cache."""

    scheme: Scheme
    kv_cache: Literal["int8"] | None = None

    @property
    def name(self) -> str:
        return (
            self.scheme.name
            + INT8_HEAD_SUFFIX * (self.scheme.head == "int8")
            + INT8_CACHE_SUFFIX * (self.kv_cache is not None)
        )


def parse_variant(text: str) -> Variant:
    """A preset's name, which ``+int8-head`` and ``+int8-cache`` may follow.

    Raises:
      InputError: if there is no preset of that name, or something else follows.
    """
    name, *options = text.split("+")
    for option in options:
        if f"+{option}" not in (INT8_HEAD_SUFFIX, INT8_CACHE_SUFFIX):
            raise InputError(f"scheme {text}: {option!r} follows; expected {INT8_HEAD_SUFFIX} or {INT8_CACHE_SUFFIX}")
    scheme = resolve_scheme(name)
    if INT8_HEAD_SUFFIX[1:] in options:
        scheme = dataclasses.replace(scheme, head="int8")
    return Variant(scheme, "int8" if INT8_CACHE_SUFFIX[1:] in options else None)


def default_cases() -> tuple[Case, ...]:
    """:data:`GPU_CASES` on a GPU, :data:`CPU_CASES` elsewhere."""
    return GPU_CASES if jax.default_backend() == "gpu" else CPU_CASES


def parse_case(phase: Phase, text: str) -> Case:
    """``"4x2048"`` to so many sequences of so many tokens.

    Raises:
      InputError: if it is not two positive numbers.
    """
    batch, cross, length = text.partition("x")
    if not (cross and batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
        raise InputError(f"--{phase} {text}: expected sequences x tokens, such as 4x2048")
    return Case(phase, int(batch), int(length))


def run(
    name: str,
    architecture: tuple[str, Config],
    schemes: Iterable[str | Variant] = SCHEMES,
    cases: Iterable[Case] | None = None,
    *,
    extra: float = 0.05,
    seconds: float = float("inf"),
    report: Callable[[ModelRow], None] = lambda row: None,
    keep: Callable[[ModelResult], None] = lambda result: None,
) -> ModelResult:
    """Measures every scheme on every case.

    Args:
      name: of the model, for the result.
      architecture: its name and configuration (:func:`fqjax.bench.random_models.architecture`).
      schemes: what :func:`parse_variant` takes; ratios are to "bf16", which is measured first if it is among them.
      cases: by default those of :func:`default_cases`.
      extra: share of extra channels of schemes that flatten.
      seconds: after so many no further scheme is begun.
      report: called with every row of the result as it comes.
      keep: called with the result so far after every scheme.

    Returns:
      ``device``, ``versions``, ``date``, ``ceilings`` and ``rows``, as the command's ``--json`` writes them, and ``skipped``:
      cases that did not fit into the device's memory.
    """
    cases = default_cases() if cases is None else tuple(cases)
    longest = architecture[1].max_length
    for case in cases:
        appended = DECODED_TOKENS if case.phase == "decode" else 0
        if longest is not None and case.length + appended > longest:
            raise InputError(f"--{case.phase} {case.batch}x{case.length}: the model has {longest} positions")
    result: ModelResult = {
        **environment(),
        "ceilings": ceilings(),
        "extra_channels": extra,
        "rows": [],
        "skipped": [],
    }
    plain: dict[Case, float] = {}
    work = linear_macs(*architecture)
    begun = time.monotonic()
    variants = [parse_variant(scheme) if isinstance(scheme, str) else scheme for scheme in schemes]
    for variant in sorted(variants, key=lambda variant: variant.name != BASELINE_SCHEME):
        if time.monotonic() - begun > seconds:
            result["skipped"].append({"model": name, "scheme": variant.name, "why": "out of time"})
            continue
        gc.collect()
        before = _bytes_in_use()
        try:
            model = random_model(*architecture, variant.scheme, extra=extra)
            jax.block_until_ready(nnx.state(model))
        except jax.errors.JaxRuntimeError as error:
            result["skipped"].append({"model": name, "scheme": variant.name, "why": _first_line(error)})
            continue
        used = _bytes_in_use() - before or sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        for case in cases:
            of: CaseOfScheme = {
                "model": name,
                "scheme": variant.name,
                "phase": case.phase,
                "batch": case.batch,
                "length": case.length,
            }
            try:
                times = measure(model, case, variant.kv_cache)
            except jax.errors.JaxRuntimeError as error:
                result["skipped"].append({**of, "why": _first_line(error)})
                continue
            if variant.name == BASELINE_SCHEME:
                plain[case] = times["milliseconds"]
            row: ModelRow = {
                **of,
                **times,
                "device_bytes": used,
                "floor_milliseconds": floor(model, case, variant, used, work, result["ceilings"]),
                "ratio_to_bf16": plain[case] / times["milliseconds"] if case in plain else None,
            }
            result["rows"].append(row)
            report(row)
        del model
        keep(result)
    return result


def linear_macs(name: str, config: Config) -> int:
    """Multiply-accumulates of an architecture's linear layers for one token, the head left out."""
    linears = select_linears(abstract_model(name, config, jnp.bfloat16)).linears
    return sum(unit_macs(linears[names[0]], len(names), config) for names in units_of(linears).values())


def floor(
    model: CausalLM, case: Case, variant: Variant, used: int, macs: int, ceilings: dict[str, float]
) -> float | None:
    """Milliseconds that a case takes at least, at the ceilings that were measured; None where they or its work are not known.

    A prefill takes the time of its products: those of linear layers in the numbers they are multiplied in, those of
    attention, of which causality leaves half, and of the head in bfloat16.  Decoding takes the time to read all weights but
    the embedding, and the filled cache.
    """
    config, tokens = model.config, case.batch * case.length
    if not ceilings.get("bf16_tflops") or (case.phase == "decode" and hasattr(config, "num_experts")):
        return None
    (layer, *_), layers = model.make_cache(1, 1).layers, config.num_hidden_layers
    kv_heads, dim = layer.keys.shape[2:]
    table = config.vocab_size * config.hidden_size
    if case.phase == "decode":
        entry = (dim + 4 if variant.kv_cache else 2 * dim) * kv_heads  # An INT8 token and head has a scale.
        weights = used - (0 if config.tie_word_embeddings else 2 * table)
        return (weights + 2 * layers * tokens * entry) / ceilings["copy_tb_per_s"] / 1e9
    method = variant.scheme.method
    exact = method is not None and method.formats(4)[1] is not FloatingInput
    attention = layers * config.num_attention_heads * dim * case.batch * case.length**2
    bf16 = attention + case.batch * table + (0 if exact else macs * tokens)
    return 2e-9 * (bf16 / ceilings["bf16_tflops"] + exact * macs * tokens / ceilings["int8_tops"])


def measure(model: CausalLM, case: Case, kv_cache: Literal["int8"] | None = None) -> Timed:
    """``milliseconds`` a prefill or a decoded token, tokens a second, the device's part, and seconds to compile.

    A token is what a call of more tokens takes longer; ``call_milliseconds`` is what a call takes besides its tokens.
    """
    graphdef, state = split_to_run(model)
    vocabulary, key = model.config.vocab_size, jax.random.key(7)
    dtype = jnp.int8 if kv_cache else None
    if case.phase == "prefill":
        cache = model.make_cache(case.batch, case.length, dtype)
        tokens = jax.random.randint(key, (case.batch, case.length), 0, vocabulary)
        before, after = (tokens,), (jnp.full(case.batch, case.length, jnp.int32),)
        lowered = [(1, prefill.lower(graphdef, state, *before, cache, *after))]
    else:
        cache = model.make_cache(case.batch, case.length + DECODED_TOKENS, dtype)
        before, after = (), (jax.random.normal(key, (case.batch, vocabulary)), None, None)
        given = graphdef, state, cache, *after
        # One token more, which the logits give.
        lowered = [(steps, decode.lower(*given, steps + 1, ())) for steps in (DECODED_TOKENS, SHORT_CALL_TOKENS)]
    start = time.perf_counter()
    programs = [(steps, stage.compile()) for steps, stage in lowered]
    compiling = (time.perf_counter() - start) / len(programs)

    def once(program: jax.stages.Compiled) -> float:
        """Seconds of one call, from the same lengths each time."""
        nonlocal cache
        held = jnp.full(case.batch, case.length if case.phase == "decode" else 0, jnp.int32)
        cache = jax.block_until_ready(KeyValueCache(cache.layers, held))
        start = time.perf_counter()
        _, cache = jax.block_until_ready(program(state, *before, cache, *after))
        return time.perf_counter() - start

    for _, program in programs:
        once(program)
    # In turns: what changes meanwhile changes all of them.
    turns = [[once(program) for _, program in programs] for _ in range(TIMED_CALLS)]
    calls = [1e3 * min(seconds) for seconds in zip(*turns, strict=True)]
    steps, program = programs[0]
    ms = calls[0] if len(programs) == 1 else (calls[0] - calls[1]) / (DECODED_TOKENS - SHORT_CALL_TOKENS)
    new = case.batch * (case.length if case.phase == "prefill" else 1)
    call: CallTime = {"call_milliseconds": calls[0] - DECODED_TOKENS * ms} if len(programs) > 1 else {}
    device: DeviceTimes = {}
    if jax.default_backend() == "gpu":
        times = kernel_times(functools.partial(once, program))
        device = {"device_milliseconds": sum(us for _, us in times) / 1e3 / steps, "kernels": profile(times, steps)}
    return {
        "milliseconds": ms,
        **call,
        "tokens_per_second": 1e3 * new / ms,
        **device,
        "compile_seconds": compiling,
    }


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


def _bytes_in_use() -> int:
    """Bytes that the device's allocator has given out; 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def line(row: ModelRow) -> str:
    """One row of the result, to be read as it comes."""
    ratio = f"{row['ratio_to_bf16']:5.2f} x bf16" if row["ratio_to_bf16"] else ""
    device = f" ({row['device_milliseconds']:.3f} on the device)" if "device_milliseconds" in row else ""
    shape = f"{row['batch']} x {row['length']}"
    return (
        f"{row['scheme']:26} {row['phase']:8}{shape:>10}  {row['milliseconds']:9.3f} ms{device}  "
        f"{row['tokens_per_second']:9.4g} tokens/s  {row['device_bytes'] / 1e9:6.2f} GB  {ratio}"
    )


def summary(result: ModelResult) -> str:
    """Where the rows were measured, and what did not fit there."""
    lines = [describe(result)]
    lines += [f"{skipped['scheme']} left out: {skipped['why']}" for skipped in result["skipped"]]
    return "\n".join(lines)
