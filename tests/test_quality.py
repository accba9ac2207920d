"""The record of what quantization costs: what is kept of it, and how it reads."""

import pytest

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
