"""Measures what every scheme costs in perplexity, and writes the result as JSON and as a table.

Examples:
    python scripts/benchmark_quality.py                                    # the bundled checkpoint and its text
    python scripts/benchmark_quality.py --model mine=path/to/checkpoint --calibration train.txt --text test.txt

Perplexity follows the protocol of fqjax.evaluate; ratios are to the same model in bfloat16, in the same run.  A model
measured before keeps its result until it is measured again under the same name.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fqjax
from fqjax.bench.environment import describe, environment
from fqjax.corpus import held_out_text, reference_text
from fqjax.demo.run import CHECKPOINT
from fqjax.text import encode, read_text

COLUMNS = ("scheme", "perplexity", "ratio", "INT4 share", "K'/K", "bytes of bf16", "seconds")


def measure(
    directory: str, calibration: str, text: str, window: int, windows: int, samples: int
) -> list[dict[str, Any]]:
    """One row a scheme for one checkpoint."""
    model, tokenizer = fqjax.load_hf(directory)
    batches = fqjax.calibration_batches(encode(tokenizer, calibration), model.config, samples=samples, window=window)
    ids = encode(tokenizer, text)
    rows: list[dict[str, Any]] = []
    for scheme in fqjax.PRESETS:
        start = time.perf_counter()
        quantized, report = fqjax.quantize(model, scheme, batches)
        seconds = time.perf_counter() - start
        perplexity = fqjax.perplexity(quantized, ids, window, windows=windows)
        rows.append(
            {
                "scheme": scheme,
                "perplexity": perplexity,
                "ratio": perplexity / rows[0]["perplexity"] if rows else 1.0,
                "int4_mac_share": report.int4_mac_share,
                "expansion": report.expansion,
                "bytes_ratio": report.bytes / report.bytes_bf16,
                "seconds": seconds,
            }
        )
        print(f"  {scheme}: {perplexity:.3f}, ratio {rows[-1]['ratio']:.4f}, {seconds:.0f} s", flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    """All results in Markdown."""
    lines = [
        "# Perplexity of every scheme",
        "",
        "Written by `scripts/benchmark_quality.py`. Ratios are to the same model in bfloat16 in the same run; bytes are",
        "those of the linear layers. Models other than the bundled one do not come with fqjax; the script takes any. A model",
        '"with outliers" is the same function with a few large activation channels,',
        "as `scripts/train_demo_model.py` makes them.",
    ]
    for name, result in results.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{describe(result['environment'])}. {result['windows']} windows of {result['window']} tokens of "
            f"{result['text']}, calibrated on {result['samples']} windows of {result['calibration']}.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
        ]
        for row in result["rows"]:
            lines.append(
                f"| `{row['scheme']}` | {row['perplexity']:.2f} | {row['ratio']:.4f} | {row['int4_mac_share']:.1%} "
                f"| {row['expansion']:.3f} | {row['bytes_ratio']:.1%} | {row['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="NAME=DIR", help="a checkpoint; repeatable")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on")
    parser.add_argument("--text", type=Path, help="text to predict")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/quality"), help="written with .json and .md")
    a = parser.parse_args()
    models = dict(m.split("=", 1) for m in a.model) if a.model else {"bundled": str(CHECKPOINT)}
    calibration = read_text(a.calibration) if a.calibration else reference_text()
    text = read_text(a.text) if a.text else held_out_text()
    record = a.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    for name, directory in models.items():
        print(name, flush=True)
        rows = measure(directory, calibration, text, a.window, a.windows, a.samples)
        results[name] = {
            "environment": environment(),
            "window": a.window,
            "windows": a.windows,
            "samples": a.samples,
            "calibration": a.calibration.name if a.calibration else "Python's documentation",
            "text": a.text.name if a.text else "its held-out part",
            "rows": rows,
        }
        record.write_text(json.dumps(results, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(table(results))
    print(f"wrote {record} and {a.out}.md")


if __name__ == "__main__":
    main()
