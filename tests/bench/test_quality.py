"""The record of what quantization costs: what is kept of it, and how it reads."""

import functools

import pytest

from fqjax import PRESETS
from fqjax.bench import quality


def result(rows, **change):
    environment = {"date": "2026-01-01", "device": "cpu", "versions": {"jax": "1"}}
    base = {"environment": environment, "window": 64, "windows": 2, "samples": 4, "calibration": "a", "text": "b"}
    return base | {"rows": [{"scheme": name} for name in rows]} | change


def names(rows):
    return [row["scheme"] for row in rows]


def test_rows_measured_before_stay_beside_new_ones():
    before = result(["w8a8", "w4a8"])
    later = result([], environment=before["environment"] | {"date": "2026-02-02"}, skipped=0)
    assert names(quality._kept(before, later, [{"scheme": "w4a8"}])) == ["w8a8"]
    assert quality._kept(None, later, []) == []


@pytest.mark.parametrize(
    "change", [{"window": 65}, {"text": "c"}, {"skipped": 3}, {"environment": {"date": "", "device": "gpu"}}]
)
def test_rows_measured_under_other_conditions_do_not(change):
    assert quality._kept(result(["w8a8"]), result([], **change), []) == []


def test_the_conditions_are_said():
    words = quality.describe_conditions(result([], skipped=24))
    assert (
        words == "2026-01-01, cpu, jax 1. 2 windows of 64 tokens of b after the first 24, calibrated on 4 windows of a"
    )


def measured(**ratios):
    """A model's result with the ratios of some schemes, ``_`` for ``-`` in their names."""
    fields = {"perplexity": 2.0, "int4_mac_share": 0.5, "expansion": 1.0, "bytes_ratio": 0.4, "seconds": 1.0}
    rows = [{"scheme": name.replace("_", "-"), "ratio": ratio} | fields for name, ratio in ratios.items()]
    return result([]) | {"rows": rows}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_one_table_has_all_models_and_all_presets():
    results = {
        "one": measured(bf16=1.0, w8a8=4.10804, flattenquant=1.0165, w4a16_awq=1.06),
        "two": measured(bf16=1.0, flattenquant_w4a4=1.0601, w4a8=0.99976),
        "two, other windows": measured(w8a8=1.5) | {"skipped": 24},
    }
    lines = quality.overview(results, {})
    headings, _, *rows = (cells(line) for line in lines if line.startswith("|"))
    assert headings == ["scheme", "one", "two"]
    names = [row[0].replace("`", "") for row in rows]
    assert [name.removesuffix(r"\*") for name in names] == [name for name in PRESETS if name != "bf16"]
    naive = [name for name in PRESETS if PRESETS[name].naive]
    assert [name for name in names if name.endswith("*")] == [rf"{name}\*" for name in naive]
    filled = {name: row[1:] for name, row in zip(names, rows, strict=True) if row[1:] != ["-", "-"]}
    assert filled == {
        r"w8a8\*": ["4.1080", "-"],
        "flattenquant": ["1.0165", "-"],
        r"flattenquant-w4a4\*": ["-", "1.0601"],
        r"w4a8\*": ["-", "**0.9998**"],
        "w4a16-awq": ["1.0600", "-"],
    }


def test_notes_stand_below_the_table_of_a_model_that_is_in_it():
    lines = quality.overview({"one": measured(w8a8=1.0)}, {"one": "Small.", "other": "Not here."})
    assert lines[-1] == "Small." and "Not here." not in lines


def test_the_table_of_all_stands_before_those_of_each_where_it_is_asked_for():
    results = {"one": measured(w8a8=1.0)}
    front = functools.partial(quality.overview, notes={})
    without, whole = (quality.document(results, ["# Title"], "scheme", **more) for more in ({}, {"front": front}))
    assert without.startswith("# Title\n\n## one\n")
    assert whole.index("## Checkpoints and presets") < whole.index("## one")
    assert whole.endswith(without.removeprefix("# Title"))


def test_models_with_a_foreign_calibration_have_a_table_of_their_own():
    results = {"one": measured(w8a8=1.0), f"one{quality.FOREIGN}": measured(w8a8=1.25)}
    lines = quality.overview(results, {"one": "A note."})
    assert [cells(line)[1] for line in lines if line.startswith("| scheme")] == ["one", "one"]
    assert [cells(line)[1] for line in lines if line.startswith("| `w8a8`")] == ["**1.0000**", "1.2500"]
    own, foreign = (lines.index(line) for line in ("A note.", quality.FOREIGN_HEADING[0]))
    assert own < foreign and quality.FOREIGN_HEADING[0] not in quality.overview({"one": results["one"]}, {})
