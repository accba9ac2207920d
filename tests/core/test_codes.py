import jax.numpy as jnp
import numpy as np

from fqjax.core.codes import absmax_scale, qmax, round_to_codes


def test_the_ranges_are_symmetric():
    assert qmax(8) == 127 and qmax(4) == 7


def test_the_largest_value_gets_the_largest_code():
    x = jnp.asarray([[-3.0, 1.0, 0.2]])
    scale = absmax_scale(jnp.max(jnp.abs(x)), 8)
    assert round_to_codes(x, scale, 127).tolist() == [[-127, 42, 8]]


def test_a_scale_is_never_zero():
    assert float(absmax_scale(jnp.float32(0), 4)) == 1.0


def test_rounding_is_half_to_even_and_clips_by_channel():
    x = jnp.asarray([[0.5, 1.5, 9.0, -30.0]])
    assert round_to_codes(x, jnp.float32(1), jnp.asarray([7, 7, 7, 14])).tolist() == [[0, 2, 7, -14]]


def test_codes_are_integers():
    assert round_to_codes(jnp.ones(3), jnp.float32(0.1), 7).dtype == np.int32
