"""Times how a decoding step's attention, gated matmul and quantizing kernels can be cut up; writes it as JSON and as a table.

Examples:
    python scripts/tune_decoding.py                                  # Llama-3-8B's shapes; needs an NVIDIA GPU
    python scripts/tune_decoding.py --batches 64 --what attention    # some of it

The best is written by hand into ``best_cut`` of ``pallas_kernels.attention.triton`` and of
``pallas_kernels.attention.hopper``, ``pallas_kernels.quantize.dispatch.best_piece`` and
``pallas_kernels.matmul.hopper.tuning``.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from fqjax.bench.environment import Record, describe, environment
from pallas_kernels import grouped_int4_matmul, int4_matmul, int8_matmul, quantize_activated
from pallas_kernels.attention import api as attention
from pallas_kernels.attention import triton as attention_kernel
from pallas_kernels.attention.codes import Recipe
from pallas_kernels.attention.parts import Parts
from pallas_kernels.attention.problem import Cut, best_cut
from pallas_kernels.device import capability
from pallas_kernels.matmul.hopper import tuning
from pallas_kernels.matmul.hopper.decoders import decoder_for
from pallas_kernels.matmul.hopper.kernels import Config
from pallas_kernels.matmul.hopper.problem import Gate, Problem
from pallas_kernels.quantize import dispatch as quantize
from pallas_kernels.quantize.dispatch import MOST_PARTS
from pallas_kernels.quantize.kind import Quantization
from pallas_kernels.timing import copies_beyond_cache, kernel_times

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE, EXTRA = 32, 8, 128, 4096, 14336, 256
"""Of Llama-3-8B, and so many flattened channels more."""
NEW_TOKENS = 64
"""Tokens that the cache has room for after the context."""
KERNEL_KINDS = ("attention", "gates", "rows")
FEWEST_WARPS, MOST_WARPS = 132, 16 * 132 * 2
"""Of the whole GPU, in attention for Hopper GPUs."""
LISTED_CUTS = 5
"""Rows of the table for each case."""


@dataclasses.dataclass
class Case:
    """A way to cut one computation up, to be timed.

    Attributes:
      name: of the case.
      cut: how its work is cut up, in words.
      used: whether that is what is used now.
      run: gives some result and what becomes of its last operand, which is donated.
      operands: to go through in turns; cases that are compared share them.
    """

    name: str
    cut: str
    used: bool
    run: Callable[..., tuple[object, object]]
    operands: Sequence[list[object]]


def recipe(channels: int, per_token: bool) -> tuple[jax.Array, ...]:
    """Recipe of :func:`pallas_kernels.quantize_normalized`: multiplier, source and part."""
    extra = 0 if per_token else EXTRA
    return jnp.full(channels, 20.0), jnp.arange(extra, dtype=jnp.int32), jnp.ones(extra, jnp.int32)


def of_attention(batch: int, context: int, codes: bool) -> Iterator[Case]:
    """Attention with the kernel that quantizes what its programs found."""
    capacity = context + NEW_TOKENS
    keys = jax.random.split(jax.random.key(0), 4)
    qkv = jax.random.normal(keys[0], (batch, HEADS + 2 * KV_HEADS, DIM), jnp.bfloat16)
    lengths, angles = jnp.full(batch, context, jnp.int32), jax.random.normal(keys[1], (batch, DIM // 2))
    rotation, how = (jnp.cos(angles), jnp.sin(angles)), recipe(HEADS * DIM, False)
    kind = Quantization(name="quantize_attended", qmax=127, per_token=False)

    def cache(i: int) -> tuple[jax.Array, ...]:
        shape = batch, capacity, KV_HEADS, DIM
        drawn = jax.random.split(jax.random.key(i + 1), 4)
        if not codes:
            return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in drawn[:2])
        arrays = [jax.random.randint(key, shape, -127, 128, jnp.int8) for key in drawn[:2]]
        return *arrays, *(jax.random.uniform(key, shape[:3], minval=0.005, maxval=0.02) for key in drawn[2:])

    copies = copies_beyond_cache(batch * capacity * KV_HEADS * DIM * (2 if codes else 4), 4, 40)
    operands: list[list[object]] = [[qkv, lengths, rotation, how, cache(i)] for i in range(copies)]
    from pallas_kernels.attention import hopper

    by_hopper = codes and capability() == (9, 0)
    heads = batch * KV_HEADS
    usual = hopper.best_cut(heads, capacity) if by_hopper else best_cut(heads, HEADS // KV_HEADS, DIM, codes)
    cuts: list[Cut | hopper.Cut] = [usual]
    if by_hopper:
        for count, warps, units in itertools.product((1, 2, 3, 5, 9, 16), (4, 8, 16), (1, 2, 4)):
            if (
                warps * units <= 16
                and heads * count % units == 0
                and MOST_WARPS >= heads * count * warps >= FEWEST_WARPS
            ):
                cuts.append(hopper.Cut(splits=count, warps=warps, units=units))
    for block, warps, stages in itertools.product((32, 64, 128), (1, 2, 4), (2, 3)):
        full = Cut(block=block).programs(batch * KV_HEADS, capacity)
        counts = sorted({full, 2 * full, max(1, full // 2)})
        for splits, integers in itertools.product(counts, (False, True)[: 1 + codes]):
            if splits > MOST_PARTS:  # They could not be put together by one kernel.
                continue
            cuts.append(Cut(splits=splits, block=block, warps=warps, stages=stages, integers=integers))
    for cut in dict.fromkeys(cuts):

        def run(
            qkv: jax.Array,
            lengths: jax.Array,
            rotation: tuple[jax.Array, jax.Array],
            how: tuple[jax.Array, jax.Array, jax.Array],
            cache: tuple[jax.Array, ...],
            cut: Cut | hopper.Cut = cut,
        ) -> Any:
            found = Recipe(127, *how)
            finish = functools.partial(attention._quantized, kind, found, "triton")
            run_kernel: Callable[..., Any] = attention_kernel.run if isinstance(cut, Cut) else hopper.run
            return run_kernel(
                qkv, lengths, rotation, cache, scale=DIM**-0.5, window=None, finish=finish, cut=cut, recipe=found
            )

        name = f"attention over {'INT8' if codes else 'bfloat16'}, {batch} x {context}"
        yield Case(name, _said(cut), cut == usual, run, operands)


def of_gates(batch: int, bits: Literal[4, 8], groups: bool) -> Iterator[Case]:
    """The matmul of a gate and what it gates, with what quantizes the result, as one kernel and as two.

    With groups, whose scales are integers, activations have a scale for every row, and the one kernel leaves the quantization
    to a second, which does less than otherwise.
    """
    from pallas_kernels.matmul.hopper import launch

    n, k = 2 * INTERMEDIATE, HIDDEN if groups else HIDDEN + EXTRA
    how = recipe(INTERMEDIATE, groups)
    gate = Gate(activation="silu", qmax=127, extra=len(how[1]), per_token=groups)
    x = jax.random.randint(jax.random.key(0), (batch, k), -127, 128, jnp.int8)
    x_scale = jnp.ones(batch) if groups and batch > 1 else jnp.float32(1)
    each, scales = jnp.full(n, 1e-4), jnp.ones((k // 128, n), jnp.int16) if groups else None
    nbytes = n * k * bits // 8
    weights = [
        jax.random.randint(jax.random.key(i), (n, k * bits // 8), -128, 128, jnp.int8)
        for i in range(copies_beyond_cache(nbytes, 3, 4))
    ]
    p = Problem(
        m=batch,
        n=n,
        k=k,
        decoder=decoder_for(bits, group_dtype=jnp.int16 if groups else None),
        out_dtype=jnp.dtype(jnp.bfloat16),
        per_token=bool(x_scale.ndim),
        per_channel=True,
        gate=gate,
    )
    usual = tuning.choose(p, jax.devices()[0].device_kind)
    known = Quantization(name="quantize_gated", qmax=127, per_token=True, largest=True)

    def in_two(weight: jax.Array, unused: jax.Array) -> tuple[object, object]:
        if scales is not None:
            y = grouped_int4_matmul(x, weight, x_scale, scales, each)
        else:
            y = (int4_matmul if bits == 4 else int8_matmul)(x, weight, x_scale, each)
        return quantize_activated(y, *how, activation="silu", gated=True, qmax=127, per_token=groups), unused

    def in_one(weight: jax.Array, unused: jax.Array, config: Config) -> tuple[object, object]:
        given = how if gate.extra else how[:1]
        found = launch.gated_matmul(p, config, x, weight, x_scale, each, scales, None, given)
        return quantize.call(known, *found, *how) if groups else found, unused

    kind = "INT4 in groups, a scale a row" if groups else f"INT{bits}, fixed scales"
    operands: list[list[object]] = [[weight, jnp.zeros(())] for weight in weights]
    name = f"gated matmul, {kind}, {batch} rows"
    yield Case(name, "matmul and quantization", usual is None, in_two, operands)
    for config in tuning.candidates(p):
        label = ", ".join(f"{field} {getattr(config, field)}" for field in ("warpgroups", "stages", "fold"))
        yield Case(name, label, config == usual, functools.partial(in_one, config=config), operands)


def of_rows(batch: int, context: int, name: str, per_token: bool) -> Iterator[Case]:
    """A kernel that quantizes rows, which of attention come in as many parts as its programs find."""
    heads = batch * KV_HEADS
    parts = best_cut(heads, HEADS // KV_HEADS, DIM, True).programs(heads, context + NEW_TOKENS)
    if capability() == (9, 0):
        from pallas_kernels.attention import hopper

        parts = hopper.best_cut(heads, context + NEW_TOKENS).splits
    x = {"norm": HIDDEN, "gated": 2 * INTERMEDIATE, "known": INTERMEDIATE, "attended": HIDDEN * parts}[name]
    channels = INTERMEDIATE if name in ("gated", "known") else HIDDEN
    kind = {
        "norm": Quantization(name="norm", qmax=127, per_token=per_token, residual=True, epsilon=1e-5, weight=True),
        "gated": Quantization(name="gated", qmax=127, per_token=per_token, activation="silu", gated=True),
        "known": Quantization(name="known", qmax=127, per_token=True, largest=True),
        "attended": Quantization(
            name="attended", qmax=127, per_token=per_token, parts=Parts(parts, HEADS // KV_HEADS, DIM)
        ),
    }[name]
    dtype = jnp.float32 if name in ("attended", "known") else jnp.bfloat16
    operands: list[jax.Array] = [jax.random.normal(jax.random.key(0), (batch, x), dtype)]
    if name == "attended":
        operands.append(jax.random.normal(jax.random.key(1), (batch, x // DIM)))
    if name == "known":
        operands.append(jnp.abs(operands[0][:, ::16]))
    if name == "norm":
        operands += [operands[0] / 2, jnp.ones(HIDDEN, jnp.bfloat16)]
    operands += recipe(channels, per_token)
    usual = quantize.best_piece(kind, batch, channels)
    sizes = (256, 512, 1024, 2048, 4096)
    pieces = [usual, (0, 0)]
    if kind.parts is None or not kind.whole:  # Otherwise a row is put together by one program.
        pieces += itertools.product(sizes, (4, 8, 16, 32))
    for piece in dict.fromkeys(pieces):
        label = f"{piece[0]} channels, {piece[1]} warps" if piece[0] else "whole rows"
        title = f"{name}, {'a scale a row' if per_token else 'fixed scales'}, {batch} rows"

        def run(given: list[jax.Array], unused: jax.Array, piece: tuple[int, int] = piece) -> tuple[object, object]:
            return quantize.call(kind, *given, piece=piece), unused

        yield Case(title, label, piece == usual, run, [[operands, jnp.zeros(())]] * 8)


GATES: tuple[tuple[Literal[4, 8], bool], ...] = ((4, False), (8, False), (4, True))
"""Bits of a gate's weight, and whether it has groups."""


def _said(cut: "DataclassInstance") -> str:
    return ", ".join(f"{field} {value}" for field, value in dataclasses.asdict(cut).items() if value is not None)


def timed(cases: list[Case], repeats: int) -> list[Record]:
    """Microseconds of each case: of all its kernels, the median over operands and repeats."""
    lowered = [jax.jit(case.run, donate_argnums=len(case.operands[0]) - 1).lower(*case.operands[0]) for case in cases]
    with ThreadPoolExecutor(12) as pool:
        compiled = list(pool.map(lambda stage: stage.compile(), lowered))
    found = []
    for case, f in zip(cases, compiled, strict=True):

        def once(f: jax.stages.Compiled = f, operands: Sequence[list[object]] = case.operands) -> None:
            for given in [*operands] * repeats:
                _, given[-1] = f(*given)
            jax.block_until_ready(operands)

        once()
        by_name: dict[str, list[float]] = {}
        for name, us in kernel_times(once):
            by_name.setdefault(name, []).append(us)
        kernels = {name: statistics.median(each) for name, each in by_name.items()}
        what = {"case": case.name, "cut": case.cut, "used": case.used}
        found.append(what | {"microseconds": sum(kernels.values()), "kernels": kernels})
    return found


def table(result: Record) -> str:
    """The best of every case, and what is used now."""
    lines = ["# How a decoding step is cut up", "", f"Written by `scripts/tune_decoding.py`. {describe(result)}.", ""]
    lines += [
        "Microseconds of the kernels; keys and values come from memory, rows from the cache. The best of each case, and"
    ]
    lines += ["what is used.", ""]
    lines += ["| case | cut | us |", "|---|---|---:|"]
    for case, group in itertools.groupby(result["rows"], key=lambda row: row["case"]):
        entries = sorted(group, key=lambda row: row["microseconds"])
        shown = entries[:LISTED_CUTS] + [row for row in entries[LISTED_CUTS:] if row["used"]]
        lines += [f"| {case} | {row['cut']}{' (used)' * row['used']} | {row['microseconds']:.2f} |" for row in shown]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--what", nargs="*", choices=KERNEL_KINDS, default=KERNEL_KINDS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/decoding"), help="written with .json and .md")
    a = parser.parse_args()
    if capability() < (8, 0):
        sys.exit("tune_decoding: needs an NVIDIA GPU")
    result: Record = {**environment(), "rows": []}
    for batch in a.batches:
        groups: list[list[Case]] = []
        if "attention" in a.what:
            groups += [list(of_attention(batch, a.context, codes)) for codes in (True, False)]
        if "gates" in a.what and capability() == (9, 0):
            groups += [list(of_gates(batch, bits, grouped)) for bits, grouped in GATES]
        if "rows" in a.what:
            kinds = [*itertools.product(("norm", "gated", "attended"), (False, True)), ("known", True)]
            groups += [list(of_rows(batch, a.context, name, per_token)) for name, per_token in kinds]
        for group in groups:
            result["rows"] += timed(group, a.repeats)
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
            a.out.with_suffix(".md").write_text(table(result))
            print(group[0].name, flush=True)


if __name__ == "__main__":
    main()
