"""Measures the peak memory of `fqjax convert` on checkpoints with random weights that are made in a temporary directory.

Examples:
    python scripts/measure_conversion_memory.py                                  # 24 blocks, 4 GB, on a CPU
    python scripts/measure_conversion_memory.py --scheme flattenquant --blocks 3 --set sample_rows=64

What is measured is the largest resident set of the process that converts (`ru_maxrss`), which includes Python, JAX and
transformers.  It depends on the sizes of a block and of the embeddings, not on how many blocks there are.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import fqjax
from fqjax.bench.environment import Record, describe, environment
from fqjax.convert.plan import Conversion, plan
from fqjax.convert.preview import peak_memory
from fqjax.demo.run import CHECKPOINT

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_checkpoint(directory: Path, config: Record, blocks: int) -> int:
    """Writes a checkpoint with random weights in bfloat16, a shard for each block and one for the rest; returns its bytes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / file, directory / file)
    h, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    rng, files = np.random.default_rng(0), {}

    def shard(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, np.float32)
            tensors[name] = (1 + values / 8 if len(shape) == 1 else values / shape[1] ** 0.5).astype(jnp.bfloat16)
        save_file(tensors, directory / file)
        files.update(dict.fromkeys(tensors, file))

    shard("outer.safetensors", {
        "model.embed_tokens.weight": (vocabulary, h), "model.norm.weight": (h,), "lm_head.weight": (vocabulary, h),
    })  # fmt: skip
    for i in range(blocks):
        shard(f"block-{i:03d}.safetensors", {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (h, h),
                "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
                "mlp.gate_proj": (inner, h), "mlp.up_proj": (inner, h), "mlp.down_proj": (h, inner),
            }.items()
        })  # fmt: skip
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


MEASURE = """
import os, sys
_, status, used = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
print(used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Runs a program and prints its peak memory.  A process counts what its parent held when it was started as its own, so the
parent has to be as small as this one."""


def peak_memory_of(command: list[str]) -> int:
    """Bytes of the largest resident set of a program; what it prints is not shown.

    Raises:
      SystemExit: if the program fails.
    """
    process = subprocess.Popen([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True)
    *_, last = process.communicate()[0].splitlines() or [""]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return int(last)


def convert(source: Path, out: Path, *options: str) -> tuple[int, float]:
    """Converts in a process of its own; returns its peak memory in bytes, and the seconds."""
    start = time.perf_counter()
    peak = peak_memory_of([sys.executable, "-m", "fqjax.cli", "convert", str(source), str(out), *options])
    return peak, time.perf_counter() - start


def document(rows: dict[str, Record]) -> str:
    """All results in Markdown."""
    lines = [
        "# Memory of a conversion",
        "",
        "Written by `scripts/measure_conversion_memory.py`: the largest resident set of `fqjax convert`, Python and JAX",
        "included, on checkpoints with random weights in bfloat16, and what `--dry-run` says beforehand.  It depends on the",
        "sizes of a block and of the embeddings, not on how many blocks there are.",
        "",
        "| checkpoint | blocks | scheme | calibrated on | peak | `--dry-run` | minutes | with |",
        "|---:|---:|---|---|---:|---:|---:|---|",
    ]
    for r in rows.values():
        scheme = " ".join([f"`{r['scheme']}`", *(f"`{setting}`" for setting in r["settings"])])
        data = f"{r['samples']} windows of {r['window']} tokens"
        lines.append(
            f"| {r['checkpoint_bytes'] / 1e9:.2f} GB | {r['blocks']} | {scheme} | {data} "
            f"| **{r['peak_bytes'] / 1e9:.2f} GB** | {r['estimated_bytes'] / 1e9:.2f} GB | {r['seconds'] / 60:.1f} "
            f"| {describe(r['environment'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--scheme", default="flattenquant-w8a8", choices=list(fqjax.PRESETS))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks/conversion_memory"), help="written with .json and .md"
    )
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        size = make_checkpoint(source, CONFIG, a.blocks)
        print(f"made a checkpoint of {size / 1e9:.2f} GB", flush=True)
        asked = {"source": str(source), "out": out, "samples": a.samples, "window": a.window}
        scheme = fqjax.PRESETS[a.scheme].override(a.settings)
        estimate = peak_memory(plan(Conversion(scheme=scheme, **asked)))
        settings = [part for setting in a.settings for part in ("--set", setting)]
        options = ["--scheme", a.scheme, "--samples", str(a.samples), "--window", str(a.window), *settings]
        peak, seconds = convert(source, out, *options)
    print(f"peak {peak / 1e9:.2f} GB ({estimate / 1e9:.2f} GB expected) in {seconds / 60:.1f} minutes")
    record = a.out.with_suffix(".json")
    results: dict[str, Record] = json.loads(record.read_text()) if record.is_file() else {}
    results[" ".join([a.scheme, f"{a.blocks} blocks", *a.settings])] = {
        "environment": environment(),
        "scheme": a.scheme,
        "settings": a.settings,
        "blocks": a.blocks,
        "checkpoint_bytes": size,
        "samples": a.samples,
        "window": a.window,
        "peak_bytes": peak,
        "estimated_bytes": round(estimate),
        "seconds": seconds,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(results, indent=1) + "\n")
    a.out.with_suffix(".md").write_text(document(results))
    print(f"wrote {record} and {a.out}.md")


if __name__ == "__main__":
    main()
