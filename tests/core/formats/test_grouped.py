import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.formats.grouped import Grouped, GroupedGrid
from fqjax.core.table import Sizes
from pallas_kernels import decoder_for


def codes(limit, shape=(6, 256)):
    return jnp.asarray(np.random.default_rng(0).integers(-limit, limit + 1, shape), jnp.int8)


def scales(dtype=jnp.int32):
    return jnp.asarray(np.random.default_rng(1).integers(1, 16, (8, 6)), dtype)


@pytest.mark.parametrize("kind", ["integer", "folded"])
def test_a_scale_for_each_group(kind):
    form = Grouped(bits=4, group_size=32, scales=kind, granularity="channel")
    q = form.store(codes(7), jnp.arange(1.0, 7.0), scales())
    assert q.shape == (6, 256) and q.nbytes == 6 * 128 + 6 * 4 + 8 * 6 * 4
    each = np.repeat(np.asarray(scales()).T, 32, axis=1)
    np.testing.assert_array_equal(q.dequantize(), np.asarray(codes(7)) * each * np.arange(1.0, 7.0)[:, None])
    real = Grouped(bits=4, group_size=32).store(codes(7), jnp.float32(2), scales(jnp.float32))
    np.testing.assert_array_equal(real.dequantize(), np.asarray(codes(7)) * each * 2)
    assert q.dtypes() == {"group_scale": "int32"} and real.dtypes() == {"group_scale": "float32"}


def test_operands_say_what_kernels_need():
    folded = Grouped(bits=4, group_size=32, scales="folded").store(codes(7), jnp.float32(1), scales(jnp.int16))
    whole = Grouped(bits=8, group_size=32).store(codes(127), jnp.float32(1), scales(jnp.float32))
    assert folded.operand().decoder == decoder_for(4, group_dtype=jnp.int16, folded=True)
    assert whole.operand().decoder == decoder_for(8, group_dtype=jnp.float32)
    assert whole.operand().group_scale is whole.group_scale and whole.operand().codes is whole.codes


@pytest.mark.parametrize("size", [0, -32, 48, 256])
def test_groups_that_do_not_divide_the_largest_are_refused(size):
    with pytest.raises(ValueError, match=f"group_size {size}: expected a divisor of 128"):
        Grouped(bits=4, group_size=size)


def test_codes_of_eight_bits_leave_no_room_for_folded_scales():
    with pytest.raises(ValueError, match="codes of 8 bits times folded scales do not fit into int8; expected 4 bits"):
        Grouped(bits=8, scales="folded")


@pytest.mark.parametrize(("kind", "dtype"), [("float", "int16"), ("integer", "float32"), ("folded", "int8")])
def test_scales_of_another_kind_than_the_formats_are_refused(kind, dtype):
    with pytest.raises(ValueError, match=f"group_scale is {dtype}; expected"):
        Grouped(bits=4, scales=kind).abstract(Sizes(8, 128, 256), {"group_scale": dtype})


@pytest.mark.parametrize(("bits", "low"), [(4, -8), (8, -127)])
def test_codes_of_four_bits_use_the_lowest_too(bits, low):
    grid = GroupedGrid(scale=jnp.float32(1), group_scale=jnp.ones((2, 1)), format=Grouped(bits=bits))
    found = grid.round(jnp.asarray([[-1e9, 1e9, 0.5, 1.5]]))
    assert found.tolist() == [[low, 2 ** (bits - 1) - 1, 0, 2]] and grid.code_range == (low, 2 ** (bits - 1) - 1)


def test_rows_of_a_grid_take_their_scales_along():
    grid = GroupedGrid(scale=jnp.arange(1.0, 7.0), group_scale=scales(), format=Grouped(bits=4, group_size=32))
    part = grid.rows(slice(2, 4), codes(7)[2:4].astype(jnp.float32))
    assert part.scale.tolist() == [3, 4]
    np.testing.assert_array_equal(part.steps(256), grid.steps(256)[2:4])
