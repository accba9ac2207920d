"""What each method is for: the next one survives what breaks the one before."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.layer import LayerInputs, relative_error
from fqjax.methods import AWQ, GPTQ, Absmax, FlattenQuant, IntegerScale, RoundToNearest, SmoothQuant


def problem(x_outliers=1.0, w_outliers=1.0, seed=0):
    """Weights (64, 256) and inputs (200, 256) with four large channels each."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(200, 256)), rng.normal(size=(64, 256))
    x[:, :4] *= x_outliers
    w[:, 4:8] *= w_outliers
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


SEARCHED = FlattenQuant(threshold_rule="search", max_expansion=1.5)
METHODS = [
    Absmax(),
    SmoothQuant(),
    SEARCHED,
    RoundToNearest(),
    GPTQ(),
    AWQ(),
    IntegerScale(),
    IntegerScale(folded=True),
]


def error(method, x, w, bits):
    """The error of a layer's output, and its plan: the one that may be flattened the most."""
    inputs = LayerInputs(w, jnp.abs(x).max(0), x)
    plan = list(method.plans(inputs, bits))[-1]
    return float(relative_error(plan, plan.grid.weight(plan.round(w)), inputs)), plan


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_method_says_what_it_stores(method, bits):
    """The format of its grid, but for scales that become integers afterwards, and the kind of stored input."""
    x, w = problem()
    plan = error(method, x, w, bits)[1]
    form, quantizer = method.formats(bits)
    if isinstance(method, IntegerScale) and not method.folded:
        form = dataclasses.replace(form, scales="float", granularity="tensor")
    assert (form, quantizer) == (plan.grid.format, plan.inputs.runs)


def test_outliers_break_absmax_and_smoothing_mends_it():
    x, w = problem(x_outliers=50)
    assert error(SmoothQuant(), x, w, 8)[0] < 0.2 * error(Absmax(), x, w, 8)[0]


def test_flattening_mends_what_smoothing_cannot():
    x, w = problem(x_outliers=50, w_outliers=50)
    smoothed, _ = error(SmoothQuant(), x, w, 4)
    flattened, plan = error(dataclasses.replace(SEARCHED, max_expansion=1.25), x, w, 4)
    assert flattened < 0.3 * smoothed
    assert 1 < float(plan.expansion(256)) <= 1.25


@pytest.mark.parametrize("operand", ["activations", "weights"])
def test_either_operand_can_be_kept_whole(operand):
    x, w = problem(x_outliers=50, w_outliers=50)
    _, plan = error(dataclasses.replace(SEARCHED, **{f"flatten_{operand}": False}), x, w, 4)
    pieces = {"activations": plan.inputs.pieces, "weights": plan.grid.pieces}
    assert int(pieces.pop(operand).max()) == 1
    assert int(pieces.popitem()[1].max()) > 1


@pytest.mark.parametrize("budget", [1.0, 1.01, 1.05])
def test_the_expansion_is_capped(budget):
    x, w = problem(x_outliers=30, w_outliers=30)
    _, plan = error(dataclasses.replace(SEARCHED, max_expansion=budget), x, w, 4)
    assert float(plan.expansion(256)) <= budget


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_stay_within_their_pieces(bits):
    x, w = problem(x_outliers=30, w_outliers=30)
    _, plan = error(SEARCHED, x, w, bits)
    largest, limit = np.abs(plan.round(w)).max(axis=0), 2 ** (bits - 1) - 1
    assert (largest <= limit * np.asarray(plan.grid.pieces)).all()
    # No channel has a piece more than its codes need.
    assert (largest > limit * (np.asarray(plan.grid.pieces) - 1)).all()


def test_a_dead_channel_does_no_harm():
    x, w = problem()
    x, w = x.at[:, 0].set(0), w.at[:, 1].set(0)
    for method in (Absmax(), SmoothQuant(), SEARCHED):
        value, plan = error(method, x, w, 8)
        assert value < 1e-3 and np.isfinite(1 / plan.transform.factors).all()
