"""Serving measured as its users see it: requests that arrive at a rate or all at once, through the public engine.

Weights are random (:mod:`fqjax.bench.random_models`), prompts are random tokens that share no prefix, and nothing ends a
request but its limit.  Beside what was reached stands what the calls of prompts and the steps of decoding allow, both
measured in the same run, each alone.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable
from typing import NotRequired, TypedDict

import jax
import numpy as np

from fqjax.bench.environment import Environment, describe, environment
from fqjax.bench.model_cases import BASELINE_SCHEME, Variant, parse_variant
from fqjax.bench.random_models import Config, random_model
from fqjax.inference.engine import Engine
from fqjax.inference.generate import BURST, generate, stream
from fqjax.inference.requests import Request
from fqjax.layers.flattened import flattened
from fqjax.models.causal_lm import CausalLM
from fqjax.runtime.errors import InputError
from pallas_kernels.timing import kernel_times

STEPS = 32
"""Steps of decoding that are timed with all slots at work."""
CALLS = 8
"""Calls of prompts that are timed, one after the other."""
GENERATED = 8
"""Tokens of a timed call of ``generate``."""
STREAMED = 128
"""Tokens by which streaming is compared with not streaming."""
FIRSTS = 15
"""Requests into a busy batch, whose first tokens are timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine is asked to do.

    Attributes:
      slots, burst, chunk: of the engine.
      prompt, new: tokens of each request; two numbers draw one between them for each.
      requests: how many come.
      rate: how many arrive in a second, at random (Poisson); None for all at once.
    """

    slots: int = 64
    prompt: tuple[int, int] = (512, 512)
    new: tuple[int, int] = (128, 128)
    requests: int = 192
    rate: float | None = None
    burst: int = 1
    chunk: int = 2048


class ServingRow(TypedDict):
    """One measured load.

    Attributes:
      seconds: from the first request's coming to the last one's end.
      milliseconds_per_step, host_milliseconds_per_step, device_milliseconds_per_step: of decoding with all slots at work, by
        the clock on the wall, by the processor's in the calling thread, and of the GPU's kernels alone.
      prefill_tokens_per_second: of calls of prompts one after the other.
      allowed_tokens_per_second: output tokens a second, if all prompts took such calls, and all tokens such steps.
      ttft_ms, tpot_ms: time from a request's coming to its first token, and from there on a token; half and 99 % take less.
      busy_ttft_ms_p50: of a request that comes while all other slots decode.
    """

    model: str
    scheme: str
    slots: int
    burst: int
    chunk: int
    prompt: list[int]
    new: list[int]
    requests: int
    rate: float | None
    seconds: float
    output_tokens_per_second: float
    allowed_tokens_per_second: float
    milliseconds_per_step: float
    host_milliseconds_per_step: float
    device_milliseconds_per_step: NotRequired[float]
    prefill_tokens_per_second: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p50: float
    tpot_ms_p99: float
    busy_ttft_ms_p50: float
    ratio_to_bf16: float | None


class GenerateRow(TypedDict):
    """A call of ``generate``: milliseconds on the wall and of the device, and tokens a second streamed over not streamed.

    The device's are those of the kernels for the prompt, and for every further token what more of them take longer.
    """

    model: str
    scheme: str
    prompt: int
    new: int
    milliseconds: float
    device_milliseconds: NotRequired[float]
    streamed_over_whole: float


class ServingResult(Environment):
    """All measured loads, and calls of ``generate``."""

    rows: list[ServingRow]
    generate: list[GenerateRow]


def run(
    name: str,
    architecture: tuple[str, Config],
    schemes: Iterable[str | Variant],
    loads: Iterable[Load],
    *,
    report: Callable[[ServingRow | GenerateRow], None] = lambda row: None,
    keep: Callable[[ServingResult], None] = lambda result: None,
) -> ServingResult:
    """Measures every scheme under every load.

    Args:
      name: of the model, for the result.
      architecture: its name and configuration (:func:`fqjax.bench.random_models.architecture`).
      schemes: what :func:`fqjax.bench.model_cases.parse_variant` takes; ratios are to "bf16", if it is among them.
      loads: what the engine is asked to do.
      report: called with every row as it comes.
      keep: called with the result so far after every row.

    Raises:
      InputError: if the model has fewer positions than a request of a load.
    """
    loads = tuple(loads)
    for load in loads:
        _check(load, architecture[1].max_length)
    result: ServingResult = {**environment(), "rows": [], "generate": []}
    variants = [parse_variant(scheme) if isinstance(scheme, str) else scheme for scheme in schemes]
    baseline: dict[Load, float] = {}
    for variant in sorted(variants, key=lambda variant: variant.name != BASELINE_SCHEME):
        model = random_model(*architecture, variant.scheme)
        jax.block_until_ready(flattened(model).leaves)
        call = _generate_row(name, model, variant, loads[0].prompt[1])
        result["generate"].append(call)
        report(call)
        for load in loads:
            row = _row(name, model, variant, load)
            if variant.name == BASELINE_SCHEME:
                baseline[load] = row["output_tokens_per_second"]
            if load in baseline:
                row["ratio_to_bf16"] = row["output_tokens_per_second"] / baseline[load]
            result["rows"].append(row)
            report(row)
            keep(result)
        del model
        gc.collect()
    return result


def _check(load: Load, positions: int | None) -> None:
    longest = load.prompt[1] + load.new[1]
    if positions is not None and longest > positions:
        raise InputError(
            f"--prompt and --new: {longest} tokens; expected at most {positions}, the positions of the model"
        )
    for name, (least, most) in (("--prompt", load.prompt), ("--new", load.new)):
        if not 1 <= least <= most:
            raise InputError(f"{name} {least}-{most}: expected two numbers above 0, the smaller one first")


def _generate_row(name: str, model: CausalLM, variant: Variant, length: int) -> GenerateRow:
    """A call of ``generate`` by the clock and by the device, and streaming against not."""
    prompt = np.random.default_rng(7).integers(0, model.config.vocab_size, length).astype(np.int32)

    def call(new: int = GENERATED) -> None:
        generate(model, prompt, new, eos_token_id=[], kv_cache=variant.kv_cache)

    def streamed() -> None:
        for _ in stream(model, prompt, STREAMED, eos_token_id=[], kv_cache=variant.kv_cache):
            pass

    whole = _least(lambda: call(STREAMED), 3)
    row: GenerateRow = {
        "model": name,
        "scheme": variant.name,
        "prompt": length,
        "new": GENERATED,
        "milliseconds": 1e3 * _least(call, 15),
        "streamed_over_whole": whole / _least(streamed, 3),
    }
    if jax.default_backend() == "gpu":
        # What a GPU does in a loop is not told apart; a token is what more of them take longer, in one program.
        token = (_least(lambda: call(BURST), 15) - row["milliseconds"] / 1e3) / (BURST - GENERATED)
        prompt_alone = sum(us for _, us in kernel_times(lambda: call(1))) / 1e6
        row["device_milliseconds"] = 1e3 * (prompt_alone + (GENERATED - 1) * token)
    return row


def _least(call: Callable[[], None], count: int) -> float:
    """Seconds of the shortest of so many calls, after one that is not timed."""
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


class _Driver:
    """An engine under a load."""

    def __init__(self, model: CausalLM, variant: Variant, load: Load):
        self.load, self.vocabulary = load, model.config.vocab_size
        self.rng = np.random.default_rng(0)
        self.engine = Engine(
            model,
            slots=load.slots,
            capacity=load.prompt[1] + max(load.new[1], STEPS + load.slots),
            chunk=load.chunk,
            burst=load.burst,
            eos_token_id=[],
            kv_cache=variant.kv_cache,
            shares_prefixes=False,
        )

    def request(self, new: int | None = None) -> Request:
        """With lengths that are drawn, but for new tokens that are given."""
        length = int(self.rng.integers(self.load.prompt[0], self.load.prompt[1] + 1))
        new = int(self.rng.integers(self.load.new[0], self.load.new[1] + 1)) if new is None else new
        return Request(prompt=self.rng.integers(0, self.vocabulary, length).astype(np.int32), max_new_tokens=new)

    def warm(self) -> None:
        """Compiles what the load needs."""
        if self.load.prompt[0] != self.load.prompt[1]:
            self.engine.warm_up()
        for count in (self.engine.rows(self.engine.width(self.load.prompt[1])), 1):
            for _ in range(count):
                self.engine.submit(self.request(4))
            self.drain()

    def drain(self) -> None:
        while self.engine.busy:
            self.engine.step()

    def fill(self) -> None:
        """Lets all slots decode."""
        slots = self.load.slots
        # What comes first goes on until what comes last has begun, and for the steps that are timed.
        for _ in range(slots):
            self.engine.submit(self.request(STEPS + slots))
        while not all(running is not None and running.decodes for running in self.engine.running):
            self.engine.step()

    def step_seconds(self) -> tuple[float, float]:
        """Of a step of decoding in all slots: on the wall, and of the processor in this thread."""
        steps = STEPS - 8
        self.engine.step()
        wall, processor = time.perf_counter(), time.thread_time()
        for _ in range(max(steps // self.load.burst, 1)):
            self.engine.step()
        tokens = max(steps // self.load.burst, 1) * self.load.burst
        return (time.perf_counter() - wall) / tokens, (time.thread_time() - processor) / tokens

    def prefill_seconds(self) -> float:
        """Of a call of as many prompts as go into one, called one after the other."""
        width = self.engine.width(self.load.prompt[1])
        rows = self.engine.rows(width)
        self.engine.rehearse(width, rows)
        self.engine.wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            self.engine.rehearse(width, rows)
        self.engine.wait()
        return (time.perf_counter() - start) / CALLS / rows

    def first_tokens(self) -> list[float]:
        """Seconds to the first token of requests that come one by one, while all other slots decode."""
        found = []
        for _ in range(FIRSTS):
            self._occupy(self.load.slots - 1)
            begun, first = time.perf_counter(), None
            ticket = self.engine.submit(self.request(1))
            while first is None:
                for output in self.engine.step():
                    if output.ticket == ticket and output.tokens:
                        first = time.perf_counter() - begun
            found.append(first)
        return found

    def _occupy(self, slots: int) -> None:
        """Lets so many slots decode, and the others be free."""
        while True:
            running = [each for each in self.engine.running if each is not None]
            for _ in range(slots - len(running) - len(self.engine.waiting)):
                self.engine.submit(self.request(STEPS + self.load.slots))
            if len(running) == slots and all(each.decodes for each in running):
                return
            self.engine.step()


def _row(name: str, model: CausalLM, variant: Variant, load: Load) -> ServingRow:
    driver = _Driver(model, variant, load)
    driver.warm()
    prefill = driver.prefill_seconds()
    driver.fill()
    step, host = driver.step_seconds()
    device = _device_milliseconds(driver)
    driver.drain()
    first_tokens = driver.first_tokens()
    driver.drain()
    seconds, tokens, ttft, tpot = _served(driver)
    prompts = load.requests * sum(load.prompt) / 2
    allowed = tokens / (load.requests * prefill + tokens / load.slots * step)
    return {
        "model": name,
        "scheme": variant.name,
        "slots": load.slots,
        "burst": load.burst,
        "chunk": load.chunk,
        "prompt": list(load.prompt),
        "new": list(load.new),
        "requests": load.requests,
        "rate": load.rate,
        "seconds": seconds,
        "output_tokens_per_second": tokens / seconds,
        "allowed_tokens_per_second": allowed,
        "milliseconds_per_step": 1e3 * step,
        "host_milliseconds_per_step": 1e3 * host,
        **device,
        "prefill_tokens_per_second": prompts / load.requests / prefill,
        "ttft_ms_p50": 1e3 * float(np.percentile(ttft, 50)),
        "ttft_ms_p99": 1e3 * float(np.percentile(ttft, 99)),
        "tpot_ms_p50": 1e3 * float(np.percentile(tpot, 50)),
        "tpot_ms_p99": 1e3 * float(np.percentile(tpot, 99)),
        "busy_ttft_ms_p50": 1e3 * float(np.median(first_tokens)),
        "ratio_to_bf16": None,
    }


class _DeviceTime(TypedDict, total=False):
    device_milliseconds_per_step: float


def _device_milliseconds(driver: _Driver) -> _DeviceTime:
    """Of the kernels of a step, where there is a GPU."""
    if jax.default_backend() != "gpu":
        return {}
    total = sum(us for _, us in kernel_times(lambda: (driver.engine.step(), driver.engine.wait())))
    return {"device_milliseconds_per_step": total / 1e3 / driver.load.burst}


def _served(driver: _Driver) -> tuple[float, int, list[float], list[float]]:
    """Seconds, tokens, and each request's times to its first token and a token after it."""
    load, engine = driver.load, driver.engine
    gaps = np.zeros(load.requests) if load.rate is None else driver.rng.exponential(1 / load.rate, load.requests)
    arrivals, requests = np.cumsum(gaps).tolist(), [driver.request() for _ in range(load.requests)]
    came, first, last, counts = {}, {}, {}, {}
    begun, at = time.perf_counter(), 0
    while at < len(requests) or engine.busy:
        now = time.perf_counter() - begun
        while at < len(requests) and arrivals[at] <= now:
            came[engine.submit(requests[at])] = arrivals[at]
            at += 1
        if not engine.busy:
            time.sleep(max(arrivals[at] - now, 0))
            continue
        for output in engine.step():
            if output.tokens:
                last[output.ticket] = time.perf_counter() - begun
                first.setdefault(output.ticket, last[output.ticket])
                counts[output.ticket] = counts.get(output.ticket, 0) + len(output.tokens)
    seconds = time.perf_counter() - begun
    ttft = [first[ticket] - came[ticket] for ticket in first]
    tpot = [(last[t] - first[t]) / (counts[t] - 1) for t in first if counts[t] > 1] or [0.0]
    return seconds, sum(counts.values()), ttft, tpot


def line(row: ServingRow | GenerateRow) -> str:
    """One row of the result, to be read as it comes."""
    if "slots" not in row:
        device = f" ({row['device_milliseconds']:.2f} on the device)" if "device_milliseconds" in row else ""
        return (
            f"{row['scheme']:26} generate {row['prompt']} + {row['new']}  {row['milliseconds']:.2f} ms{device}  "
            f"streamed {row['streamed_over_whole']:.2f} x"
        )
    device = f" ({row['device_milliseconds_per_step']:.2f})" if "device_milliseconds_per_step" in row else ""
    ratio = f"  {row['ratio_to_bf16']:.2f} x bf16" if row["ratio_to_bf16"] else ""
    share = row["output_tokens_per_second"] / row["allowed_tokens_per_second"]
    return (
        f"{row['scheme']:26} {row['slots']:4} slots  {row['output_tokens_per_second']:7.0f} tokens/s ({share:4.0%} of what "
        f"calls allow)  step {row['milliseconds_per_step']:.2f} ms{device}  first token {row['ttft_ms_p50']:.0f} ms, "
        f"busy {row['busy_ttft_ms_p50']:.1f} ms{ratio}"
    )


def markdown(results: Iterable[ServingResult]) -> str:
    """Results of several models and devices as one page."""
    lines = [
        "# Serving",
        "",
        "Written by `scripts/benchmark_serving.py`: requests through `fqjax.Engine`, random weights and tokens, no shared",
        "prefixes. *Allowed* is what the calls of prompts and the steps of decoding, each timed alone in the same run, add",
        "up to. A step is of all slots at work, by the clock, in brackets the GPU's own time. *First token* is the time from",
        "a request's coming, half of them take less; *busy*, that of a request that comes while all other slots decode.",
    ]
    for result in results:
        lines += ["", f"## {result['rows'][0]['model']}", "", f"{describe(result)}.", ""]
        lines.append(
            "| scheme | slots | chunk | prompt + new | requests | tokens/s | to bf16 | of allowed | step ms | first token ms "
            "| a token ms | busy ms |"
        )
        lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
        lines += [_cells(row) for row in result["rows"]]
        lines += ["", "One call of `generate`, and tokens a second of `stream` over those of `generate`:", ""]
        lines += ["| scheme | prompt + new | ms | the device's own | streamed |", "|---|---:|---:|---:|---:|"]
        for row in result["generate"]:
            device = f"{row['device_milliseconds']:.2f}" if "device_milliseconds" in row else "-"
            lines.append(
                f"| `{row['scheme']}` | {row['prompt']} + {row['new']} | {row['milliseconds']:.2f} | {device} "
                f"| {row['streamed_over_whole']:.2f} x |"
            )
    return "\n".join(lines) + "\n"


def _cells(row: ServingRow) -> str:
    device = f" ({row['device_milliseconds_per_step']:.2f})" if "device_milliseconds_per_step" in row else ""
    ratio = f"{row['ratio_to_bf16']:.2f} x" if row["ratio_to_bf16"] else "-"
    rate = "at once" if row["rate"] is None else f"{row['rate']:g}/s"

    def span(ends: list[int]) -> str:
        return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"

    return (
        f"| `{row['scheme']}` | {row['slots']} | {row['chunk']} "
        f"| {span(row['prompt'])} + {span(row['new'])} | {row['requests']}, {rate} "
        f"| {row['output_tokens_per_second']:.0f} | {ratio} "
        f"| {row['output_tokens_per_second'] / row['allowed_tokens_per_second']:.0%} "
        f"| {row['milliseconds_per_step']:.2f}{device} | {row['ttft_ms_p50']:.0f} | {row['tpot_ms_p50']:.1f} "
        f"| {row['busy_ttft_ms_p50']:.1f} |"
    )
