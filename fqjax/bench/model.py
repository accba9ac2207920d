"""Times of whole models: taking up prompts and decoding, every scheme beside bfloat16 in one run.

Weights are random (:mod:`fqjax.bench.random_models`).  A prefill fills an empty cache and gives the logits of the last token;
decoding is the loop of :func:`fqjax.generate`, :data:`STEPS` tokens in one program, over a cache that holds ``length``
tokens, each token the most likely one.  Times are those of the clock on the wall, the least of several;
``device_milliseconds`` are those of the GPU's kernels alone (CUPTI), so that what lies between is the host's.
"""

import dataclasses
import functools
import gc
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fqjax.bench.environment import describe, environment
from fqjax.bench.kernels import ceilings
from fqjax.bench.random_models import random_model
from fqjax.errors import InputError
from fqjax.inference.generate import decode, prefill
from fqjax.models.cache import KeyValueCache
from fqjax.scheme import PRESETS, Scheme, resolve_scheme
from pallas_kernels.timing import kernel_times

STEPS = 32
"""Tokens that are decoded in one call."""
REPEATS = 5
LISTED = 12
"""Kernels of a step that are listed, of those that take the longest."""
Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: so many sequences of so many tokens; with "decode", so many are in the cache."""

    phase: Phase
    batch: int
    length: int


LARGE = (
    *(Case("prefill", *shape) for shape in ((1, 2048), (4, 2048), (1, 8192))),
    *(Case("decode", batch, length) for length in (512, 4096) for batch in (1, 16, 64)),
)
SMALL = (Case("prefill", 1, 128), Case("decode", 1, 128), Case("decode", 4, 128))
"""What is timed where there is no GPU."""
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


def default_cases() -> tuple[Case, ...]:
    """:data:`LARGE` on a GPU, :data:`SMALL` elsewhere."""
    return LARGE if jax.default_backend() == "gpu" else SMALL


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
    architecture: tuple[str, Any],
    schemes: Iterable[str | Scheme] = SCHEMES,
    cases: Iterable[Case] | None = None,
    *,
    extra: float = 0.05,
    seconds: float = float("inf"),
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measures every scheme on every case.

    Args:
      name: of the model, for the result.
      architecture: its name and configuration (:func:`fqjax.bench.random_models.architecture`).
      schemes: presets or schemes; ratios are to "bf16", which is measured first if it is among them.
      cases: by default those of :func:`default_cases`.
      extra: share of extra channels of schemes that flatten.
      seconds: after so many no further scheme is begun.
      report: called with every row of the result as it comes.

    Returns:
      ``device``, ``versions``, ``date``, ``ceilings`` and ``rows``, as the command's ``--json`` writes them, and ``skipped``:
      what did not fit into the device's memory.
    """
    cases = default_cases() if cases is None else tuple(cases)
    longest = architecture[1].max_length
    for case in cases:
        if longest is not None and case.length + STEPS > longest:
            raise InputError(f"--{case.phase} {case.batch}x{case.length}: the model has {longest} positions")
    result = environment() | {"ceilings": ceilings(), "extra_channels": extra, "rows": [], "skipped": []}
    plain: dict[Case, float] = {}
    begun = time.monotonic()
    for scheme in sorted(map(resolve_scheme, schemes), key=lambda scheme: scheme.method != "none"):
        if time.monotonic() - begun > seconds:
            result["skipped"].append({"model": name, "scheme": scheme.name, "why": "out of time"})
            continue
        gc.collect()
        before = _bytes_in_use()
        try:
            model = random_model(*architecture, scheme, extra=extra)
            jax.block_until_ready(nnx.state(model))
        except jax.errors.JaxRuntimeError as error:
            result["skipped"].append({"model": name, "scheme": scheme.name, "why": _first_line(error)})
            continue
        used = _bytes_in_use() - before or sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        for case in cases:
            row: dict[str, Any] = {"model": name, "scheme": scheme.name} | dataclasses.asdict(case)
            try:
                row |= measure(model, case)
            except jax.errors.JaxRuntimeError as error:
                result["skipped"].append(row | {"why": _first_line(error)})
                continue
            if scheme.method == "none":
                plain[case] = row["milliseconds"]
            row["device_bytes"] = used
            row["ratio_to_bf16"] = plain[case] / row["milliseconds"] if case in plain else None
            result["rows"].append(row)
            report(row)
        del model
    return result


def measure(model: Any, case: Case) -> dict[str, Any]:
    """``milliseconds`` a prefill or a decoded token, tokens a second, the device's part, and seconds to compile."""
    graphdef, state = nnx.split(model)
    vocabulary, key = model.config.vocab_size, jax.random.key(7)
    if case.phase == "prefill":
        cache, steps = model.make_cache(case.batch, case.length), 1
        tokens = jax.random.randint(key, (case.batch, case.length), 0, vocabulary)
        before, behind = (tokens,), (jnp.full(case.batch, case.length, jnp.int32),)
        lower = functools.partial(prefill.lower, graphdef, state, *before, cache, *behind)
    else:
        cache, steps = model.make_cache(case.batch, case.length + STEPS), STEPS
        before, behind = (), (jax.random.normal(key, (case.batch, vocabulary)), None, None)
        lower = functools.partial(decode.lower, graphdef, state, cache, *behind, STEPS + 1, ())  # The logits give one.
    start = time.perf_counter()
    compiled = lower().compile()
    compiling = time.perf_counter() - start

    def once() -> float:
        """Seconds of one call, from the same lengths each time."""
        nonlocal cache
        held = jnp.full(case.batch, case.length if case.phase == "decode" else 0, jnp.int32)
        cache = jax.block_until_ready(KeyValueCache(cache.layers, held))
        start = time.perf_counter()
        _, cache = jax.block_until_ready(compiled(state, *before, cache, *behind))
        return time.perf_counter() - start

    once()
    milliseconds = 1e3 * min(once() for _ in range(REPEATS)) / steps
    new = case.batch * (case.length if case.phase == "prefill" else 1)
    row: dict[str, Any] = {"milliseconds": milliseconds, "tokens_per_second": 1e3 * new / milliseconds}
    if jax.default_backend() == "gpu":
        times = kernel_times(once)
        row["device_milliseconds"] = sum(us for _, us in times) / 1e3 / steps
        row["kernels"] = profile(times, steps)
    return row | {"compile_seconds": compiling}


def profile(times: Iterable[tuple[str, float]], steps: int) -> list[dict[str, Any]]:
    """Where the time of a step goes: ``kernel``, ``calls`` and ``microseconds``, of one step, the longest first.

    Numbers at the end of names, which tell apart what XLA made several of, are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, microseconds in times:
        name = re.sub(r"[_\d]+$", "", name)
        row = found.setdefault(name, {"kernel": name, "calls": 0.0, "microseconds": 0.0})
        row["calls"] += 1 / steps
        row["microseconds"] += microseconds / steps
    return sorted(found.values(), key=lambda row: -row["microseconds"])[:LISTED]


def _bytes_in_use() -> int:
    """What the device's allocator has given out; 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def line(row: dict[str, Any]) -> str:
    """One row of the result, to be read as it comes."""
    ratio = f"{row['ratio_to_bf16']:5.2f} x bf16" if row["ratio_to_bf16"] else ""
    device = f" ({row['device_milliseconds']:.3f} on the device)" if "device_milliseconds" in row else ""
    shape = f"{row['batch']} x {row['length']}"
    return (
        f"{row['scheme']:26}{row['phase']:8}{shape:>10}  {row['milliseconds']:9.3f} ms{device}  "
        f"{row['tokens_per_second']:9.4g} tokens/s  {row['device_bytes'] / 1e9:6.2f} GB  {ratio}"
    )


def summary(result: dict[str, Any]) -> str:
    """Where the rows were measured, and what did not fit there."""
    lines = [describe(result)]
    lines += [f"{skipped['scheme']} left out: {skipped['why']}" for skipped in result["skipped"]]
    return "\n".join(lines)


def markdown(results: Iterable[dict[str, Any]]) -> str:
    """Results of several models as one page."""
    lines = [
        "# Whole models",
        "",
        "Written by `scripts/benchmark_model.py`. Milliseconds a prefill (sequences x tokens) or a decoded token (sequences",
        "x tokens in the cache), of the clock on the wall; in brackets the speed-up over bfloat16 in the same run. Weights",
        "are random. Bytes are what the device's allocator gave out for the model.",
    ]
    for result in results:
        rows = result["rows"]
        if not rows:
            continue
        cases = list(dict.fromkeys((row["phase"], row["batch"], row["length"]) for row in rows))
        lines += ["", f"## {rows[0]['model']}", "", f"{describe(result)}.", ""]
        lines.append("| scheme | GB | " + " | ".join(f"{p} {b} x {n}" for p, b, n in cases) + " |")
        lines.append("|---|---:" + "|---:" * len(cases) + "|")
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            own = {(row["phase"], row["batch"], row["length"]): row for row in rows if row["scheme"] == scheme}
            size = next(iter(own.values()))["device_bytes"] / 1e9
            lines.append(f"| `{scheme}` | {size:.2f} | " + " | ".join(_cell(own.get(case)) for case in cases) + " |")
        for skipped in result["skipped"]:
            lines += ["", f"`{skipped['scheme']}` left out: {skipped['why']}"]
        for phase in ("prefill", "decode"):
            lines += _profiles([row for row in rows if row["phase"] == phase and "kernels" in row])
    return "\n".join(lines) + "\n"


def _profiles(rows: list[dict[str, Any]]) -> list[str]:
    """Where the time of the first case of a phase goes, for every scheme."""
    lines: list[str] = []
    for row in rows:
        if (row["batch"], row["length"]) != (rows[0]["batch"], rows[0]["length"]):
            continue
        lines += ["", f"### `{row['scheme']}`: {row['phase']} {row['batch']} x {row['length']}", ""]
        lines += ["| kernel | calls | microseconds | share |", "|---|---:|---:|---:|"]
        for k in row["kernels"]:
            share = k["microseconds"] / row["device_milliseconds"] / 1e3
            lines.append(f"| {k['kernel']} | {k['calls']:.0f} | {k['microseconds']:.0f} | {share:.1%} |")
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    ratio = f" ({row['ratio_to_bf16']:.2f} x)" if row["ratio_to_bf16"] and row["scheme"] != PRESETS["bf16"].name else ""
    return f"{row['milliseconds']:.2f}{ratio}"
