"""Times of whole models: taking up prompts and decoding, every scheme beside bfloat16 in one run.

Weights are random (:mod:`fqjax.bench.random_models`); cases and schemes are those of :mod:`fqjax.bench.model_cases`.  Times
(:mod:`fqjax.bench.model_times`) are those of the clock on the wall, the least of several; ``device_milliseconds`` are those
of the GPU's kernels alone (CUPTI), so that what lies between is the host's.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx

from fqjax.bench.environment import Environment, describe, environment
from fqjax.bench.kernels import ceilings
from fqjax.bench.model_cases import BASELINE_SCHEME, SCHEMES, Case, Phase, Variant, default_cases, parse_variant
from fqjax.bench.model_times import DECODED_TOKENS, Timed, measure
from fqjax.bench.random_models import Config, random_model, unit_macs
from fqjax.bench.spread import mark, shown, verdict
from fqjax.checkpoint.hugging_face import abstract_model
from fqjax.core.stored_inputs import FloatingInput
from fqjax.drivers.ties import units_of
from fqjax.layers.surgery import select_linears
from fqjax.models.causal_lm import CausalLM
from fqjax.runtime.errors import InputError


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
class _Benchmark:
    """A run: what it measures, and its result so far."""

    model: str
    cases: tuple[Case, ...]
    macs: int
    result: ModelResult
    report: Callable[[ModelRow], None]
    baseline: dict[Case, float] = dataclasses.field(default_factory=dict)
    """Milliseconds in bfloat16."""

    def skip(self, variant: Variant, why: str) -> None:
        """Lists a scheme that is not measured."""
        self.result["skipped"].append({"model": self.model, "scheme": variant.name, "why": why})

    def measure(self, variant: Variant, model: CausalLM, device_bytes: int) -> None:
        """Adds a row for every case, or lists it as skipped where it does not fit into the device's memory."""
        for case in self.cases:
            of: CaseOfScheme = {
                "model": self.model,
                "scheme": variant.name,
                "phase": case.phase,
                "batch": case.batch,
                "length": case.length,
            }
            try:
                times = measure(model, case, variant.kv_cache)
            except jax.errors.JaxRuntimeError as error:
                self.result["skipped"].append({**of, "why": _first_line(error)})
                continue
            if variant.name == BASELINE_SCHEME:
                self.baseline[case] = times["milliseconds"]
            row: ModelRow = {
                **of,
                **times,
                "device_bytes": device_bytes,
                "floor_milliseconds": floor(model, case, variant, device_bytes, self.macs, self.result["ceilings"]),
                "ratio_to_bf16": self.baseline[case] / times["milliseconds"] if case in self.baseline else None,
            }
            self.result["rows"].append(row)
            self.report(row)


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
    _check_positions(cases, architecture[1].max_length)
    result: ModelResult = {**environment(), "ceilings": ceilings(), "extra_channels": extra, "rows": [], "skipped": []}
    benchmark = _Benchmark(name, cases, linear_macs(*architecture), result, report)
    begun = time.monotonic()
    variants = [parse_variant(scheme) if isinstance(scheme, str) else scheme for scheme in schemes]
    for variant in sorted(variants, key=lambda variant: variant.name != BASELINE_SCHEME):
        if time.monotonic() - begun > seconds:
            benchmark.skip(variant, "out of time")
            continue
        try:
            model, device_bytes = _random_model(architecture, variant, extra)
        except jax.errors.JaxRuntimeError as error:
            benchmark.skip(variant, _first_line(error))
            continue
        benchmark.measure(variant, model, device_bytes)
        del model
        keep(result)
    return result


def _check_positions(cases: Iterable[Case], longest: int | None) -> None:
    for case in cases:
        appended = DECODED_TOKENS if case.phase == "decode" else 0
        if longest is not None and case.length + appended > longest:
            raise InputError(f"--{case.phase} {case.batch}x{case.length}: the model has {longest} positions")


def _random_model(architecture: tuple[str, Config], variant: Variant, extra: float) -> tuple[CausalLM, int]:
    """A model, and the bytes that the device's allocator gave out for it; where it does not say, those of its arrays."""
    gc.collect()
    before = _bytes_in_use()
    model = random_model(*architecture, variant.scheme, extra=extra)
    jax.block_until_ready(nnx.state(model))
    return model, _bytes_in_use() - before or sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


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
        f"{row['scheme']:26} {row['phase']:8}{shape:>10}  {row['milliseconds']:9.3f} ms{shown(row, 3)}{device}  "
        f"{row['tokens_per_second']:9.4g} tokens/s  {row['device_bytes'] / 1e9:6.2f} GB  {ratio}{mark(row)}"
    )


def summary(result: ModelResult) -> str:
    """Where the rows were measured, what did not fit there, and whether they are noisy."""
    lines = [describe(result), *verdict(result["rows"])]
    lines += [f"{skipped['scheme']} left out: {skipped['why']}" for skipped in result["skipped"]]
    return "\n".join(lines)
