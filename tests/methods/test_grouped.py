import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.layer import LayerInputs, relative_error
from fqjax.methods import AWQ, IntegerScale, RoundToNearest
from fqjax.methods.arrays.grouped import group_scales


def problem(k=384, n=64, outliers=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(300, k)), rng.normal(size=(n, k)) * np.exp(rng.normal(0, 0.7, (1, k)))
    x[:, ::16] *= outliers
    return LayerInputs(*(jnp.asarray(a, jnp.float32) for a in (w, np.abs(x).max(axis=0), x)))


NEAREST = RoundToNearest()


def plan(layer, method=NEAREST, bits=4):
    (found,) = method.plans(layer, bits)
    return found


def error(layer, method=NEAREST):
    found = plan(layer, method)
    return float(relative_error(found, found.grid.weight(found.round(layer.weight)), layer))


def test_smaller_groups_are_finer():
    layer = problem()
    errors = [error(layer, RoundToNearest(group_size=size)) for size in (32, 64, 128)]
    assert errors == sorted(errors) and errors[-1] > 1.1 * errors[0]


def test_codes_use_all_of_four_bits():
    codes = plan(problem()).round(problem().weight)
    assert int(codes.min()) == -8 and int(codes.max()) == 7
    wide = plan(problem(), bits=8).round(problem().weight)
    assert -127 <= int(wide.min()) < -100


def test_scales_are_chosen_by_the_error_of_the_output():
    layer = problem()
    moments = layer.samples.T @ layer.samples

    def output_error(scales):
        step = jnp.repeat(scales.T, 128, axis=1)
        change = jnp.clip(jnp.round(layer.weight / step), -8, 7) * step - layer.weight
        return sum(
            float(jnp.sum((change[:, g : g + 128] @ moments[g : g + 128, g : g + 128]) * change[:, g : g + 128]))
            for g in range(0, 384, 128)
        )

    plain = group_scales(layer.weight, layer.samples, 128, 4, (1.0,))
    np.testing.assert_allclose(plain.T, jnp.abs(layer.weight.reshape(64, 3, 128)).max(axis=2) / 7.5, rtol=1e-6)
    assert output_error(group_scales(layer.weight, layer.samples, 128, 4)) < 0.97 * output_error(plain)


def test_the_last_group_may_be_short():
    layer = problem(k=300)
    grid = plan(layer).grid
    assert grid.group_scale.shape == (3, 64) and grid.steps(300).shape == (64, 300)
    assert error(layer) < 0.03


def test_a_group_of_zeros_does_no_harm():
    layer = problem()
    layer = dataclasses.replace(layer, weight=layer.weight.at[:, :128].set(0))
    found = plan(layer)
    assert bool(jnp.isfinite(found.grid.group_scale).all())
    assert int(jnp.abs(found.round(layer.weight)[:, :128]).max()) == 0


def test_awq_makes_room_for_channels_with_large_activations():
    layer = problem(outliers=20.0)
    factors = plan(layer, AWQ()).transform.factors
    assert float(factors[::16].mean()) > 2 * float(factors[1::16].mean())
    assert error(layer, AWQ()) < 0.75 * error(layer)
    alike = problem()
    assert error(alike, AWQ()) <= 1.05 * error(alike)


@pytest.mark.parametrize("weights", [NEAREST, AWQ()])
def test_folded_scales_cost_little(weights):
    layer, method = problem(), IntegerScale(weights=weights, folded=True)
    folded = plan(layer, method)
    scales = folded.grid.group_scale
    assert scales.dtype == jnp.int32 and folded.grid.scale.shape == (64,)
    assert 1 <= int(scales.min()) and int(scales.max()) <= 15
    product = folded.round(layer.weight) * jnp.repeat(scales.T, 128, axis=1)
    assert int(jnp.abs(product).max()) <= 127
    assert error(layer, method) < 1.2 * error(layer, weights)
