import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.codes import absmax_scale, qmax, steps


def test_the_ranges_are_symmetric():
    assert qmax(8) == 127 and qmax(4) == 7


def test_the_largest_value_gets_the_largest_code():
    x = jnp.asarray([[-3.0, 1.0, 0.2]])
    assert jnp.round(x / absmax_scale(jnp.max(jnp.abs(x)), 8)).tolist() == [[-127, 42, 8]]


def test_a_scale_is_never_zero():
    assert float(absmax_scale(jnp.float32(0), 4)) == 1.0


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_every_code_has_its_step(channel, dtype):
    scale = jnp.asarray([0.5, 2.0]) if channel else jnp.float32(0.5)
    each = np.asarray(scale)[:, None] if channel else 0.5
    np.testing.assert_array_equal(jnp.ones((2, 6)) * steps(scale, None, 0), np.ones((2, 6)) * each)
    groups = jnp.asarray([[1, 2], [3, 4], [5, 6]], dtype)
    wanted = np.asarray([[1, 1, 3, 3, 5, 5], [2, 2, 4, 4, 6, 6]]) * each
    np.testing.assert_array_equal(steps(scale, groups, 2), wanted)
