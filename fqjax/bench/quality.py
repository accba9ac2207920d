"""The cost of quantization in perplexity: the measurement, its record and its table, for the scripts that vary schemes.

Perplexity follows the protocol of :mod:`fqjax.evaluation.perplexity`; ratios are to the same model in bfloat16, in the
same run.  What was measured before is kept until it is measured again: other models, and of the same model other rows,
if they were measured with the same versions, on the same texts.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import fqjax
from fqjax.bench.environment import Record, describe, environment
from fqjax.data.python_docs import held_out_text, reference_text
from fqjax.data.text import encode, read_text
from fqjax.demo.run import CHECKPOINT
from fqjax.models.causal_lm import CausalLM
from fqjax.presets import PRESETS
from fqjax.scheme import Scheme

GOOD_RATIO = 1.005
"""Ratios up to it stand out in :func:`overview`."""
EXPLANATION = (
    f"Ratios of perplexity to bfloat16; those of {GOOD_RATIO} or less in bold, `-` where nothing was measured.",
    "",
    r"\* Naive: to compare with rather than to use. `w8a8` and the 4-bit presets with neither GPTQ nor AWQ round everything",
    "alike to the nearest code, and nothing makes up for it: no smoothing, no flattening. `flattenquant-w4a4` makes up for",
    "rounding, but computes every layer in INT4, activations too, with one scale per tensor, and spares none.",
)
"""Lines below the table of :func:`overview`."""
FOREIGN = ", foreign calibration"
"""Added to the name of a model that is calibrated on a text of another kind than it is measured on."""
FOREIGN_HEADING = (
    "## Calibrated on a text of another kind",
    "",
    "The same checkpoints on the same texts, but calibrated on Python's documentation: it shows which schemes depend on a",
    "calibration text that is like the text they meet.",
    "",
)
"""Lines above the second table of :func:`overview`."""


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The command line of such a script; ``out`` is where the result goes by default."""
    command = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--model", action="append", metavar="NAME=DIR", help="a checkpoint; repeatable")
    command.add_argument("--calibration", type=Path, help="text to calibrate on")
    command.add_argument("--text", type=Path, help="text to predict")
    command.add_argument("--window", type=int, default=512)
    command.add_argument("--windows", type=int, default=24)
    command.add_argument("--skip", type=int, default=0, help="windows of the text to leave out first")
    command.add_argument("--samples", type=int, default=64)
    command.add_argument("--out", type=Path, default=Path(out), help="written with .json and .md")
    return command


class Setting(NamedTuple):
    """Model and data that quantization is measured on.

    Attributes:
      model: in bfloat16.
      batches: to calibrate on.
      perplexity: of a model, on the text; takes what :func:`fqjax.perplexity` takes besides.
    """

    model: CausalLM
    batches: list[np.ndarray]
    perplexity: Callable[..., float]


def run(
    a: argparse.Namespace,
    schemes: Mapping[str, Scheme],
    heading: Sequence[str],
    column: str,
    *,
    timed: bool = True,
    front: Callable[[Mapping[str, Record]], Sequence[str]] | None = None,
) -> None:
    """Measures every scheme on every model, and writes the result after each model.

    Args:
      a: what :func:`parser` read.
      schemes: by the name that they have in the table.
      heading, column, timed, front: of :func:`document`.
    """
    record = a.out.with_suffix(".json")
    results: dict[str, Record] = json.loads(record.read_text()) if record.is_file() else {}
    for name, setting in settings(a):
        result, name = conditions(a), name + FOREIGN * getattr(a, "foreign", False)
        rows = _measure(setting, schemes)
        results[name] = result | {"rows": _kept(results.get(name), result, rows) + rows}
        write(a.out, results, document(results, heading, column, timed, front))


def settings(a: argparse.Namespace) -> Iterator[tuple[str, Setting]]:
    """Models and data to measure on, by the name of each model."""
    models = dict(m.split("=", 1) for m in a.model) if a.model else {"bundled": str(CHECKPOINT)}
    calibration = read_text(a.calibration) if a.calibration else reference_text()
    text = read_text(a.text) if a.text else held_out_text()
    for name, directory in models.items():
        print(name, flush=True)
        model, tokenizer = fqjax.load_hf(directory)
        tokens = encode(tokenizer, calibration)
        batches = fqjax.calibration_batches(tokens, model.config, samples=a.samples, window=a.window)
        ids = encode(tokenizer, text)[a.skip * (a.window - 1) :]
        yield name, Setting(model, batches, functools.partial(_perplexity, ids, a))


def _perplexity(
    ids: np.ndarray, a: argparse.Namespace, model: CausalLM, *, kv_cache: Literal["int8"] | None = None
) -> float:
    return fqjax.perplexity(model, ids, a.window, windows=a.windows, kv_cache=kv_cache)


def conditions(a: argparse.Namespace) -> Record:
    """Under which conditions it is measured."""
    return {
        "environment": environment(),
        "window": a.window,
        "windows": a.windows,
        "skipped": a.skip,
        "samples": a.samples,
        "calibration": a.calibration.name if a.calibration else "Python's documentation",
        "text": a.text.name if a.text else "its held-out part",
    }


def write(out: Path, results: Mapping[str, Record], text: str) -> None:
    """The record and the document."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    print(f"wrote {out}.json and {out}.md", flush=True)


def _kept(before: Record | None, result: Record, rows: Sequence[Record]) -> list[Record]:
    """Rows measured before that belong beside the new ones."""

    def comparable(of: Record) -> Record:
        same: Record = {"skipped": 0} | dict(of)
        return same | {"rows": None, "environment": same["environment"] | {"date": None}}

    if before is None or comparable(before) != comparable(result):
        return []
    new = {row["scheme"] for row in rows}
    return [row for row in before["rows"] if row["scheme"] not in new]


def _measure(setting: Setting, schemes: Mapping[str, Scheme]) -> list[Record]:
    """One row a scheme for one checkpoint."""
    reference = setting.perplexity(setting.model)
    rows: list[Record] = []
    for name, scheme in schemes.items():
        start = time.perf_counter()
        quantized, report = fqjax.quantize(setting.model, scheme, setting.batches)
        seconds = time.perf_counter() - start
        perplexity = setting.perplexity(quantized)
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


def document(
    results: Mapping[str, Record],
    heading: Sequence[str],
    column: str,
    timed: bool = True,
    front: Callable[[Mapping[str, Record]], Sequence[str]] | None = None,
) -> str:
    """All results in Markdown.

    Args:
      results: the record.
      heading: first lines of the document.
      column: what the names of the schemes are.
      timed: whether it says how long each took.
      front: the lines on all models that stand before those on each; :func:`overview`, or none.
    """
    lines = [*heading, *(front(results) if front else ())]
    for name, result in results.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{describe_conditions(result)}.",
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


def overview(results: Mapping[str, Record], notes: Mapping[str, str]) -> list[str]:
    """One table of ratios, presets by models, and another of the models with a foreign calibration, if there are any.

    Args:
      results: the record; of it, the models measured from the beginning of their text.
      notes: a sentence on a model, by its name, for the text below the table.
    """
    models = [name for name, result in results.items() if not result.get("skipped")]
    foreign = [name for name in models if name.endswith(FOREIGN)]
    models = [name for name in models if name not in foreign]
    said = [line for name in models if name in notes for line in ("", notes[name])]
    lines = ["", "## Checkpoints and presets", "", *_table(results, models), "", *EXPLANATION, *said]
    return [*lines, "", *FOREIGN_HEADING, *_table(results, foreign)] if foreign else lines


def _table(results: Mapping[str, Record], models: Sequence[str]) -> list[str]:
    """Ratios, presets by models."""
    ratios = [{row["scheme"]: row["ratio"] for row in results[name]["rows"]} for name in models]
    lines = [
        "| scheme | " + " | ".join(name.removesuffix(FOREIGN) for name in models) + " |",
        "|---" + "|---:" * len(models) + "|",
    ]
    for preset in (preset for preset in PRESETS.values() if preset.method is not None):
        cells = " | ".join(_cell(of_model.get(preset.name)) for of_model in ratios)
        lines.append("| `" + preset.name + "`" + r"\*" * preset.naive + f" | {cells} |")
    return lines


def _cell(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"**{ratio:.4f}**" if ratio <= GOOD_RATIO else f"{ratio:.4f}"


def describe_conditions(result: Record) -> str:
    """:func:`conditions` in words."""
    after = f" after the first {result['skipped']}" if result.get("skipped") else ""
    return (
        f"{describe(result['environment'])}. {result['windows']} windows of {result['window']} tokens of "
        f"{result['text']}{after}, calibrated on {result['samples']} windows of {result['calibration']}"
    )
