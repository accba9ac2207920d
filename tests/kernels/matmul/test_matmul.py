"""The integer matmuls against 64-bit NumPy, bit for bit: one suite that every implementation passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import int4_matmul, int8_matmul, pack_int4

ROWS = [1, 7, 8, 9, 63, 65, 127, 129]
WEIGHTS = [(64, 256), (192, 768), (128, 1024)]  # (N, K)


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


def multiply(packed, x, weight, *rest, **settings):
    """int4_matmul or int8_matmul of unpacked codes."""
    return int4_matmul(x, pack_int4(weight), *rest, **settings) if packed else int8_matmul(x, weight, *rest, **settings)


@pytest.mark.smoke
@pytest.mark.sample(6)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("packed", [False, True])
def test_accumulator_equals_64_bit_numpy(implementation, m, n, k, packed):
    x, weight = codes((m, k), 127, 0), codes((n, k), 7 if packed else 127, 1)
    one = jnp.float32(1)
    result = multiply(packed, x, weight, one, one, out_dtype=jnp.int32, implementation=implementation)
    np.testing.assert_array_equal(result, exact(x, weight))


@pytest.mark.parametrize(("m", "n", "k"), [(8, 1, 512), (9, 200, 768), (63, 33, 256)])
@pytest.mark.parametrize("packed", [False, True])
def test_any_number_of_output_channels(m, n, k, packed):
    x, weight, one = codes((m, k), 127, 0), codes((n, k), 7 if packed else 127, 1), jnp.float32(1)
    np.testing.assert_array_equal(multiply(packed, x, weight, one, one, out_dtype=jnp.int32), exact(x, weight))


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("implementation", "m"),
    [("xla", 40), *(pytest.param("mosaic", m, marks=pytest.mark.gpu) for m in (3, 40, 200))],
    indirect=["implementation"],
)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_scales_and_bias(implementation, m, per_token, per_channel, with_bias, dtype, packed):
    rng = np.random.default_rng(2)
    x, weight = codes((m, 256), 127, 3), codes((192, 256), 7 if packed else 127, 4)
    x_scale = jnp.asarray(rng.uniform(1e-3, 1e-2, m if per_token else ()), jnp.float32)
    w_scale = jnp.asarray(rng.uniform(1e-3, 1e-2, 192 if per_channel else ()), jnp.float32)
    bias = jnp.asarray(rng.normal(0, 3, 192), jnp.float32) if with_bias else None
    result = multiply(packed, x, weight, x_scale, w_scale, bias, out_dtype=dtype, implementation=implementation)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, oracle(x, weight, x_scale, w_scale, bias, dtype))


def test_leading_axes_are_rows(implementation):
    x, weight = codes((2, 3, 128), 127, 7), codes((64, 128), 127, 8)
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (2, 3)), jnp.float32)
    settings = {"out_dtype": jnp.float32, "implementation": implementation}
    result = int8_matmul(x, weight, scale, jnp.float32(1), **settings)
    flat = int8_matmul(x.reshape(6, 128), weight, scale.reshape(6), jnp.float32(1), **settings)
    np.testing.assert_array_equal(result.reshape(6, 64), flat)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("m", [1, 130])
def test_extreme_codes_reach_the_accumulator_bound_without_wrapping(implementation, sign, m):
    k = 2**31 // 127**2 // 128 * 128
    x, weight = jnp.full((m, k), 127, jnp.int8), jnp.full((64, k), sign * 127, jnp.int8)
    one = jnp.float32(1)
    result = int8_matmul(x, weight, one, one, out_dtype=jnp.int32, implementation=implementation)
    assert 127 * 127 * k > 0.99 * 2**31
    np.testing.assert_array_equal(result, np.full((m, 64), sign * 127 * 127 * k))


def test_extreme_4_bit_codes_do_not_wrap(implementation):
    k = 2**31 // (127 * 8 * 16) // 256 * 256  # The kernels hold 16 times the sum.
    x, weight, one = jnp.full((2, k), 127, jnp.int8), jnp.full((64, k), -8, jnp.int8), jnp.float32(1)
    result = int4_matmul(x, pack_int4(weight), one, one, out_dtype=jnp.int32, implementation=implementation)
    np.testing.assert_array_equal(result, np.full((2, 64), -127 * 8 * k))


@pytest.mark.parametrize("per_token", ["batched", "shared", "scalar", "scalar a batch"])
@pytest.mark.parametrize("batched_weight", [False, True])
def test_works_under_jit_and_vmap(implementation, per_token, batched_weight):
    rng = np.random.default_rng(0)
    x, weight = codes((3, 4, 128), 127, 9), codes((3, 64, 128), 127, 10)
    shape = {"batched": (3, 4), "shared": (4,), "scalar": (), "scalar a batch": (3,)}[per_token]
    scale = jnp.asarray(rng.uniform(0.1, 1, shape), jnp.float32)
    axes = (0, 0 if batched_weight else None, 0 if shape and shape[0] == 3 else None)
    weight = weight if batched_weight else weight[0]

    def product(x, weight, scale):
        return int8_matmul(x, weight, scale, jnp.float32(0.5), out_dtype=jnp.float32, implementation=implementation)

    each = [
        product(*(a if axis is None else a[i] for a, axis in zip((x, weight, scale), axes, strict=True)))
        for i in range(3)
    ]
    np.testing.assert_array_equal(jax.jit(jax.vmap(product, axes))(x, weight, scale), np.stack(each))


def test_works_under_nested_vmap():
    x, weight = codes((2, 3, 4, 128), 127, 9), codes((64, 128), 127, 10)
    product = functools.partial(int8_matmul, weight=weight, x_scale=jnp.float32(1), weight_scale=jnp.float32(1))
    np.testing.assert_array_equal(jax.vmap(jax.vmap(product))(x), product(x))


@pytest.mark.parametrize("check_vma", [False, True])
def test_works_inside_shard_map(implementation, check_vma):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x, weight = codes((16, 128), 127, 11), codes((64, 128), 127, 12)
    product = functools.partial(
        int8_matmul, x_scale=jnp.float32(1), weight_scale=jnp.float32(1), implementation=implementation
    )
    sharded = jax.shard_map(
        product, mesh=mesh, in_specs=(spec(), spec("model")), out_specs=spec(None, "model"), check_vma=check_vma
    )
    np.testing.assert_array_equal(jax.jit(sharded)(x, weight), product(x, weight))


def test_differentiating_is_refused():
    x, weight = codes((2, 128), 127, 13), codes((8, 128), 127, 14)
    with pytest.raises(NotImplementedError, match="int8_matmul cannot be differentiated"):
        jax.grad(lambda s: int8_matmul(x, weight, s, jnp.float32(1), out_dtype=jnp.float32).sum())(jnp.float32(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 64), jnp.int8)}, "64 input channels"),
        ({"x": jnp.zeros((2, 128), jnp.uint8)}, "x must be int8, got uint8"),
        ({"bias": jnp.zeros(3)}, "bias"),
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
