"""Measures what an INT8 key-value cache and an INT8 output head cost in perplexity; writes the result as JSON and a table.

Examples:
    python scripts/benchmark_kv_cache.py                                    # the bundled checkpoint and its text
    python scripts/benchmark_kv_cache.py --model mine=path/to/checkpoint --text test.txt
    python scripts/benchmark_kv_cache.py --schemes bf16 flattenquant        # on quantized models too
"""

import json

import jax
from flax import nnx

import fqjax
from fqjax.bench import quality
from fqjax.bench.environment import Record, describe
from fqjax.layers.head import head_of, with_int8_head
from fqjax.models.causal_lm import CausalLM

HEADING = [
    "# Perplexity with an INT8 key-value cache, and with an INT8 output head",
    "",
    "Written by `scripts/benchmark_kv_cache.py`, which takes any model. Ratios are to the same model with neither, that is,",
    "a cache and a head in bfloat16, in the same run. Over an INT8 cache every token sees keys and values rounded as the",
    "cache holds them, its own among them: codes in [-127, 127], and a float32 scale for each token and head; bytes are",
    "those of one token in all layers. An INT8 head has a scale for every token's row and quantizes every hidden state;",
    "where embeddings are tied to it, they are looked up in the same codes.",
]


def measure(model: CausalLM, setting: quality.Setting) -> Record:
    """Perplexity with a cache of either kind and a head of either kind, and bytes."""
    row: Record = {}
    small = with_int8_head(model)
    name = head_of(model)
    for kind in (None, "int8"):
        cache = kind or "bf16"
        row[cache] = setting.perplexity(model, kv_cache=kind)
        sizes = [model.make_cache(1, capacity, kind).nbytes for capacity in (1, 2)]
        row[f"{cache}_bytes_per_token"] = sizes[1] - sizes[0]
    row |= {"int8_head": setting.perplexity(small), "both": setting.perplexity(small, kv_cache="int8")}
    row |= {f"{what}_bytes": _bytes(getattr(m, name)) for what, m in (("bf16_head", model), ("int8_head", small))}
    ratios = {f"{what}_ratio": row[what] / row["bf16"] for what in ("int8", "int8_head", "both")}
    return row | ratios | {"head": name}


def _bytes(module: nnx.Module) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module)))


def document(results: dict[str, Record]) -> str:
    """All results in Markdown."""
    lines = list(HEADING)
    for name, result in results.items():
        windows = f"{result['windows']} windows of {result['window']} tokens of {result['text']}"
        first = result["rows"][0]
        lines += ["", f"## {name}", "", f"{describe(result['environment'])}. {windows}."]
        lines += [
            f"A token takes {first['bf16_bytes_per_token']} bytes of a bfloat16 cache, "
            f"{first['int8_bytes_per_token']} of an INT8 one; "
            f"the head (`{first['head']}`) {first['bf16_head_bytes']} and {first['int8_head_bytes']}.",
            "",
            "| weights | neither | INT8 cache | ratio | INT8 head | ratio | both | ratio |",
            "|---" + "|---:" * 7 + "|",
        ]
        for row in result["rows"]:
            pairs = "".join(
                f" {row[what]:.4f} | {row[f'{what}_ratio']:.5f} |" for what in ("int8", "int8_head", "both")
            )
            lines.append(f"| {row['scheme']} | {row['bf16']:.4f} |{pairs}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command = quality.parser(__doc__, "docs/benchmarks/kv_cache")
    command.add_argument("--schemes", nargs="*", choices=list(fqjax.PRESETS), default=["bf16"], metavar="SCHEME")
    a = command.parse_args()
    record = a.out.with_suffix(".json")
    results: dict[str, Record] = json.loads(record.read_text()) if record.is_file() else {}
    for name, setting in quality.settings(a):
        rows: list[Record] = []
        for scheme in a.schemes:
            quantized, _ = fqjax.quantize(setting.model, scheme, setting.batches)
            rows.append({"scheme": scheme} | measure(quantized, setting))
            print(rows[-1], flush=True)
        results[name] = quality.conditions(a) | {"rows": rows}
        quality.write(a.out, results, document(results))
