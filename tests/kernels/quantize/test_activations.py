import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantize_activations, quantize_per_token


def oracle(x, multiplier, source, part, qmax):
    c = np.rint(np.asarray(x, np.float32) * multiplier)
    e = c[..., source]
    extra = np.sign(e) * np.clip(np.abs(e) - part * np.float32(qmax), 0, qmax)
    return np.concatenate([np.clip(c, -qmax, qmax), extra], axis=-1).astype(np.int8)


@pytest.mark.smoke
@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 9]),
    k=st.sampled_from([8, 130]),
    extra=st.sampled_from([0, 1, 40]),
    qmax=st.sampled_from([7, 127]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_numpy(rows, k, extra, qmax, dtype, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(0, 3, (rows, k)), dtype)
    multiplier = rng.uniform(0.1, 40, k).astype(np.float32)
    source = rng.integers(0, k, extra).astype(np.int32)
    part = rng.choice([0, 1, 2, 1 << 20], extra).astype(np.int32)
    result = quantize_activations(x, jnp.asarray(multiplier), jnp.asarray(source), jnp.asarray(part), qmax=qmax)
    np.testing.assert_array_equal(result, oracle(x, multiplier, source, part, qmax))


def test_rounds_half_to_even():
    x = jnp.asarray([[0.5, 1.5, 2.5, -0.5, -1.5]], jnp.float32)
    none = jnp.zeros(0, jnp.int32)
    result = quantize_activations(x, jnp.ones(5), none, none, qmax=127)
    assert result.tolist() == [[0, 2, 2, 0, -2]]


@pytest.mark.parametrize("value", [1e30, np.inf, -np.inf])
def test_values_beyond_the_codes_saturate(value):
    x = jnp.full((1, 4), value, jnp.float32)
    source, part = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
    result = quantize_activations(x, jnp.ones(4), source, part, qmax=127)
    assert (np.abs(np.asarray(result, int)) == 127).all() and (np.sign(result) == np.sign(value)).all()


def test_per_token_codes_use_the_whole_range():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (6, 100)), jnp.float32)
    multiplier = jnp.linspace(0.5, 2, 100)
    codes, scale = quantize_per_token(x, multiplier, qmax=127, width=128)
    assert codes.shape == (6, 128) and scale.shape == (6,)
    assert (np.abs(np.asarray(codes, int)).max(axis=1) == 127).all() and not np.asarray(codes)[:, 100:].any()
    np.testing.assert_allclose(codes[:, :100] * scale[:, None], x * multiplier, atol=float(scale.max()) / 2 * 1.001)


def test_a_row_of_zeros_stays_zero():
    codes, scale = quantize_per_token(jnp.zeros((2, 128)), jnp.ones(128), qmax=127, width=128)
    assert not np.asarray(codes).any() and np.isfinite(scale).all()


def test_shapes_that_do_not_fit_are_refused():
    none = jnp.zeros(0, jnp.int32)
    with pytest.raises(ValueError, match="multiplier"):
        quantize_activations(jnp.zeros((2, 8)), jnp.ones(7), none, none, qmax=127)
    with pytest.raises(ValueError, match="width"):
        quantize_per_token(jnp.zeros((2, 8)), jnp.ones(8), qmax=127, width=4)
