"""Integer matmuls against 64-bit NumPy, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import int4_matmul, int8_matmul, pack_int4

SHAPES = [(1, 128, 256), (7, 64, 256), (8, 1, 512), (9, 200, 768), (63, 33, 256), (129, 96, 1024)]


def codes(shape, limit, seed):
    return jnp.asarray(np.random.default_rng(seed).integers(-limit, limit + 1, shape).astype(np.int8))


def exact(x, weight):
    return np.asarray(x, np.int64) @ np.asarray(weight, np.int64).T


def oracle(x, weight, x_scale, weight_scale, bias, dtype):
    """The definition: exact integers, then one float32 product, one sum, one cast."""
    acc = exact(x, weight)
    assert np.abs(acc).max() < 2**31
    scale = np.asarray(x_scale, np.float32)
    scale = (scale[..., None] if scale.ndim else scale) * np.asarray(weight_scale, np.float32)
    y = jnp.asarray(acc.astype(np.int32)).astype(jnp.float32) * scale
    return (y if bias is None else y + bias).astype(dtype)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_accumulator_equals_64_bit_numpy(m, n, k, packed):
    x, weight = codes((m, k), 127, 0), codes((n, k), 7 if packed else 127, 1)
    one = jnp.float32(1)
    if packed:
        result = int4_matmul(x, pack_int4(weight), one, one, out_dtype=jnp.int32)
    else:
        result = int8_matmul(x, weight, one, one, out_dtype=jnp.int32)
    np.testing.assert_array_equal(result, exact(x, weight))


@pytest.mark.parametrize("x_shape", [(), (9,)])
@pytest.mark.parametrize("w_shape", [(), (40,)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_scales_are_applied_once(x_shape, w_shape, dtype):
    rng = np.random.default_rng(2)
    x, weight = codes((9, 256), 127, 3), codes((40, 256), 127, 4)
    x_scale = jnp.asarray(rng.uniform(1e-3, 1e-2, x_shape), jnp.float32)
    w_scale = jnp.asarray(rng.uniform(1e-3, 1e-2, w_shape), jnp.float32)
    result = int8_matmul(x, weight, x_scale, w_scale, out_dtype=dtype)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, oracle(x, weight, x_scale, w_scale, None, dtype))


def test_bias_is_added_in_float32():
    x, weight, bias = codes((5, 128), 127, 5), codes((16, 128), 127, 6), np.linspace(-3, 3, 16, dtype=np.float32)
    scale = jnp.float32(2.0**-10)  # A power of two: fusing the product and the sum changes nothing.
    result = int8_matmul(x, weight, scale, jnp.float32(1), jnp.asarray(bias), out_dtype=jnp.float32)
    np.testing.assert_array_equal(result, oracle(x, weight, scale, 1, bias, jnp.float32))


def test_leading_axes_are_rows():
    x, weight = codes((2, 3, 128), 127, 7), codes((8, 128), 127, 8)
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (2, 3)), jnp.float32)
    result = int8_matmul(x, weight, scale, jnp.float32(1), out_dtype=jnp.float32)
    flat = int8_matmul(x.reshape(6, 128), weight, scale.reshape(6), jnp.float32(1), out_dtype=jnp.float32)
    np.testing.assert_array_equal(result.reshape(6, 8), flat)


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_codes_reach_the_accumulator_bound_without_wrapping(sign):
    k = 2**31 // 127**2 // 128 * 128
    x, weight = jnp.full((1, k), 127, jnp.int8), jnp.full((2, k), sign * 127, jnp.int8)
    result = int8_matmul(x, weight, jnp.float32(1), jnp.float32(1), out_dtype=jnp.int32)
    assert result.tolist() == [[sign * 127 * 127 * k] * 2] and 127 * 127 * k > 0.99 * 2**31


def test_works_under_jit_and_vmap():
    x, weight = codes((3, 4, 128), 127, 9), codes((8, 128), 127, 10)

    def product(rows):
        return int8_matmul(rows, weight, jnp.float32(1), jnp.float32(1), out_dtype=jnp.int32)

    np.testing.assert_array_equal(jax.jit(jax.vmap(product))(x), product(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 64), jnp.int8)}, "64 input channels"),
        ({"x_scale": jnp.ones(3)}, "x_scale"),
        ({"weight_scale": jnp.ones(3)}, "weight_scale"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    good = {"x": jnp.zeros((2, 128), jnp.int8), "weight": jnp.zeros((8, 128), jnp.int8)}
    good |= {"x_scale": jnp.float32(1), "weight_scale": jnp.float32(1)}
    with pytest.raises(ValueError, match=message):
        int8_matmul(**(good | change))


def test_an_unknown_implementation_is_refused():
    x = jnp.zeros((2, 128), jnp.int8)
    with pytest.raises(NotImplementedError, match="cutlass"):
        int8_matmul(x, x, jnp.float32(1), jnp.float32(1), implementation="cutlass")
