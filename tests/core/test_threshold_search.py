import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.channels import count_pieces
from fqjax.core.threshold_search import SMOOTHING_EXPONENTS, Found, channel_scales, search
from fqjax.core.transforms.diagonal import smoothing_factors


def problem(x_outliers=20.0, w_outliers=8.0, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(100, 256)), rng.normal(size=(48, 256))
    x[:, :6] *= x_outliers
    w[:, 6:12] *= w_outliers
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


def run(weight, x, budget=1.25, **settings):
    found = search(weight, jnp.abs(x).max(0), x, x_bits=4, w_bits=4, budgets=jnp.asarray([budget]), **settings)
    return Found(*(leaf[0] for leaf in found))


def expansion(found):
    return float(jnp.mean(found.x_pieces * found.w_pieces))


@pytest.mark.parametrize("budget", [1.0, 1.05, 1.5])
def test_the_budget_is_kept(budget):
    weight, x = problem()
    assert expansion(run(weight, x, budget)) <= budget


def test_more_room_never_costs_accuracy():
    weight, x = problem()
    found = search(weight, jnp.abs(x).max(0), x, x_bits=4, w_bits=4, budgets=jnp.asarray([1.0, 1.1, 1.3, 2.0]))
    errors = found.error.tolist()
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_every_exponent_is_tried():
    weight, x = problem()
    best = run(weight, x)
    alone = [run(weight, x, alphas=(alpha,)) for alpha in SMOOTHING_EXPONENTS]
    assert float(best.error) == pytest.approx(min(float(found.error) for found in alone), rel=1e-5)
    assert not np.allclose(best.smoothing, 1)
    np.testing.assert_array_equal(run(weight, x, alphas=None).smoothing, jnp.ones(256))


def test_what_is_not_to_be_flattened_is_cut_off_at_half_of_its_maximum_at_most():
    weight, x = problem()
    found = run(weight, x, flatten_activations=False, flatten_weights=False, alphas=(0.5,))
    smoothing = smoothing_factors(jnp.abs(x).max(0), jnp.abs(weight).max(0), 0.5)
    largest = float((jnp.abs(x).max(0) / smoothing).max())
    assert 0.5 * largest - 1e-5 <= float(found.x_threshold) <= largest * 1.00001
    assert expansion(found) == 1


def test_flattened_channels_keep_all_their_values():
    weight, x = problem()
    found = run(weight, x, budget=2.0, alphas=(0.5,))
    assert expansion(found) > 1
    needed = count_pieces(jnp.abs(x).max(0) / found.smoothing, found.x_threshold, 7)
    assert (found.x_pieces == needed).all() and (found.x_pieces > 1).any()


def test_scales_of_channels_weigh_errors_by_their_inputs():
    weight, x = problem(w_outliers=30.0)
    importance = jnp.mean(x**2, axis=0)
    scale = channel_scales(weight, importance, 4)
    assert scale.shape == (48,) and float((scale / (jnp.abs(weight).max(1) / 7)).max()) <= 1.000001

    def error(scale, importance):
        rounded = jnp.clip(jnp.round(weight / scale[:, None]), -7, 7) * scale[:, None]
        return float(jnp.sum((rounded - weight) ** 2 * importance))

    assert error(scale, importance) <= error(jnp.abs(weight).max(1) / 7, importance)
    ignored = importance.at[6:12].set(0)  # Where the large weights do not matter they may be cut off.
    assert float(jnp.mean(channel_scales(weight, ignored, 4))) < float(jnp.mean(scale))


def test_dead_channels_do_no_harm():
    weight, x = problem()
    found = run(weight.at[:, 1].set(0), x.at[:, 0].set(0))
    assert all(np.isfinite(leaf).all() for leaf in found)
    found = run(jnp.zeros_like(weight), jnp.zeros_like(x))
    assert float(found.x_threshold) > 0 and float(found.w_threshold) > 0
