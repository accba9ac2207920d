"""Compares the fingerprints of two quantized models, layer by layer, for ``scripts/compare_checkouts.py``."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

OUTPUTS = ("output", "logits", "perplexity")
"""Fields that are computed by the quantized model, rather than stored in it."""
SCALES = ("scale", "group_scale", "multiplier", "input_scale")

Fields = Mapping[str, Mapping[str, str]]
"""SHA-256 of arrays by layer and field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Result of one checkout for a checkpoint by a scheme.

    Attributes:
      layers: fingerprints.
      perplexity: on a small piece of the text, of the quantized model.
      seconds: that loading, calibration and quantization took.
      arrays: file with the arrays, as ``layer/field``.
    """

    layers: Fields
    perplexity: float
    seconds: float
    arrays: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A checkpoint and scheme in both checkouts.

    Attributes:
      status: "identical", "outputs differ" (all stored numbers are the same), "differs", or "failed".
      layers: number of layers in either, the whole model counted as one.
      different: fields that differ, by layer.
      codes: largest difference of codes; None where shapes differ.
      scales: largest relative difference of scales and multipliers; None where shapes differ.
      outputs: largest difference of a layer's outputs or of the logits, over their largest magnitude.
      perplexity, seconds: before and after.
      reason: why it failed.
    """

    model: str
    scheme: str
    status: str
    layers: int = 0
    different: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    codes: float | None = 0
    scales: float | None = 0
    outputs: float | None = 0
    perplexity: tuple[float, float] = (0.0, 0.0)
    seconds: tuple[float, float] = (0.0, 0.0)
    reason: str = ""


def compare(model: str, scheme: str, before: Measured, after: Measured) -> Comparison:
    """Compares fingerprints, and the arrays where those differ."""
    different = differing_fields(before.layers, after.layers)
    fields = {field for own in different.values() for field in own}
    status = "identical" if not fields else "outputs differ" if fields <= set(OUTPUTS) else "differs"
    with np.load(before.arrays) as old, np.load(after.arrays) as new:
        pairs = functools.partial(_pairs, old, new, different)
        return Comparison(
            model=model,
            scheme=scheme,
            status=status,
            layers=len(before.layers.keys() | after.layers.keys()),
            different=different,
            codes=_largest(_distance, pairs(("codes",))),
            scales=_largest(_relative, pairs(SCALES)),
            outputs=_largest(lambda a, b: _distance(a, b) / max(float(np.abs(a).max()), 1e-30), pairs(OUTPUTS)),
            perplexity=(before.perplexity, after.perplexity),
            seconds=(before.seconds, after.seconds),
        )


def differing_fields(before: Fields, after: Fields) -> dict[str, list[str]]:
    """Fields that are not the same, by layer; those that only one of both has are among them."""
    found = {}
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, {}), after.get(name, {})
        fields = sorted(field for field in old.keys() | new.keys() if old.get(field) != new.get(field))
        if fields:
            found[name] = fields
    return found


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max(initial=0))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(a.astype(np.float64) - b) / np.maximum(np.abs(a), 1e-30)).max(initial=0))


def _pairs(
    old: Mapping[str, np.ndarray],
    new: Mapping[str, np.ndarray],
    different: Mapping[str, list[str]],
    fields: Iterable[str],
) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
    """Arrays of both checkouts that differ; None for a pair whose shapes do, or of which one is missing."""
    for name, own in different.items():
        for field in set(own) & set(fields):
            key = f"{name}/{field}"
            both = key in old and key in new
            yield (old[key], new[key]) if both and old[key].shape == new[key].shape else None


def _largest(distance: Callable[..., float], pairs: Iterable[tuple[np.ndarray, np.ndarray] | None]) -> float | None:
    """The largest distance of a pair; None if two cannot be compared."""
    pairs = list(pairs)
    return None if None in pairs else max((distance(*pair) for pair in pairs if pair), default=0)


def table(rows: Iterable[Comparison], allowed: Iterable[str] = ()) -> str:
    """The comparisons as a Markdown table."""
    heading = "checkpoint | scheme | result | layers that differ | codes | scales | outputs | perplexity | seconds"
    lines = [f"| {heading} |", "|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        result = row.status + (" (allowed)" if row.scheme in allowed and "differ" in row.status else "")
        cells = [row.model, row.scheme, f"{result}: {row.reason}" if row.reason else result]
        cells += [f"{len(row.different)} of {row.layers}", *map(_short, (row.codes, row.scales, row.outputs))]
        cells += [" -> ".join(f"{p:.4f}" for p in row.perplexity), " -> ".join(f"{s:.1f}" for s in row.seconds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "shapes" if value is None else f"{value:.3g}" if value else "-"


def exit_code(rows: Iterable[Comparison], allowed: Iterable[str] = ()) -> int:
    """1 if a row failed, or differs and its scheme is not allowed to."""
    bad = [row for row in rows if row.status == "failed" or (row.status != "identical" and row.scheme not in allowed)]
    return 1 if bad else 0
