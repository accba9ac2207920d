"""What each method is for: the next one survives what breaks the one before."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.formats.uniform import relative_error
from fqjax.methods import METHODS, LayerInputs
from fqjax.scheme import PRESETS, Scheme


def problem(x_outliers=1.0, w_outliers=1.0, seed=0):
    """Weights (64, 256) and inputs (200, 256) with four large channels each."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(200, 256)), rng.normal(size=(64, 256))
    x[:, :4] *= x_outliers
    w[:, 4:8] *= w_outliers
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def error(method, x, w, bits, **settings):
    scheme = dataclasses.replace(PRESETS["flattenquant"], **settings)
    grid_of = METHODS[method](LayerInputs(w, jnp.abs(x).max(0), x), scheme, bits, jnp.asarray([scheme.max_expansion]))
    wide = grid_of(jnp.int32(0)).round(w)
    return float(relative_error(wide, x, w)), wide


def test_every_method_but_none_is_listed():
    assert set(METHODS) | {"none"} == set(Scheme.__dataclass_fields__["method"].type.__args__)


def test_outliers_break_absmax_and_smoothing_mends_it():
    x, w = problem(x_outliers=50)
    assert error("smoothquant", x, w, 8)[0] < 0.2 * error("absmax", x, w, 8)[0]


def test_flattening_mends_what_smoothing_cannot():
    x, w = problem(x_outliers=50, w_outliers=50)
    smoothed, _ = error("smoothquant", x, w, 4)
    flattened, wide = error("flattenquant", x, w, 4, max_expansion=1.25)
    assert flattened < 0.3 * smoothed
    assert 1 < float(wide.expansion) <= 1.25


@pytest.mark.parametrize("operand", ["activations", "weights"])
def test_either_operand_can_be_kept_whole(operand):
    x, w = problem(x_outliers=50, w_outliers=50)
    _, wide = error("flattenquant", x, w, 4, **{f"flatten_{operand}": False})
    pieces = {"activations": wide.x_pieces, "weights": wide.w_pieces}
    assert int(pieces.pop(operand).max()) == 1
    assert int(pieces.popitem()[1].max()) > 1


@pytest.mark.parametrize("budget", [1.0, 1.01, 1.05])
def test_the_expansion_is_capped(budget):
    x, w = problem(x_outliers=30, w_outliers=30)
    _, wide = error("flattenquant", x, w, 4, max_expansion=budget)
    assert float(wide.expansion) <= budget


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_stay_within_their_pieces(bits):
    x, w = problem(x_outliers=30, w_outliers=30)
    _, wide = error("flattenquant", x, w, bits)
    limit = 2 ** (bits - 1) - 1
    assert (np.abs(wide.w_codes).max(axis=0) <= limit * np.asarray(wide.w_pieces)).all()
    # No channel has a piece more than its codes need.
    assert (np.abs(wide.w_codes).max(axis=0) > limit * (np.asarray(wide.w_pieces) - 1)).all()


def test_a_dead_channel_does_no_harm():
    x, w = problem()
    x, w = x.at[:, 0].set(0), w.at[:, 1].set(0)
    for method in METHODS:
        value, wide = error(method, x, w, 8)
        assert value < 1e-3 and np.isfinite(wide.multiplier).all()
