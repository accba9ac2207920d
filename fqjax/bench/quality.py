"""What quantization costs in perplexity: the measurement, its record and its table, for the scripts that vary schemes.

Perplexity follows the protocol of :mod:`fqjax.evaluate`; ratios are to the same model in bfloat16, in the same run.  A model
measured before keeps its result until it is measured again under the same name.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fqjax
from fqjax.bench.environment import describe, environment
from fqjax.corpus import held_out_text, reference_text
from fqjax.demo.run import CHECKPOINT
from fqjax.scheme import Scheme
from fqjax.text import encode, read_text


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The command line of such a script; ``out`` is where the result goes by default."""
    command = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--model", action="append", metavar="NAME=DIR", help="a checkpoint; repeatable")
    command.add_argument("--calibration", type=Path, help="text to calibrate on")
    command.add_argument("--text", type=Path, help="text to predict")
    command.add_argument("--window", type=int, default=512)
    command.add_argument("--windows", type=int, default=24)
    command.add_argument("--samples", type=int, default=64)
    command.add_argument("--out", type=Path, default=Path(out), help="written with .json and .md")
    return command


def run(
    a: argparse.Namespace, schemes: Mapping[str, Scheme], heading: Sequence[str], column: str, *, timed: bool = True
) -> None:
    """Measures every scheme on every model, and writes the result after each model.

    Args:
      a: what :func:`parser` read.
      schemes: by the name that they have in the table.
      heading: first lines of the document.
      column: what the names are.
      timed: whether the document says how long each took.
    """
    models = dict(m.split("=", 1) for m in a.model) if a.model else {"bundled": str(CHECKPOINT)}
    calibration = read_text(a.calibration) if a.calibration else reference_text()
    text = read_text(a.text) if a.text else held_out_text()
    record = a.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    for name, directory in models.items():
        print(name, flush=True)
        rows = _measure(a, directory, schemes, calibration, text)
        results[name] = {
            "environment": environment(),
            "window": a.window,
            "windows": a.windows,
            "samples": a.samples,
            "calibration": a.calibration.name if a.calibration else "Python's documentation",
            "text": a.text.name if a.text else "its held-out part",
            "rows": rows,
        }
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(results, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(document(results, heading, column, timed))
    print(f"wrote {record} and {a.out}.md")


def _measure(
    a: argparse.Namespace, directory: str, schemes: Mapping[str, Scheme], calibration: str, text: str
) -> list[dict[str, Any]]:
    """One row a scheme for one checkpoint."""
    model, tokenizer = fqjax.load_hf(directory)
    tokens, ids = encode(tokenizer, calibration), encode(tokenizer, text)
    batches = fqjax.calibration_batches(tokens, model.config, samples=a.samples, window=a.window)
    reference = fqjax.perplexity(model, ids, a.window, windows=a.windows)
    rows: list[dict[str, Any]] = []
    for name, scheme in schemes.items():
        start = time.perf_counter()
        quantized, report = fqjax.quantize(model, scheme, batches)
        seconds = time.perf_counter() - start
        perplexity = fqjax.perplexity(quantized, ids, a.window, windows=a.windows)
        rows.append(
            {
                "scheme": name,
                "perplexity": perplexity,
                "ratio": perplexity / reference,
                "int4_mac_share": report.int4_mac_share,
                "expansion": report.expansion,
                "bytes_ratio": report.bytes / report.bytes_bf16,
                "seconds": seconds,
            }
        )
        print(f"  {name}: {perplexity:.3f}, ratio {rows[-1]['ratio']:.4f}, {seconds:.0f} s", flush=True)
    return rows


def document(results: Mapping[str, Any], heading: Sequence[str], column: str, timed: bool) -> str:
    """All results in Markdown."""
    lines = list(heading)
    for name, result in results.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{describe(result['environment'])}. {result['windows']} windows of {result['window']} tokens of "
            f"{result['text']}, calibrated on {result['samples']} windows of {result['calibration']}.",
            "",
            f"| {column} | perplexity | ratio | INT4 share | K'/K | bytes of bf16 |" + " seconds |" * timed,
            "|---" + "|---:" * (5 + timed) + "|",
        ]
        for row in result["rows"]:
            lines.append(
                f"| {row['scheme']} | {row['perplexity']:.2f} | {row['ratio']:.4f} | {row['int4_mac_share']:.1%} "
                f"| {row['expansion']:.3f} | {row['bytes_ratio']:.1%} |" + f" {row['seconds']:.0f} |" * timed
            )
    return "\n".join(lines) + "\n"
