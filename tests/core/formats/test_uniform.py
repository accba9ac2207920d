import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.channels import PADDING, lay_out
from fqjax.core.codes import NO_CODE
from fqjax.core.formats.uniform import Uniform, UniformGrid
from fqjax.core.layer import relative_square
from fqjax.core.table import Sizes


def weight():
    return jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)), jnp.float32)


def unit_grid(k, pieces=1, bits=8):
    """Codes that stand for themselves."""
    return UniformGrid(scale=jnp.float32(1), pieces=jnp.full(k, pieces, jnp.int32), format=Uniform(bits=bits))


def test_nan_becomes_no_code_and_no_small_error():
    weight = jnp.eye(4).at[1, 2].set(jnp.nan).at[0, 3].set(jnp.inf)
    codes = np.asarray(unit_grid(4).round(weight))
    assert codes[1, 2] == NO_CODE and codes[0, 3] == 127 and (codes == NO_CODE).sum() == 1
    assert np.isnan(relative_square(jnp.asarray([jnp.nan]), jnp.ones(1)))


def codes(limit, shape=(6, 256)):
    return jnp.asarray(np.random.default_rng(0).integers(-limit, limit + 1, shape), jnp.int8)


def test_codes_of_sixteen_pieces_fit_their_type():
    assert unit_grid(1, pieces=16).round(jnp.full((1, 1), 1e9)).tolist() == [[16 * 127]]


def test_a_scale_for_every_output_channel():
    w = weight()
    scale = jnp.abs(w).max(1) / 127
    grid = dataclasses.replace(unit_grid(20), scale=scale, format=Uniform(bits=8, granularity="channel"))
    found = grid.round(w)
    np.testing.assert_allclose(grid.weight(found)(), np.rint(w / scale[:, None]) * scale[:, None], rtol=1e-6)
    assert (np.abs(found).max(axis=1) == 127).all()


def test_codes_are_rounded_half_to_even_and_clipped_by_channel():
    grid = dataclasses.replace(unit_grid(4, bits=4), pieces=jnp.asarray([1, 1, 1, 2], jnp.int32))
    found = grid.round(jnp.asarray([[0.5, 1.5, 9.0, -30.0]]))
    assert found.tolist() == [[0, 2, 7, -14]] and found.dtype == jnp.int16


def test_the_rows_of_a_grid_have_a_finer_scale_where_there_is_room():
    w = weight() * jnp.where(jnp.arange(12) < 6, 1.0, 10.0)[:, None]
    grid = dataclasses.replace(unit_grid(20), scale=jnp.max(jnp.abs(w)) / 127)
    fine, coarse = grid.rows(slice(0, 6), w[:6]), grid.rows(slice(6, 12), w[6:])
    np.testing.assert_allclose(fine.scale, jnp.max(jnp.abs(w[:6])) / 127, rtol=1e-6)
    assert float(coarse.scale) == float(grid.scale)
    each = dataclasses.replace(grid, scale=jnp.arange(1.0, 13.0))
    assert each.rows(slice(6, 8), w[6:8]).scale.tolist() == [7, 8]


def test_a_channel_in_pieces_leaves_room_for_a_finer_scale_too():
    grid = dataclasses.replace(unit_grid(2, pieces=3), scale=jnp.float32(5))
    assert float(grid.rows(slice(0, 1), jnp.asarray([[3 * 127.0, 0]])).scale) == 1


@pytest.mark.parametrize(("bits", "limit", "nbytes"), [(8, 127, 6 * 256 + 4), (4, 7, 6 * 128 + 4)])
def test_codes_come_back_and_bytes_are_those_stored(bits, limit, nbytes):
    q = Uniform(bits=bits).store(codes(limit), jnp.float32(0.5))
    assert q.shape == (6, 256) and q.nbytes == q.format.bytes(6, 256) == nbytes
    assert q.codes.shape == (6, 256 // q.format.codes_per_byte) and q.format.codes_per_byte == 8 // bits
    np.testing.assert_array_equal(q.unpacked(), codes(limit))
    np.testing.assert_array_equal(q.dequantize(), np.asarray(codes(limit)) * 0.5)


def test_a_stored_scale_for_each_output_channel():
    q = Uniform(bits=8, granularity="channel").store(codes(127), jnp.arange(1.0, 7.0))
    np.testing.assert_array_equal(q.dequantize(), np.asarray(codes(127)) * np.arange(1.0, 7.0)[:, None])
    assert q.nbytes == q.format.bytes(6, 256) == 6 * 256 + 6 * 4


def test_it_is_a_pytree():
    q = Uniform(bits=4).store(codes(7), jnp.float32(2))
    doubled = jax.jit(lambda t: jax.tree.map(lambda leaf: leaf * 1, t))(q)
    assert doubled.format == q.format
    np.testing.assert_array_equal(doubled.codes, q.codes)


def test_flattened_codes_come_back_as_a_weight_on_the_original_channels():
    pieces = np.array([1, 3, 2])
    grid = dataclasses.replace(unit_grid(3), pieces=jnp.asarray(pieces, jnp.int32))
    wide = grid.round(jnp.asarray([[100.0, 300, -200], [-5, -381, 254]]))
    channels = lay_out(np.array([2, 1, 2]), pieces, 3, grid.format.multiple)
    packed = grid.pack(wide, channels)
    assert packed.shape == (2, 128) and int(jnp.abs(packed.unpacked()).max()) == 127
    again = packed.weight(jnp.asarray(channels.source), jnp.asarray(channels.x_part))
    np.testing.assert_array_equal(again.codes, wide)
    np.testing.assert_array_equal(again(), grid.weight(wide)())


def test_the_bound_is_of_the_largest_row_for_the_largest_activations():
    q = Uniform(bits=8).store(jnp.asarray([[1, -2] + [0] * 126, [100, -100] + [0] * 126], jnp.int8), jnp.float32(1))
    assert q.bound(127) == 127 * 200 and q.bound(7) == 7 * 200 and q.bound(None) == 0


@pytest.mark.parametrize(("bits", "channels", "width"), [(8, 1, 128), (8, 128, 128), (8, 129, 256), (4, 257, 512)])
def test_widths_are_multiples_of_what_the_matmul_takes(bits, channels, width):
    assert Uniform(bits=bits).padded(channels) == width


def test_bits_per_weight_count_scales_and_padding():
    assert Uniform(bits=8).bits_per_weight(16, 100) == 8 * (16 * 128 + 4) / (16 * 100)
    assert Uniform(bits=4).abstract(Sizes(16, 100, 256)).codes.shape == (16, 128)
    assert PADDING > 16 * 127
