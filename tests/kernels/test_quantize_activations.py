import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat, quantize_activations, quantize_normalized, quantize_per_token
from pallas_kernels.hopper import norm


def oracle(x, multiplier, source, part, qmax):
    c = np.rint(np.asarray(x, np.float32) * multiplier)
    e = c[..., source]
    extra = np.sign(e) * np.clip(np.abs(e) - part * np.float32(qmax), 0, qmax)
    return np.concatenate([np.clip(c, -qmax, qmax), extra], axis=-1).astype(np.int8)


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


def recipe(k, extra, offset, seed=0):
    """multiplier, source, part, offset or None: a third of the channels is large."""
    rng = np.random.default_rng(seed)
    multiplier = rng.uniform(20, 60, k).astype(np.float32)
    source = rng.integers(0, k, extra).astype(np.int32)
    multiplier[source] *= 8
    part = rng.choice([1, 2, 3, 1 << 20], extra).astype(np.int32)
    shift = rng.normal(0, 20, k).astype(np.float32)
    return *map(jnp.asarray, (multiplier, source, part)), jnp.asarray(shift) if offset else None


def close_to_the_oracle(result, x, multiplier, source, part, offset, *, center, qmax, epsilon=1e-5):
    """Equal, but for values that are within float32's rounding of a half."""
    wide = np.asarray(x, np.float64)
    wide = wide - wide.mean(-1, keepdims=True) if center else wide
    y = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon) * multiplier + (0 if offset is None else offset)
    y = y.reshape(-1, y.shape[-1])
    unsure = np.abs(np.abs(y - np.trunc(y)) - 0.5) < 1e-5 * np.maximum(np.abs(y), 1)
    unsure = np.concatenate([unsure, unsure[:, source]], axis=-1)
    wanted = oracle(y, np.float32(1), source, part, qmax)
    result = np.asarray(result).reshape(wanted.shape)
    assert unsure.mean() < 0.01
    np.testing.assert_array_equal(np.where(unsure, 0, result), np.where(unsure, 0, wanted))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("rows", "k", "extra", "qmax"),
    [(1, 1024, 0, 127), (7, 1024, 128, 127), (600, 4096, 512, 127), (700, 8192, 896, 7), (3, 7168, 384, 7)],
)
def test_normalized_rows(implementation, center, dtype, rows, k, extra, qmax):
    x = jnp.asarray(np.random.default_rng(1).normal(0.5, 3, (rows, k)), dtype)
    multiplier, source, part, offset = recipe(k, extra, center)
    quantize = jax.jit(
        lambda x, m, s, p, o: quantize_normalized(
            x, m, s, p, offset=o, center=center, qmax=qmax, epsilon=1e-5, implementation=implementation
        )
    )
    result = quantize(x, multiplier, source, part, offset)
    close_to_the_oracle(result, x, multiplier, source, part, offset, center=center, qmax=qmax)


@pytest.mark.skipif(compat.version < (0, 11), reason="Mosaic GPU's interpreter needs jax 0.11")
@pytest.mark.parametrize(("center", "extra"), [(False, 128), (True, 256), (False, 0)])
def test_normalized_rows_in_interpret_mode(center, extra):
    kinds = {"center": center, "offset": center, "epsilon": 1e-5, "qmax": 127, "dtype": jnp.dtype("bfloat16")}
    p = norm.Problem(rows=5, k=1024, extra=extra, **kinds)
    x = jnp.asarray(np.random.default_rng(1).normal(0.5, 3, (5, 1024)), jnp.bfloat16)
    multiplier, source, part, offset = recipe(1024, extra, center)
    given = [multiplier] + [offset] * center + [source, part] * bool(extra)
    result = norm.build(p, multiprocessors=1, interpret=compat.interpret_params())(x, *given)
    close_to_the_oracle(result, x, multiplier, source, part, offset, center=center, qmax=127)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("k", "extra"), [(1024, 128), (8192, 0)])
def test_the_norm_lowers_for_cuda(dtype, k, extra):
    kinds = {"center": True, "offset": True, "epsilon": 1e-5, "qmax": 127, "dtype": jnp.dtype(dtype)}
    f = jax.jit(norm.build(norm.Problem(rows=5, k=k, extra=extra, **kinds)))
    multiplier, source, part, offset = recipe(k, extra, True)
    given = [multiplier, offset] + [source, part] * bool(extra)
    text = f.trace(jnp.zeros((5, k), dtype), *given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1


@pytest.mark.parametrize("change", [{"k": 1000}, {"k": 16384}, {"extra": 100}, {"dtype": jnp.dtype("float64")}])
def test_what_the_norm_cannot_take_is_said(change):
    kinds = {"center": False, "offset": False, "epsilon": 1e-5, "qmax": 127, "dtype": jnp.dtype("bfloat16")}
    assert norm.cannot_use(norm.Problem(rows=5, k=1024, extra=128, **kinds)) is None
    reason = norm.cannot_use(norm.Problem(**{"rows": 5, "k": 1024, "extra": 128} | kinds | change))
    assert str(next(iter(change.values()))) in reason


def test_normalized_rows_under_transformations():
    x = jnp.asarray(np.random.default_rng(1).normal(0, 3, (4, 3, 64)), jnp.float32)
    multiplier, source, part, _ = recipe(64, 8, False)
    quantize = lambda x, m: quantize_normalized(x, m, source, part, qmax=127, epsilon=1e-5)  # noqa: E731
    plain = quantize(x, multiplier)
    np.testing.assert_array_equal(jax.vmap(quantize, (0, None))(x, multiplier), plain)
    several = jax.vmap(quantize)(x, jnp.stack([multiplier * (i + 1) for i in range(4)]))
    np.testing.assert_array_equal(several[2], quantize(x[2], multiplier * 3))
    with pytest.raises(NotImplementedError, match="quantize_normalized cannot be differentiated"):
        jax.grad(lambda x: quantize(x, multiplier).astype(jnp.float32).sum())(x)
    with pytest.raises(ValueError, match="offset must be"):
        quantize_normalized(x, multiplier, source, part, qmax=127, epsilon=1e-5, offset=jnp.zeros(3))
    with pytest.raises(NotImplementedError, match="is not one of"):
        quantize_normalized(x, multiplier, source, part, qmax=127, epsilon=1e-5, implementation="triton")
