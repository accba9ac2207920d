import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.checkpoint.calibration_record import CALIBRATION_FILE, CalibrationRecord, read_calibration_record
from fqjax.report.plots import plot_report
from fqjax.runtime.errors import InputError

FOUND = CalibrationRecord(
    activations={"a": np.arange(3, dtype=np.float32), "b": np.ones(2, np.float32)},
    costs={"a": {8: 0.1, 4: 0.5}, "b": {8: 0.0, 4: 0.2}, "c": {8: 0.0, 4: 0.9}},
)
MACS = {"a": 10, "b": 10, "c": 80}


def test_the_trade_off_takes_the_cheapest_layer_for_its_arithmetic_first():
    points = FOUND.trade_off(MACS)
    np.testing.assert_allclose(points, [(0, 0.1), (0.8, 1.0), (0.9, 1.2), (1.0, 1.6)])
    assert FOUND.cost({"a": 8, "b": 4, "c": 8}) == pytest.approx(0.3)


def test_a_layer_that_stays_in_int8_is_counted():
    found = CalibrationRecord({}, FOUND.costs | {"c": {8: 0.3}})
    np.testing.assert_allclose(found.trade_off(MACS), [(0, 0.4), (0.1, 0.6), (0.2, 1.0)])


@pytest.mark.parametrize(
    ("macs", "shares"),
    [({"b": 0}, [0, 8 / 9, 1, 1]), ({"a": 0, "b": 0}, [0, 1, 1, 1]), ({"a": 0, "b": 0, "c": 0}, [0, 0, 0, 0])],
)
def test_layers_that_calibration_never_reached_come_last_in_the_trade_off(macs, shares):
    points = FOUND.trade_off(MACS | macs)
    np.testing.assert_allclose([share for share, _ in points], shares)
    assert points[0][1] == pytest.approx(0.1) and points[-1][1] == pytest.approx(1.6)


def test_a_report_on_layers_that_calibration_never_reached_is_shown_and_drawn(tmp_path):
    model, report = fqjax.quantize(Two(), "w8a8", [jnp.ones((4, 64))])
    rows = tuple(dataclasses.replace(row, macs=0) for row in report.layers)
    found = CalibrationRecord({}, {row.name: {8: 0.0, 4: 0.1} for row in rows})
    never = dataclasses.replace(report, layers=rows, calibration=found)
    assert never.int4_mac_share == never.expansion == 0 and len(never.to_json()["trade_off"]) == 3
    assert never.table().row_count == 2
    assert {path.name for path in plot_report(model, never, tmp_path)} >= {"layers.png", "int4_share.png"}


@pytest.mark.parametrize("costs", [{}, {"a": {4: 1.0}}, {"a": {8: 1.0}}])
def test_there_is_no_trade_off_without_a_choice(costs):
    assert CalibrationRecord({}, costs).trade_off(MACS) == []


def test_findings_survive_the_disk(tmp_path):
    assert read_calibration_record(tmp_path) is None
    FOUND.write(tmp_path)
    again = read_calibration_record(tmp_path)
    assert again.costs == FOUND.costs
    for name, array in FOUND.activations.items():
        np.testing.assert_array_equal(again.activations[name], array)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\x40\0\0\0\0\0\0\0" + b"{" * 64])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / CALIBRATION_FILE).write_bytes(content)
    with pytest.raises(InputError, match=CALIBRATION_FILE):
        read_calibration_record(tmp_path)


class Two(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.mark.thorough
def test_a_report_says_what_the_bits_cost_and_a_checkpoint_keeps_it(tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 64)) * np.r_[np.full(3, 30.0), np.ones(61)]
    model, report = fqjax.quantize(Two(), "flattenquant", [jnp.asarray(x, jnp.float32)])
    np.testing.assert_allclose(report.calibration.activations["first"], np.abs(x).max(axis=0), rtol=1e-6)
    assert {name: set(cost) for name, cost in report.calibration.costs.items()} == {"first": {4, 8}, "second": {4, 8}}
    assert len(report.trade_off) == 3
    fqjax.save(tmp_path / "out", model, report=report)
    again = read_calibration_record(tmp_path / "out")
    assert fqjax.report_of(model, record=again).to_json() == report.to_json()
    assert fqjax.load(tmp_path / "out", Two())(jnp.ones(64)).shape == (16,)


def test_a_scheme_without_a_choice_measures_no_costs():
    data = [jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)]
    _, report = fqjax.quantize(Two(), "flattenquant-w8a8", data)
    assert (
        report.calibration.costs == {}
        and report.trade_off == []
        and set(report.calibration.activations) == {"first", "second"}
    )
