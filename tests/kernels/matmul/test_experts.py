"""The matmul over experts against 64-bit NumPy, and against the matmul with the weight of each expert alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Weight, decoder_for, expert_matmul, pack_int4, quantize_for_experts
from pallas_kernels.device import hopper_device
from pallas_kernels.matmul.experts import cut, map_tiles, tile_size
from tests.kernels.matmul.test_matmul import codes

SIZES = [[3, 0, 1, 12], [0, 0, 40, 0], [1, 1, 1, 1], [0, 0, 0, 2], [130, 7, 300, 64], [0, 0, 0, 0]]
"""Rows of four experts."""


def exact(x, weight, sizes, scales=None):
    """Every row times the weight of its expert, in 64 bits."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    x, weight = np.asarray(x, np.int64), np.asarray(weight, np.int64)
    if scales is not None:
        weight = weight * np.repeat(np.asarray(scales, np.int64).swapaxes(1, 2), weight.shape[2] // scales.shape[1], 2)
    return np.einsum("mk,mnk->mn", x, weight[owner])


def multiply(x, weight, group_sizes, x_scale, weight_scale, group_scale=None, *, bits, folded=False, **settings):
    """:func:`expert_matmul` with a weight of plain codes."""
    group_dtype = None if group_scale is None else group_scale.dtype
    weight_only = bits == 4 and jnp.issubdtype(x.dtype, jnp.floating)
    decoder = decoder_for(bits, group_dtype=group_dtype, folded=folded, weight_only=weight_only)
    return expert_matmul(x, Weight(decoder, weight, weight_scale, group_scale), group_sizes, x_scale, **settings)


def operands(sizes, largest, k=256, n=96):
    return codes((sum(sizes), k), 127, 0), codes((4, n, k), largest, 1), jnp.asarray(sizes, jnp.int32)


@pytest.mark.smoke
@pytest.mark.sample(2)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_equal_64_bit_numpy(sizes, bits):
    x, weight, counts = operands(sizes, 7 if bits == 4 else 127)
    stored = pack_int4(weight.reshape(-1, 256)).reshape(4, 96, 128) if bits == 4 else weight
    found = jax.jit(lambda x: multiply(x, stored, counts, 1, 1, bits=bits, out_dtype=jnp.int32))(x)
    np.testing.assert_array_equal(found, exact(x, weight, sizes))


@pytest.mark.sample(3)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_scales_equal_64_bit_numpy(sizes, folded, bits):
    if folded and bits == 8:
        pytest.skip("codes of 8 bits times their scales do not fit into int8")
    x, weight, counts = operands(sizes, 7 if bits == 4 else 127)
    stored = pack_int4(weight.reshape(-1, 256)).reshape(4, 96, 128) if bits == 4 else weight
    scales = jnp.asarray(np.random.default_rng(2).integers(1, 16, (4, 2, 96)), jnp.int16)
    found = multiply(x, stored, counts, 1, 1, scales, bits=bits, folded=folded, out_dtype=jnp.int32)
    np.testing.assert_array_equal(found, exact(x, weight, sizes, np.asarray(scales)))


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", ["int8", "int4", "grouped_int8", "grouped_int4", "weight_only_int4"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_row_has_the_bits_of_the_matmul_with_its_expert(kind, per_row, per_channel):
    sizes, rng = [5, 0, 33, 2], np.random.default_rng(3)
    bits = 4 if "int4" in kind else 8
    x, weight, counts = operands(sizes, 7 if bits == 4 else 127)
    x = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16) if kind == "weight_only_int4" else x
    stored = pack_int4(weight.reshape(-1, 256)).reshape(4, 96, 128) if bits == 4 else weight
    positive = lambda *shape: jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)  # noqa: E731
    groups = positive(4, 2, 96) if "grouped" in kind or "only" in kind else None
    x_scale = positive(sum(sizes)) if per_row else jnp.float32(0.3)
    weight_scale = positive(4, 96) if per_channel else positive(4)
    found = multiply(x, stored, counts, x_scale, weight_scale, groups, bits=bits)
    assert found.dtype == jnp.bfloat16
    start, f = 0, getattr(pallas_kernels, f"{kind}_matmul")
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        start += size
        scales = () if kind == "weight_only_int4" else (x_scale[rows] if per_row else x_scale,)
        scales += () if groups is None else (groups[e],)
        np.testing.assert_array_equal(found[rows], f(x[rows], stored[e], *scales, weight_scale[e]))


@pytest.mark.sample(4)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_tiles_hold_every_row_once_and_rows_of_one_expert_each(sizes, size):
    rows, owner = sum(sizes), np.repeat(np.arange(4), sizes)
    if rows:
        tiles = cut(jnp.asarray(sizes, jnp.int32), rows, size)
        assert len(tiles.expert) <= min(4, rows) + rows // size
        np.testing.assert_array_equal(np.asarray(tiles.rows).reshape(-1)[tiles.place], np.arange(rows))
        np.testing.assert_array_equal(np.repeat(tiles.expert, size)[tiles.place], owner)
    found = map_tiles(lambda e, x: x * 10 + e, jnp.asarray(sizes, jnp.int32), jnp.arange(rows)[:, None], size=size)
    np.testing.assert_array_equal(found[:, 0], np.arange(rows) * 10 + owner)


def test_tiles_have_about_as_many_rows_as_an_expert():
    assert [tile_size(rows, 8) for rows in (1, 8, 9, 16, 100, 4096, 1 << 20)] == [1, 1, 2, 2, 16, 256, 256]


def test_every_row_is_quantized_as_its_expert_does():
    rng = np.random.default_rng(4)
    x, multiplier = (
        jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        jnp.asarray(rng.uniform(1, 9, (3, 8)), jnp.float32),
    )
    source, part = jnp.asarray(rng.integers(0, 8, (3, 4)), jnp.int32), jnp.ones((3, 4), jnp.int32)
    expert = jnp.asarray([0, 0, 1, 2, 2, 2])
    found = quantize_for_experts(x, expert, multiplier, source, part, qmax=7)
    for row, e, given in zip(found, expert, x, strict=True):
        wanted = pallas_kernels.quantize_activations(given, multiplier[e], source[e], part[e], qmax=7)
        np.testing.assert_array_equal(row, wanted)
    assert (np.abs(found[:, 8:]) > 0).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((16, 128), jnp.int8)}, "does not fit"),
        ({"weight": jnp.zeros((4, 96, 256))}, "the weight must be int8"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, r"group_sizes must be \(4,\)"),
        ({"x_scale": jnp.ones(4)}, "x_scale must be a scalar or"),
        ({"weight_scale": jnp.ones(96)}, "weight_scale must be a scalar"),
        ({"group_scale": jnp.ones((4, 2, 95))}, "group_scale must be"),
        ({"x": jnp.zeros((16, 256), jnp.bfloat16)}, "x must be int8"),
        ({"group_scale": jnp.ones((4, 2, 96)), "folded": True}, "only integer scales can be folded"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    x, weight, counts = operands([3, 0, 1, 12], 127)
    given = {"x": x, "weight": weight, "group_sizes": counts, "x_scale": 1.0, "weight_scale": 1.0, "bits": 8} | changes
    with pytest.raises(ValueError, match=message):
        multiply(**given)


def test_what_there_is_not_is_refused():
    x, weight, counts = operands([3, 0, 1, 12], 127)
    if hopper_device() is None:
        with pytest.raises(NotImplementedError, match="'mosaic' cannot take .*: it needs an NVIDIA GPU"):
            multiply(x, weight, counts, 1, 1, bits=8, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="cannot be differentiated"):
        jax.grad(lambda s: multiply(x, weight, counts, s, 1, bits=8, out_dtype=jnp.float32).sum())(1.0)
