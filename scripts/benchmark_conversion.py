"""Times calibration and quantization of blocks of a large model's shape, and extrapolates to the whole model.

Examples:
    python scripts/benchmark_conversion.py                        # blocks of Llama-3-8B, on a GPU
    python scripts/benchmark_conversion.py --config config.json --blocks 1 3

Weights and tokens are random, which changes what is found but not what is computed.  Everything but the trial of every
layer takes time in proportion to the number of blocks, so a line through two numbers of blocks says what the whole model
takes; for that trial the blocks after each of their four layers are run, and its time is added, from that of one block's.
Both numbers of blocks are converted twice; what the first time takes longer, to compile, is added too.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fqjax
from fqjax.bench.environment import Record, describe, environment
from fqjax.bench.random_models import CONFIGS
from fqjax.bench.spread import Spread, spread_of
from fqjax.models.llama import Llama, config_from_hf

LAYERS = 4
"""Linear layers of a block."""


def setup(hf: Record, blocks: int, samples: int, window: int) -> tuple[Llama, list[np.ndarray]]:
    """A model of so many blocks, and its calibration data."""
    model = Llama(config_from_hf(hf | {"num_hidden_layers": blocks}), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    text = np.random.default_rng(0).integers(0, hf["vocab_size"], samples * window, np.int32)
    batches = fqjax.calibration_batches(text, model.config, samples=samples, window=window)
    jax.block_until_ready(nnx.state(model))
    return model, batches


def conversion(model: Llama, batches: list[np.ndarray], scheme: str) -> float:
    """Seconds to calibrate and quantize."""
    start = time.perf_counter()
    quantized, _ = fqjax.quantize(model, scheme, batches)
    jax.block_until_ready(nnx.state(quantized))
    return time.perf_counter() - start


def forward(model: Llama, batches: list[np.ndarray]) -> Spread:
    """Seconds to run one batch, five times."""
    run, times = nnx.jit(lambda model, tokens: model(tokens)), []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(run(model, batches[0]))
        times.append(time.perf_counter() - start)
    return spread_of(times[1:])


def document(results: dict[str, Record]) -> str:
    """All results in Markdown."""
    lines = [
        "# Time to convert",
        "",
        "Written by `scripts/benchmark_conversion.py`: seconds to calibrate and quantize a few blocks of a large model's",
        "shape, and what follows for all of them.",
        "",
        "| model | scheme | calibrated on | blocks | seconds | whole model | minutes | with |",
        "|---|---|---|---|---|---:|---:|---|",
    ]
    for r in results.values():
        lines.append(
            f"| {r['model']} | `{r['scheme']}` | {r['samples']} windows of {r['window']} tokens "
            f"| {', '.join(r['seconds'])} | {', '.join(f'{s:.0f}' for s in r['seconds'].values())} "
            f"| {r['whole']} blocks | {r['minutes']:.1f} | {describe(r['environment'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a config.json of the Llama family instead")
    parser.add_argument("--blocks", nargs=2, type=int, default=(1, 3), help="two numbers of blocks")
    parser.add_argument("--scheme", default="flattenquant", choices=list(fqjax.PRESETS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks/conversion"), help="written with .json and .md"
    )
    a = parser.parse_args()
    hf = json.loads(a.config.read_text()) if a.config else CONFIGS["llama-3-8b"]
    name, whole = (str(a.config.parent.name) if a.config else "Llama-3-8B"), hf["num_hidden_layers"]
    few, more = sorted(a.blocks)
    seconds, runs = {}, {}
    for blocks in (few, more):
        model, batches = setup(hf, blocks, a.samples, a.window)
        for again in ("", " again"):
            seconds[f"{blocks}{again}"] = conversion(model, batches, a.scheme)
            print(f"{blocks} blocks{again}: {seconds[f'{blocks}{again}']:.1f} s", flush=True)
        runs[blocks] = forward(model, batches)
    a_block = (runs[more]["min"] - runs[few]["min"]) / (more - few)
    one = (seconds[f"{more} again"] - seconds[f"{few} again"]) / (more - few)
    trial = LAYERS * whole * (whole + 1) / 2 * a_block
    compiling = seconds[str(more)] - seconds[f"{more} again"] + seconds[str(few)] - seconds[f"{few} again"]
    total = compiling + seconds[f"{few} again"] + (whole - few) * one + trial
    print(f"a block: {one:.1f} s; one run of it: {1e3 * a_block:.1f} ms")
    print(f"{whole} blocks: {total / 60:.1f} minutes by extrapolation")
    print(f"of them {compiling:.0f} s to compile, and {trial:.0f} s for the trial of every layer")
    record = a.out.with_suffix(".json")
    results: dict[str, Record] = json.loads(record.read_text()) if record.is_file() else {}
    results[f"{name} {a.scheme}"] = {
        "environment": environment(),
        "model": name,
        "scheme": a.scheme,
        "samples": a.samples,
        "window": a.window,
        "seconds": seconds,
        "compiling_seconds": compiling,
        "trial_seconds": trial,
        "whole": whole,
        "minutes": total / 60,
        "run_spread": runs,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(results, indent=1) + "\n")
    a.out.with_suffix(".md").write_text(document(results))
    print(f"wrote {record} and {a.out}.md")


if __name__ == "__main__":
    main()
