"""Measures what each piece of FlattenQuant is worth, by leaving it out, and writes the result as JSON and as a table.

Examples:
    python scripts/ablation.py                                                       # the bundled checkpoint
    python scripts/ablation.py --model mine=path/to/checkpoint --calibration train.txt --text test.txt

A variant is the preset ``flattenquant`` with a few settings changed.  Perplexity follows the protocol of fqjax.evaluate;
ratios are to the same model in bfloat16, in the same run.  A model measured before keeps its result until it is measured
again under the same name.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import fqjax
from fqjax.bench.environment import describe, environment
from fqjax.corpus import held_out_text, reference_text
from fqjax.demo.run import CHECKPOINT
from fqjax.text import encode, read_text

PLAIN: dict[str, Any] = {"rounding": "nearest"}
RULE: dict[str, Any] = {
    "threshold_rule": "tukey",
    "selection": "sensitivity",
    "compression": 0.0,
    "max_expansion": 1.25,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no smoothing": {"alpha": None},
    "nothing flattened": {"flatten_activations": False, "flatten_weights": False},
    "activations flattened alone": {"flatten_weights": False},
    "weights flattened alone": {"flatten_activations": False},
    "no equalization": {"equalize": False},
    "thresholds by rule": RULE,
    "rounded to the nearest": PLAIN,
    "thresholds by rule, rounded to the nearest": RULE | PLAIN,
    "layers by the KL criterion": {"selection": "kl", "compression": 0.0},
    "earlier errors left alone (upstream 0)": {"upstream": 0.0},
    "earlier errors taken back whole (upstream 1)": {"upstream": 1.0},
    "INT4 share 0": {"int4_share": 0.0, "compression": 0.0},
    "INT4 share 25 %": {"int4_share": 0.25, "compression": 0.0},
    "INT4 share 75 %": {"int4_share": 0.75, "compression": 0.0},
    "INT4 share 100 %": {"int4_share": 1.0, "compression": 0.0},
}


def measure(a: argparse.Namespace, directory: str, calibration: str, text: str) -> list[dict[str, Any]]:
    """One row a variant for one checkpoint."""
    model, tokenizer = fqjax.load_hf(directory)
    tokens = encode(tokenizer, calibration)
    batches = fqjax.calibration_batches(tokens, model.config, samples=a.samples, window=a.window)
    ids = encode(tokenizer, text)
    reference = fqjax.perplexity(model, ids, a.window, windows=a.windows)
    rows = []
    for name in a.variants or VARIANTS:
        start = time.perf_counter()
        scheme = dataclasses.replace(fqjax.PRESETS["flattenquant"], **VARIANTS[name])
        quantized, report = fqjax.quantize(model, scheme, batches)
        seconds = time.perf_counter() - start
        ratio = fqjax.perplexity(quantized, ids, a.window, windows=a.windows) / reference
        row = {"variant": name, "ratio": ratio, "int4_mac_share": report.int4_mac_share, "expansion": report.expansion}
        rows.append(row | {"bytes_ratio": report.bytes / report.bytes_bf16, "seconds": seconds})
        print(f"  {name}: ratio {ratio:.4f}, K'/K {report.expansion:.3f}, {seconds:.0f} s", flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    """All results in Markdown."""
    lines = [
        "# What each piece of FlattenQuant is worth",
        "",
        "Written by `scripts/ablation.py`. Each variant is `flattenquant` with the change named; the ratio is that of the",
        "perplexity to the same model in bfloat16, bytes are those of the linear layers.",
    ]
    for name, result in results.items():
        lines += ["", f"## {name}", ""]
        lines.append(
            f"{describe(result['environment'])}. {result['windows']} windows of {result['window']} tokens of "
            f"{result['text']}, calibrated on {result['samples']} windows of {result['calibration']}."
        )
        lines += ["", "| variant | ratio | INT4 share | K'/K | bytes of bf16 |", "|---|---:|---:|---:|---:|"]
        for row in result["rows"]:
            lines.append(
                f"| {row['variant']} | {row['ratio']:.4f} | {row['int4_mac_share']:.1%} | {row['expansion']:.3f} "
                f"| {row['bytes_ratio']:.1%} |"
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
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), metavar="VARIANT", help="some of them")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/ablation"), help="written with .json and .md")
    a = parser.parse_args()
    models = dict(m.split("=", 1) for m in a.model) if a.model else {"bundled": str(CHECKPOINT)}
    calibration = read_text(a.calibration) if a.calibration else reference_text()
    text = read_text(a.text) if a.text else held_out_text()
    record = a.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    for name, directory in models.items():
        print(name, flush=True)
        rows = measure(a, directory, calibration, text)
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
