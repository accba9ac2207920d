import jax.numpy as jnp
import numpy as np

from fqjax.core.transforms.equalizing import equalizing_factors


def test_rows_become_alike_by_powers_of_two():
    rng = np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (64, 32)).astype(np.float32)
    weight[:4] *= 50
    factors = np.asarray(equalizing_factors(jnp.asarray(weight), jnp.ones(64, bool)))
    assert (np.exp2(np.round(np.log2(factors))) == factors).all() and (factors[:4] >= 32).all()
    largest = np.abs(weight / factors[:, None]).max(axis=1)
    assert largest.max() / largest.min() < 2.01


def test_rows_that_are_not_free_stay():
    weight = jnp.asarray(np.diag([1.0, 8.0, 1.0, 1.0]), jnp.float32)
    assert equalizing_factors(weight, jnp.asarray([True, False, True, True])).tolist() == [1, 1, 1, 1]


def test_rows_of_zeros_stay():
    assert np.isfinite(equalizing_factors(jnp.zeros((3, 4)), jnp.ones(3, bool))).all()
    weight = jnp.asarray([[0.0, 0.0], [4.0, 1.0], [1.0, 1.0]])
    assert equalizing_factors(weight, jnp.ones(3, bool))[0] == 1
