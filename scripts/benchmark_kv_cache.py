"""Measures what an INT8 key-value cache costs in perplexity, and writes the result as JSON and as a table.

Examples:
    python scripts/benchmark_kv_cache.py                                    # the bundled checkpoint and its text
    python scripts/benchmark_kv_cache.py --model mine=path/to/checkpoint --text test.txt
    python scripts/benchmark_kv_cache.py --schemes bf16 flattenquant        # on quantized models too
"""

import json
from typing import Any

import fqjax
from fqjax.bench import quality
from fqjax.bench.environment import describe

HEADING = [
    "# Perplexity with an INT8 key-value cache",
    "",
    "Written by `scripts/benchmark_kv_cache.py`, which takes any model. Every token sees keys and values rounded as the",
    "cache holds them, its own among them: codes in [-127, 127], and a float32 scale for each token and head. Ratios are",
    "to the same model over a cache in bfloat16, in the same run; bytes are those of one token in all layers.",
]


def measure(model: Any, setting: quality.Setting) -> dict[str, float]:
    """Perplexity and bytes a token over a cache of either kind."""
    row: dict[str, float] = {}
    for kind in (None, "int8"):
        name = kind or "bf16"
        row[name] = setting.perplexity(model, kv_cache=kind)
        sizes = [model.make_cache(1, capacity, kind).nbytes for capacity in (1, 2)]
        row[f"{name}_bytes_per_token"] = sizes[1] - sizes[0]
    return row | {"ratio": row["int8"] / row["bf16"]}


def document(results: dict[str, Any]) -> str:
    lines = list(HEADING)
    for name, result in results.items():
        windows = f"{result['windows']} windows of {result['window']} tokens of {result['text']}"
        where = f"{describe(result['environment'])}. {windows}."
        lines += ["", f"## {name}", "", where, ""]
        lines += [
            "| weights | bf16 cache | INT8 cache | ratio | bytes a token, bf16 | INT8 |",
            "|---" + "|---:" * 5 + "|",
        ]
        for row in result["rows"]:
            lines.append(
                f"| {row['scheme']} | {row['bf16']:.4f} | {row['int8']:.4f} | {row['ratio']:.5f} "
                f"| {row['bf16_bytes_per_token']} | {row['int8_bytes_per_token']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command = quality.parser(__doc__, "docs/benchmarks/kv_cache")
    command.add_argument("--schemes", nargs="*", choices=list(fqjax.PRESETS), default=["bf16"], metavar="SCHEME")
    a = command.parse_args()
    record = a.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    for name, setting in quality.settings(a):
        rows: list[dict[str, Any]] = []
        for scheme in a.schemes:
            quantized, _ = fqjax.quantize(setting.model, scheme, setting.batches)
            rows.append({"scheme": scheme} | measure(quantized, setting))
            print(rows[-1], flush=True)
        results[name] = quality.conditions(a) | {"rows": rows}
        quality.write(a.out, results, document(results))
