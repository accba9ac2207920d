"""The grouped integer matmuls against 64-bit NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_int4_matmul, grouped_int8_matmul, pack_int4, weight_only_int4_matmul
from tests.kernels.matmul.test_matmul import ROWS, codes


def exact(x, weight, scales):
    """Sum over groups of the scaled products, and the largest magnitude of any partial sum."""
    groups = len(scales)
    x, weight = np.asarray(x, np.int64), np.asarray(weight, np.int64)
    parts = np.einsum("mgk,ngk->gmn", *(a.reshape(len(a), groups, -1) for a in (x, weight)))
    sums = np.cumsum(parts * np.asarray(scales, np.int64)[:, None], axis=0)
    return sums[-1], np.abs(sums).max()


def multiply(packed, x, weight, *rest, **settings):
    f, w = (grouped_int4_matmul, pack_int4(weight)) if packed else (grouped_int8_matmul, weight)
    return f(x, w, *rest, **settings)


@pytest.mark.smoke
@pytest.mark.sample(4)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_integer_scales_equal_64_bit_numpy(m, size, packed):
    x, weight = codes((m, 768), 127, 0), codes((192, 768), 7 if packed else 127, 1)
    scales = jnp.asarray(np.random.default_rng(2).integers(1, 40, (768 // size, 192)), jnp.int32)
    wanted, largest = exact(x, weight, scales)
    assert largest < 2**31
    result = multiply(packed, x, weight, jnp.float32(1), scales, out_dtype=jnp.int32)
    np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("m", [1, 40, 200])
def test_99_per_cent_of_the_overflow_bound(implementation, m):
    """The worst activations there are, every group's scale as large as the bound on 16 times the sum allows."""
    weight = jnp.where(codes((256, 2048), 1, 0) > 0, 7, -8).astype(jnp.int8)
    sums = np.abs(np.asarray(weight, np.int64)).sum(1)
    scales = jnp.full((16, 256), 0.995 * 2**31 / (16 * 127 * sums.max()), jnp.int32)
    x = jnp.tile((127 * jnp.sign(weight[sums.argmax()])).astype(jnp.int8), (m, 1))
    wanted, largest = exact(x, weight, scales)
    assert 0.98 * 2**31 < 16 * largest < 2**31
    settings = {"out_dtype": jnp.int32, "implementation": implementation}
    np.testing.assert_array_equal(multiply(True, x, weight, jnp.float32(1), scales, **settings), wanted)


@pytest.mark.sample(4)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", [jnp.int16, jnp.int32])
@pytest.mark.parametrize("folded", [False, True])
def test_every_implementation_adds_up_groups_exactly(implementation, m, dtype, folded):
    x, weight = codes((m, 768), 127, 0), codes((192, 768), 8, 1).clip(max=7)
    scales = jnp.asarray(np.random.default_rng(2).integers(1, 16 if folded else 600, (6, 192)), dtype)
    wanted, largest = exact(x, weight, scales)
    assert 16 * largest < 2**31
    settings = {"out_dtype": jnp.int32, "folded": folded, "implementation": implementation}
    np.testing.assert_array_equal(multiply(True, x, weight, jnp.float32(1), scales, **settings), wanted)


def test_extreme_codes_are_folded_exactly(implementation):
    """-8 times 15 and 7 times 15, at the largest K that fits."""
    k = 2**31 // (127 * 120) // 256 * 256
    weight = jnp.where(jnp.arange(64)[:, None] % 2, 7, -8) * jnp.ones((64, k), jnp.int8)
    scales = jnp.full((k // 128, 64), 15, jnp.int32)
    settings = {"out_dtype": jnp.int32, "folded": True, "implementation": implementation}
    result = multiply(
        True, jnp.full((130, k), 127, jnp.int8), weight.astype(jnp.int8), jnp.float32(1), scales, **settings
    )
    np.testing.assert_array_equal(result[7], np.where(np.arange(64) % 2, 7, -8) * 15 * 127 * k)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scales_and_bias_of_the_integer_sum(per_token, per_channel, with_bias):
    rng = np.random.default_rng(2)
    x, weight = codes((3, 5, 256), 127, 3), codes((64, 256), 7, 4)
    scales = jnp.asarray(rng.integers(1, 16, (2, 64)), jnp.int32)
    x_scale = jnp.asarray(rng.uniform(1e-3, 1e-2, (3, 5) if per_token else ()), jnp.float32)
    unit = jnp.asarray(rng.uniform(1e-3, 1e-2, 64 if per_channel else ()), jnp.float32)
    bias = jnp.asarray(rng.normal(0, 3, 64), jnp.float32) if with_bias else None
    result = grouped_int4_matmul(x, pack_int4(weight), x_scale, scales, unit, bias, out_dtype=jnp.float32)
    acc, _ = exact(x.reshape(15, 256), weight, scales)
    factor = (x_scale[..., None] if per_token else x_scale) * unit
    wanted = jnp.asarray(acc.reshape(3, 5, 64), jnp.int32).astype(jnp.float32) * factor
    np.testing.assert_array_equal(result, wanted if bias is None else wanted + bias)


@pytest.mark.parametrize("packed", [False, True])
def test_float_scales_are_close_to_64_bit_floats(packed):
    x, weight = codes((9, 512), 127, 3), codes((64, 512), 7 if packed else 127, 4)
    scales = jnp.asarray(np.random.default_rng(0).uniform(0.01, 0.1, (4, 64)), jnp.float32)
    parts = np.einsum("mgk,ngk->gmn", *(np.asarray(a, np.float64).reshape(len(a), 4, -1) for a in (x, weight)))
    wanted = 0.25 * np.sum(parts * np.asarray(scales, np.float64)[:, None], axis=0)
    result = multiply(packed, x, weight, jnp.float32(0.25), scales, out_dtype=jnp.float32)
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_large_amplifier_converges_to_the_float_scales():
    x, weight = codes((9, 256), 127, 3), codes((64, 256), 7, 4)
    scales = jnp.asarray(np.random.default_rng(0).uniform(0.01, 0.1, (2, 64)), jnp.float32)
    amplified = jnp.round(scales * 2**16).astype(jnp.int32)
    by_float = multiply(True, x, weight, jnp.float32(1), scales, out_dtype=jnp.float32)
    by_integer = multiply(True, x, weight, jnp.float32(1), amplified, 2.0**-16, out_dtype=jnp.float32)
    np.testing.assert_allclose(by_integer, by_float, rtol=1e-3, atol=1e-4 * float(jnp.abs(by_float).max()))


def test_jit_and_vmap():
    x, weight = codes((4, 9, 256), 127, 3), codes((64, 256), 7, 4)
    scales = jnp.asarray(np.random.default_rng(0).integers(1, 16, (2, 64)), jnp.int32)
    f = lambda x: grouped_int4_matmul(x, pack_int4(weight), jnp.float32(0.1), scales)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(x), f(x))


@pytest.mark.parametrize(
    ("scales", "complaint"),
    [
        (jnp.ones((3, 64), jnp.int32), "groups a divisor of 256"),
        (jnp.ones((2, 63), jnp.int32), "group_scale must be"),
        (jnp.ones(64, jnp.int32), "group_scale must be"),
        (jnp.ones((2, 64), jnp.uint8), "int32 or float32"),
    ],
)
def test_scales_that_do_not_fit(scales, complaint):
    with pytest.raises(ValueError, match=complaint):
        grouped_int8_matmul(codes((4, 256), 127, 0), codes((64, 256), 127, 1), jnp.float32(1), scales)


def test_what_is_not_there_is_refused():
    operands = codes((4, 256), 127, 0), codes((64, 256), 127, 1), jnp.float32(1), jnp.ones((2, 64), jnp.int32)
    with pytest.raises(NotImplementedError, match="'mosaic' cannot take x"):
        grouped_int8_matmul(*operands, implementation="mosaic")
    with pytest.raises(ValueError, match="only integer scales can be folded"):
        grouped_int8_matmul(*operands[:3], operands[3].astype(jnp.float32), folded=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated"):
        jax.grad(lambda scale: grouped_int8_matmul(*operands[:2], scale, operands[3]).sum().astype(float))(1.0)


@pytest.mark.smoke
@pytest.mark.sample(4)
@pytest.mark.parametrize("m", [1, 9, 65, 130])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_weight_only_is_close_to_64_bit_floats(implementation, m, dtype, with_bias):
    if implementation == "mosaic" and dtype != jnp.bfloat16:
        pytest.skip("the kernel takes bfloat16 alone")
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=(m, 768)), dtype), codes((192, 768), 8, 4).clip(max=7)
    scales = jnp.asarray(rng.uniform(0.01, 0.1, (6, 192)), jnp.float32)
    unit, bias = jnp.asarray(rng.uniform(1, 2, 192), jnp.float32), jnp.asarray(rng.normal(size=192), jnp.float32)
    real = np.asarray(weight, np.float64) * np.repeat(np.asarray(scales, np.float64).T, 128, axis=1)
    wanted = np.asarray(x, np.float64) @ real.T * np.asarray(unit) + (np.asarray(bias) if with_bias else 0)
    settings = {"out_dtype": jnp.float32, "implementation": implementation}
    result = weight_only_int4_matmul(x, pack_int4(weight), scales, unit, bias if with_bias else None, **settings)
    error = np.linalg.norm(result - wanted) / np.linalg.norm(wanted)
    assert error < (2e-3 if dtype == jnp.bfloat16 and implementation == "xla" else 1e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": jnp.ones((2, 256), jnp.int8)}, "x must have a floating dtype"),
        ({"group_scale": jnp.ones((2, 64), jnp.int32)}, "group_scale must be float32"),
        ({"out_dtype": jnp.int32}, "out_dtype must be a floating dtype"),
    ],
)
def test_weight_only_operands_that_do_not_fit(change, complaint):
    good = {"x": jnp.ones((2, 256)), "packed": jnp.ones((64, 128), jnp.int8), "group_scale": jnp.ones((2, 64))}
    with pytest.raises(ValueError, match=complaint):
        weight_only_int4_matmul(**(good | change))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_weight_only_has_the_gradient_of_the_dequantized_product(implementation, dtype):
    if implementation == "mosaic" and dtype != jnp.bfloat16:
        pytest.skip("the kernel takes bfloat16 alone")
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=(3, 256)), dtype), codes((64, 256), 8, 4).clip(max=7)
    scales, bias = jnp.asarray(rng.uniform(0.5, 1, (2, 64)), jnp.float32), jnp.ones(64, jnp.float32)
    seen = jnp.asarray(
        rng.normal(size=(3, 64)), jnp.float32
    )  # Of the outputs, as if the loss were their product with it.

    def loss(x, scales, bias):
        settings = {"out_dtype": jnp.float32, "implementation": implementation}
        return jnp.vdot(weight_only_int4_matmul(x, pack_int4(weight), scales, bias=bias, **settings), seen)

    of_x, of_scales, of_bias = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, scales, bias)
    each = np.asarray(weight, np.float64)
    real = each * np.repeat(np.asarray(scales, np.float64).T, 128, axis=1)
    wanted = np.einsum("mn,nk,mk->kn", np.asarray(seen), each, np.asarray(x, np.float64)).reshape(2, 128, 64).sum(1)
    tolerance = {"rtol": 2e-2, "atol": 0.3} if dtype == jnp.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    np.testing.assert_allclose(np.asarray(of_x, np.float64), np.asarray(seen) @ real, **tolerance)
    np.testing.assert_allclose(of_scales, wanted, **tolerance)
    np.testing.assert_allclose(of_bias, seen.sum(0), rtol=1e-5)
    assert of_x.dtype == dtype
