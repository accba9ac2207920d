import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.qtensor import InputQuantizer, QFormat, QTensor


def codes(limit, shape=(6, 256)):
    return jnp.asarray(np.random.default_rng(0).integers(-limit, limit + 1, shape), jnp.int8)


@pytest.mark.parametrize(("bits", "limit", "nbytes"), [(8, 127, 6 * 256 + 4), (4, 7, 6 * 128 + 4)])
def test_codes_come_back_and_bytes_are_those_stored(bits, limit, nbytes):
    q = QTensor.from_codes(codes(limit), jnp.float32(0.5), bits)
    assert q.shape == (6, 256) and q.nbytes == nbytes and q.format.packed == (bits == 4)
    np.testing.assert_array_equal(q.unpacked(), codes(limit))
    np.testing.assert_array_equal(q.dequantize(), np.asarray(codes(limit)) * 0.5)


def test_a_scale_for_each_output_channel():
    q = QTensor.from_codes(codes(127), jnp.arange(1.0, 7.0), 8)
    assert q.format.granularity == "channel"
    np.testing.assert_array_equal(q.dequantize(), np.asarray(codes(127)) * np.arange(1.0, 7.0)[:, None])


@pytest.mark.parametrize("folded", [False, True])
def test_a_scale_for_each_group(folded):
    scales = jnp.asarray(np.random.default_rng(1).integers(1, 16, (8, 6)), jnp.int32)
    q = QTensor.from_codes(codes(7), jnp.arange(1.0, 7.0), 4, scales, folded=folded)
    assert (q.format.granularity, q.format.group_size, q.format.integer_scales) == ("group", 32, True)
    assert q.format.folded == folded and q.nbytes == 6 * 128 + 6 * 4 + 8 * 6 * 4
    each = np.repeat(np.asarray(scales).T, 32, axis=1)
    np.testing.assert_array_equal(q.dequantize(), np.asarray(codes(7)) * each * np.arange(1.0, 7.0)[:, None])
    real = QTensor.from_codes(codes(7), jnp.float32(2), 4, scales.astype(jnp.float32))
    assert not real.format.integer_scales
    np.testing.assert_array_equal(real.dequantize(), np.asarray(codes(7)) * each * 2)


def test_it_is_a_pytree():
    q = QTensor.from_codes(codes(7), jnp.float32(2), 4)
    doubled = jax.jit(lambda t: jax.tree.map(lambda leaf: leaf * 1, t))(q)
    assert doubled.format == q.format
    np.testing.assert_array_equal(doubled.codes, q.codes)


@pytest.mark.parametrize(
    "bad",
    [
        {"bits": 3},
        {"bits": 8, "packed": True},
        {"bits": 8, "granularity": "row"},
        {"bits": 8, "granularity": "group"},
        {"bits": 8, "granularity": "group", "group_size": 48},
        {"bits": 8, "group_size": 32},
        {"bits": 8, "integer_scales": True},
        {"bits": 8, "granularity": "group", "group_size": 32, "folded": True},
    ],
)
def test_formats_that_do_not_exist_are_refused(bad):
    with pytest.raises(ValueError, match="QFormat"):
        QFormat(**bad)


def test_the_input_quantizer_flattens_and_counts_channels_before_padding():
    quantizer = InputQuantizer(
        multiplier=jnp.ones(4),
        source=jnp.asarray([1, 1, 0, 0], jnp.int32),
        part=jnp.asarray([1, 2, 1 << 20, 1 << 20], jnp.int32),
        scale=jnp.float32(1),
        bits=4,
        used=2,
    )
    result, scale = quantizer(jnp.asarray([[1.0, 17.0, -9.0, 3.0]]))
    assert result.tolist() == [[1, 7, -7, 3, 7, 3, 0, 0]] and float(scale) == 1
    assert quantizer.width == 8 and quantizer.expansion == 1.5


def test_tokens_can_have_scales_of_their_own():
    none = jnp.zeros(4, jnp.int32)
    quantizer = InputQuantizer(jnp.ones(4), none, none, None, bits=8, used=0)
    result, scale = quantizer(jnp.asarray([[1.0, -2, 0, 0], [0.1, 0.2, 0, 0]]))
    assert result.shape == (2, 8) and scale.shape == (2,)
    assert np.abs(np.asarray(result, int)).max(axis=1).tolist() == [127, 127]
