import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import pack_int4, unpack_int4


@pytest.mark.smoke
@settings(max_examples=30, deadline=None)
@given(rows=st.sampled_from([1, 5]), blocks=st.sampled_from([1, 3]), seed=st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing(rows, blocks, seed):
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, 256 * blocks)).astype(np.int8)
    packed = pack_int4(jnp.asarray(codes))
    assert packed.shape == (rows, 128 * blocks) and packed.dtype == jnp.int8
    np.testing.assert_array_equal(unpack_int4(packed), codes)


def test_packing_undoes_unpacking_for_every_byte():
    every = jnp.arange(-128, 128, dtype=jnp.int32).astype(jnp.int8).reshape(1, 256)
    np.testing.assert_array_equal(pack_int4(unpack_int4(every)), every)


def test_low_nibble_is_the_first_half_of_a_block():
    codes = np.zeros((1, 512), np.int8)
    codes[0, 256 + 3], codes[0, 256 + 128 + 3] = 5, -2
    packed = np.asarray(pack_int4(jnp.asarray(codes)))
    assert packed[0, 128 + 3] == np.int8(5 | (-2 << 4))
    assert np.count_nonzero(packed) == 1


def test_leading_axes_are_kept():
    codes = np.random.default_rng(0).integers(-8, 8, (2, 3, 256)).astype(np.int8)
    np.testing.assert_array_equal(unpack_int4(pack_int4(jnp.asarray(codes))), codes)


@pytest.mark.parametrize(("function", "width"), [(pack_int4, 128), (unpack_int4, 64)])
def test_a_width_outside_the_block_is_refused(function, width):
    with pytest.raises(ValueError, match="multiple of"):
        function(jnp.zeros((2, width), jnp.int8))
