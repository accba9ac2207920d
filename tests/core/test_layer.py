"""Plans: what a quantized layer computes, on its original channels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.formats.uniform import Uniform, UniformGrid
from fqjax.core.inputs import Floating, PerToken, Static
from fqjax.core.layer import LayerInputs, LayerPlan, channels_used, relative_error
from fqjax.core.transforms.diagonal import Diagonal
from fqjax.methods.arrays.absmax import absmax_plan


def layer(seed=0):
    rng = np.random.default_rng(seed)
    weight, x = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((12, 20), (30, 20)))
    return LayerInputs(weight, jnp.abs(x).max(0), x)


def plan_of(inputs, bits=8):
    return absmax_plan(inputs, jnp.ones(20), bits)


def unit_plan(k, bits=8, x_bits=8):
    """Codes that stand for themselves."""
    one, whole = jnp.float32(1), jnp.ones(k, jnp.int32)
    grid = UniformGrid(scale=one, pieces=whole, format=Uniform(bits=bits))
    return LayerPlan(transform=Diagonal(factors=jnp.ones(k)), inputs=Static.of(one, whole, x_bits), grid=grid)


def nearest(plan, weight):
    return plan.grid.weight(plan.round(weight))


def test_the_product_is_that_of_the_rounded_operands():
    inputs = layer()
    plan = plan_of(inputs)
    found = plan.round(inputs.weight)
    x_scale = float(plan.inputs.scale)
    codes = np.clip(np.rint(np.asarray(inputs.samples) / x_scale), -127, 127)
    expected = (codes * x_scale) @ (np.asarray(found) * float(plan.grid.scale)).T
    np.testing.assert_allclose(plan.product(inputs.samples, plan.grid.weight(found)), expected, rtol=1e-4, atol=1e-5)


def test_the_error_falls_with_the_bits():
    inputs = layer()
    plans = [plan_of(inputs, bits) for bits in (8, 4)]
    errors = [float(relative_error(plan, nearest(plan, inputs.weight), inputs)) for plan in plans]
    assert 0 < errors[0] < 1e-3 < errors[1] < 0.2


def test_an_exact_layer_has_no_error():
    plan, weight = unit_plan(4), jnp.eye(4)
    for x in (jnp.asarray([[1.0, 2, 3, 4]]), jnp.zeros((1, 4))):
        assert float(relative_error(plan, nearest(plan, weight), LayerInputs(weight, jnp.ones(4), x))) == 0


class Shift:
    """Inputs less a constant, which the bias makes up for."""

    def weight(self, w):
        return w

    def inputs(self, x):
        return x - 3

    def bias(self, w, b):
        return 3 * w.sum(axis=1) + (0 if b is None else b)

    def inverse(self):
        raise NotImplementedError

    def recipe(self):
        return None


def test_the_error_is_that_of_all_the_layer_adds():
    inputs = layer()
    plan = plan_of(inputs, bits=4)
    rounded = nearest(plan, inputs.weight)
    missing = inputs.samples @ inputs.weight.T - plan.product(inputs.samples, rounded)

    def branch(x):  # Of the transformed input, which is the input itself here.
        np.testing.assert_array_equal(x, inputs.samples)
        return missing

    assert float(relative_error(dataclasses.replace(plan, branches=(branch,)), rounded, inputs)) < 1e-12
    halved = dataclasses.replace(plan, branches=(lambda x: missing / 2, lambda x: missing / 2))
    assert float(relative_error(halved, rounded, inputs)) < 1e-12
    zero = dataclasses.replace(plan, finish=lambda y: 0 * y)
    assert float(relative_error(zero, rounded, inputs)) == pytest.approx(1)


def test_the_error_counts_the_bias_that_a_transform_makes():
    inputs = layer()
    plan = dataclasses.replace(plan_of(inputs), inputs=PerToken.of(8), transform=Shift())
    assert float(relative_error(plan, nearest(plan, inputs.weight), inputs)) < 1e-3


def test_activations_and_weights_have_bits_of_their_own():
    inputs = layer()
    plan = unit_plan(20, bits=4)
    assert np.abs(plan.round(100 * inputs.weight)).max() == 7
    assert np.abs(plan.inputs.fake(1000 * inputs.samples)).max() == 127


def test_smoothing_divides_inputs_and_multiplies_weights():
    inputs, factors = layer(), jnp.asarray(2.0 ** np.arange(-10, 10), jnp.float32)
    plan = dataclasses.replace(unit_plan(20), transform=Diagonal(factors=factors))
    np.testing.assert_array_equal(plan.round(inputs.weight), jnp.clip(jnp.round(inputs.weight * factors), -127, 127))
    wanted = jnp.clip(jnp.round(inputs.samples / factors), -127, 127) @ plan.round(inputs.weight).astype(jnp.float32).T
    np.testing.assert_allclose(plan.product(inputs.samples, nearest(plan, inputs.weight)), wanted, rtol=1e-5)


def test_channels_are_counted_by_the_pieces_of_both_operands():
    plan = unit_plan(4)
    two, three = jnp.asarray([1, 2, 1, 2], jnp.int32), jnp.asarray([3, 2, 1, 1], jnp.int32)
    weights = dataclasses.replace(plan.grid, pieces=three)
    flat = dataclasses.replace(plan, inputs=Static.of(jnp.float32(1), two, 8), grid=weights)
    assert int(channels_used(flat, 4)) == 3 + 4 + 1 + 2 and float(flat.expansion(4)) == 2.5
    for inputs in (PerToken.of(8), Floating()):
        assert int(channels_used(dataclasses.replace(flat, inputs=inputs), 4)) == 7
