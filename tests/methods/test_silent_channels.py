"""Input channels that are zero in all of calibration, as ReLU leaves them, are quantized as well as others are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.checkpoint.calibration_record import CalibrationRecord
from fqjax.core.layer import LayerInputs, relative_error
from fqjax.core.rounding.gptq import gptq
from fqjax.drivers.statistics import Statistics, layer_inputs
from fqjax.methods import AWQ, GPTQ, Absmax, FlattenQuant, IntegerScale, RoundToNearest, SmoothQuant
from fqjax.report.report import report_of
from tests.tiers import thorough_but

COARSE = ("flattenquant", "flattenquant-w4a4")
"""Presets with activations in 4 bits: what calibration has not met costs them more."""


class MLP(nnx.Module):
    """Two layers with a ReLU between them."""

    def __init__(self, rngs):
        self.up = nnx.Linear(128, 512, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(512, 128, use_bias=False, rngs=rngs)

    def inner(self, x):
        return jax.nn.relu(self.up(x))

    def __call__(self, x):
        return self.down(self.inner(x))


@pytest.fixture(scope="module")
def problem():
    """A model, inputs on one topic, and inputs on the opposite one, which use what the others leave silent."""
    rng = np.random.default_rng(0)
    topic = rng.standard_normal(128)
    seen = [jnp.asarray(topic + 0.3 * rng.standard_normal((64, 128)), jnp.float32) for _ in range(4)]
    return MLP(nnx.Rngs(0)), seen, jnp.asarray(-topic + 0.3 * rng.standard_normal((256, 128)), jnp.float32)


def loss(found, wanted):
    return float(((found - wanted) ** 2).mean() / (wanted**2).mean())


@pytest.mark.parametrize(
    "scheme", thorough_but({"flattenquant-hopper-int4"}, [name for name in fqjax.PRESETS if name != "bf16"])
)
def test_inputs_that_calibration_did_not_meet(problem, scheme):
    model, seen, other = problem
    quantized, report = fqjax.quantize(model, scheme, calibration=seen)
    assert loss(quantized(seen[0]), model(seen[0])) < 0.013
    assert loss(quantized(other), model(other)) < (0.13 if scheme in COARSE else 0.025)
    rows = {row.name: row for row in report.layers}
    silent = np.max([model.inner(x).max(axis=0) for x in seen], axis=0) == 0
    assert rows["up"].silent_channels == 0 and rows["down"].silent_channels == silent.sum() > 50
    assert f"Zero in all of calibration: {silent.sum()} input channels of 1 layers" in report.totals()


@pytest.fixture(scope="module")
def layer(problem):
    """The statistics of the second layer's input, and the input that is met later."""
    model, seen, other = problem
    x = np.concatenate([model.inner(x) for x in seen])
    found = Statistics(np.abs(x).max(axis=0), x, len(x), len(x))
    return layer_inputs(model.down, found), model.inner(other)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "method",
    [Absmax(), SmoothQuant(), FlattenQuant(), RoundToNearest(), AWQ(), GPTQ(), IntegerScale()],
    ids=lambda method: method.kind,
)
def test_plans_of_every_method(layer, method, bits):
    inputs, later = layer
    for plan in method.plans(inputs, bits):
        rounded = plan.grid.weight(plan.round(inputs.weight))
        seen, elsewhere = (
            float(relative_error(plan, rounded, dataclasses.replace(inputs, samples=x)))
            for x in (inputs.samples, later)
        )
        assert elsewhere < (0.3 if bits == 4 and method.kind in ("absmax", "smoothquant", "flattenquant") else 0.02)
        assert seen < 0.2


def test_a_search_for_factors_never_ends_worse_than_without():
    rng = np.random.default_rng(5)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = np.maximum(rng.normal(size=(200, 256)) + rng.normal(0, 1.5, 256), 0)
        w = rng.normal(size=(64, 256)) * np.exp(rng.normal(0, 1, 256))
        inputs = LayerInputs(*(jnp.asarray(a, jnp.float32) for a in (w, x.max(axis=0), x)))
        errors = []
        for method in (AWQ(), RoundToNearest()):
            (plan,) = method.plans(inputs, 4)
            errors.append(float(relative_error(plan, plan.grid.weight(plan.round(inputs.weight)), inputs)))
        assert errors[0] <= errors[1] * (1 + 1e-5)


def test_a_layer_that_is_silent_as_a_whole_is_quantized_for_inputs_of_unit_size():
    linear = nnx.Linear(128, 16, rngs=nnx.Rngs(0))
    inputs = layer_inputs(linear, Statistics(np.zeros(128, np.float32), np.zeros((50, 128), np.float32), 50, 50))
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (40, 128)), jnp.float32)
    for method in (Absmax(), SmoothQuant(), FlattenQuant(), AWQ()):
        plan = method.plans(inputs, 8)[0]
        rounded = plan.grid.weight(plan.round(inputs.weight))
        assert float(relative_error(plan, rounded, dataclasses.replace(inputs, samples=x))) < 1e-3


def test_a_record_counts_channels_of_layers_that_it_knows():
    record = CalibrationRecord({"up": np.array([0, 1, 0], np.float32)}, {})
    assert record.silent_channels("up") == 2
    assert all(row.silent_channels is None for row in report_of(MLP(nnx.Rngs(0))).layers)


def test_nothing_is_made_up_for_by_channels_without_input():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 64)).astype(np.float32)
    x[:, 5:20] = 0
    weight = jnp.asarray(rng.normal(0, 3, (8, 64)), jnp.float32)
    found = gptq(weight, jnp.asarray(x.T @ x), lambda column, i: jnp.round(column))
    np.testing.assert_array_equal(found[:, 5:20], jnp.round(weight[:, 5:20]))
