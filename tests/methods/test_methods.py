"""What each method is for: the next one survives what breaks the one before."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.layer import LayerInputs, relative_error
from fqjax.methods import FORMATS, METHODS
from fqjax.scheme import PRESETS, Scheme


def problem(x_outliers=1.0, w_outliers=1.0, seed=0):
    """Weights (64, 256) and inputs (200, 256) with four large channels each."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(200, 256)), rng.normal(size=(64, 256))
    x[:, :4] *= x_outliers
    w[:, 4:8] *= w_outliers
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def error(method, x, w, bits, **settings):
    """The error of a layer's output, and its plan: the one that may be flattened the most."""
    scheme = dataclasses.replace(PRESETS["flattenquant"], **settings)
    inputs = LayerInputs(w, jnp.abs(x).max(0), x)
    plan = METHODS[method](inputs, scheme, bits)[-1]
    return float(relative_error(plan, plan.round(w), inputs)), plan


def test_every_method_but_none_is_listed():
    assert set(METHODS) | {"none"} == set(Scheme.__dataclass_fields__["method"].type.__args__)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_method_says_what_it_stores(method, bits):
    """The format of its grid, but for scales that become integers afterwards, and the kind of stored input."""
    x, w = problem()
    plan = error(method, x, w, bits)[1]
    scheme = dataclasses.replace(PRESETS["flattenquant"])
    assert FORMATS[method](scheme, bits) == (plan.grid.format, plan.inputs.runs)


def test_outliers_break_absmax_and_smoothing_mends_it():
    x, w = problem(x_outliers=50)
    assert error("smoothquant", x, w, 8)[0] < 0.2 * error("absmax", x, w, 8)[0]


def test_flattening_mends_what_smoothing_cannot():
    x, w = problem(x_outliers=50, w_outliers=50)
    smoothed, _ = error("smoothquant", x, w, 4)
    flattened, plan = error("flattenquant", x, w, 4, max_expansion=1.25)
    assert flattened < 0.3 * smoothed
    assert 1 < float(plan.expansion(256)) <= 1.25


@pytest.mark.parametrize("operand", ["activations", "weights"])
def test_either_operand_can_be_kept_whole(operand):
    x, w = problem(x_outliers=50, w_outliers=50)
    _, plan = error("flattenquant", x, w, 4, **{f"flatten_{operand}": False})
    pieces = {"activations": plan.inputs.pieces, "weights": plan.grid.pieces}
    assert int(pieces.pop(operand).max()) == 1
    assert int(pieces.popitem()[1].max()) > 1


@pytest.mark.parametrize("budget", [1.0, 1.01, 1.05])
def test_the_expansion_is_capped(budget):
    x, w = problem(x_outliers=30, w_outliers=30)
    _, plan = error("flattenquant", x, w, 4, max_expansion=budget)
    assert float(plan.expansion(256)) <= budget


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_stay_within_their_pieces(bits):
    x, w = problem(x_outliers=30, w_outliers=30)
    _, plan = error("flattenquant", x, w, bits)
    largest, limit = np.abs(plan.round(w)).max(axis=0), 2 ** (bits - 1) - 1
    assert (largest <= limit * np.asarray(plan.grid.pieces)).all()
    # No channel has a piece more than its codes need.
    assert (largest > limit * (np.asarray(plan.grid.pieces) - 1)).all()


def test_a_dead_channel_does_no_harm():
    x, w = problem()
    x, w = x.at[:, 0].set(0), w.at[:, 1].set(0)
    for method in METHODS:
        value, plan = error(method, x, w, 8)
        assert value < 1e-3 and np.isfinite(1 / plan.transform.factors).all()
