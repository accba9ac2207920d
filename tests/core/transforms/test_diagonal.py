import jax.numpy as jnp
import numpy as np

from fqjax.core.transforms.diagonal import Diagonal, smoothing_factors


def test_half_makes_both_ranges_equal():
    x, w = jnp.asarray([1.0, 40.0, 0.1]), jnp.asarray([2.0, 0.5, 3.0])
    s = smoothing_factors(x, w, 0.5)
    np.testing.assert_allclose(x / s, w * s, rtol=1e-6)


def test_the_ends_leave_one_range_flat():
    x, w = jnp.asarray([1.0, 40.0, 0.1]), jnp.asarray([2.0, 0.5, 3.0])
    np.testing.assert_allclose(x / smoothing_factors(x, w, 1.0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(w * smoothing_factors(x, w, 0.0), 1.0, rtol=1e-6)


def test_dead_channels_are_left_alone():
    s = smoothing_factors(jnp.asarray([0.0, 1.0]), jnp.asarray([1.0, 0.0]), 0.5)
    assert s.tolist() == [1.0, 1.0]


def test_smoothing_keeps_the_product():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 8)), rng.normal(size=(3, 8))
    transform = Diagonal(factors=smoothing_factors(jnp.abs(x).max(0), jnp.abs(w).max(0)))
    found = transform.inputs(jnp.asarray(x)) @ transform.weight(jnp.asarray(w)).T
    np.testing.assert_allclose(found, x @ w.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(transform.inverse().weight(transform.weight(jnp.asarray(w))), w, rtol=1e-6)
    np.testing.assert_array_equal(transform.recipe().divisors, transform.factors)
    assert transform.bias(jnp.asarray(w), None) is None
