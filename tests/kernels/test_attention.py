"""Decoding attention: the kernel in interpret mode, and XLA, against NumPy; and machine code for a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.attention import BLOCK, cannot_use, decode_attention, reference, run
from pallas_kernels.dispatch import capability
from tests.kernels import ahead_of_time

CAPACITY = 3 * BLOCK + 5
LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, CAPACITY - 1, CAPACITY)


def operands(codes, heads=4, kv_heads=2, dim=16, lengths=LENGTHS, capacity=CAPACITY, dtype=jnp.bfloat16):
    """Queries and a cache whose positions behind each length hold what must not be read."""
    rng = np.random.default_rng(0)
    shape = (len(lengths), capacity, kv_heads, dim)
    behind = np.arange(capacity) >= np.array(lengths)[:, None]
    scales = ()
    if codes:
        scales = [rng.uniform(0.005, 0.02, shape[:3]).astype(np.float32) for _ in range(2)]
        scales = tuple(jnp.asarray(np.where(behind[..., None], np.nan, s)) for s in scales)
        cache = [jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for _ in range(2)]
    else:
        cache = [rng.normal(size=shape) for _ in range(2)]
        cache = [jnp.asarray(np.where(behind[..., None, None], np.nan, x), dtype) for x in cache]
    q = jnp.asarray(rng.normal(size=(len(lengths), heads, dim)), dtype)
    return q, *cache, jnp.asarray(lengths, jnp.int32), *scales


def expected(q, keys, values, lengths, *scales, scale, window):
    """One query at a time, in float64."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    if scales:
        keys, values = keys * np.asarray(scales[0])[..., None], values * np.asarray(scales[1])[..., None]
    out = np.zeros(q.shape)
    for b, h in np.ndindex(q.shape[:2]):
        length, shared = int(lengths[b]), h // (q.shape[1] // keys.shape[2])
        seen = slice(max(0, length - window) if window else 0, length)
        scores = keys[b, seen, shared] @ q[b, h] * scale
        weights = np.exp(scores - scores.max())
        out[b, h] = weights @ values[b, seen, shared] / weights.sum()
    return out


def finite(arguments):
    """For XLA, which multiplies what it does not see with zero."""
    return [jnp.nan_to_num(x) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arguments]


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, BLOCK, BLOCK + 3, 1000])
@pytest.mark.parametrize("splits", [1, 3, 7])
def test_the_kernel_sees_what_is_filled_and_nothing_else(codes, window, splits):
    arguments, kinds = operands(codes), {"scale": 0.3, "window": window}
    wanted = expected(*arguments, **kinds)
    found = run(*arguments, splits=splits, interpret=True, **kinds)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0.02, atol=0.02)
    by_xla = reference(*finite(arguments), **kinds)
    np.testing.assert_allclose(np.asarray(by_xla, np.float64), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 1), (6, 2), (20, 1)])
def test_heads_in_groups(heads, kv_heads):
    arguments = operands(True, heads, kv_heads, dim=32, lengths=(70, 3), capacity=128)
    found = run(*arguments, scale=0.2, window=None, interpret=True)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected(*arguments, scale=0.2, window=None), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("codes", [False, True])
def test_xla_is_exact_in_float32(codes):
    arguments = operands(codes, dtype=jnp.float32)
    found = decode_attention(*finite(arguments), window=5)
    np.testing.assert_allclose(found, expected(*arguments, scale=0.25, window=5), rtol=1e-5, atol=1e-5)


def test_a_capacity_below_a_block():
    arguments = operands(False, lengths=(1, 7, 9), capacity=9)
    found = run(*arguments, scale=0.25, window=None, interpret=True)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected(*arguments, scale=0.25, window=None), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 80}, "head_dim is 80"),
        ({"dtype": jnp.float32}, "q is float32"),
        ({"heads": 130, "kv_heads": 1}, "130 heads"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change, message):
    assert message in cannot_use(*operands(False, lengths=(1, 2), capacity=8, **change)[:3])
    assert cannot_use(*operands(True, lengths=(1, 2), capacity=8)[:3]) is None


def test_wrong_operands_are_named():
    q, keys, values, lengths, *scales = operands(True)
    for arguments, message in (
        ((q[:, :3], keys, values, lengths, *scales), "do not fit together"),
        ((q, keys, values[:, 1:], lengths, *scales), "need values of that shape"),
        ((q, keys, values, lengths), "int8 codes and scales come together"),
        ((q, keys, values, lengths, scales[0][:, 1:], scales[1]), "key_scales must be"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*arguments)
    if capability() < (8, 0):
        with pytest.raises(NotImplementedError, match="compute capability 8.0"):
            decode_attention(q, keys, values, lengths, *scales, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (8, 8, 64), (16, 1, 256)])
def test_the_compiled_kernel_is_right(codes, window, heads, kv_heads, dim):
    if capability() < (8, 0):
        pytest.skip(attention.NO_GPU)
    arguments = operands(codes, heads, kv_heads, dim, lengths=(1, 64, 700, 2048), capacity=2048)
    found = decode_attention(*arguments, window=window, implementation="triton")
    wanted = expected(*arguments, scale=dim**-0.5, window=window)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not ahead_of_time.HAS_PLUGIN, reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "window"),
    [(1, 32, 8, 128, None), (64, 32, 32, 64, 4096), (8, 16, 1, 256, None)],
)
def test_it_compiles_for_a_hopper_gpu_and_moves_no_cache(codes, batch, heads, kv_heads, dim, window):
    def shaped(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = shaped(batch, 4096, kv_heads, dim, dtype=jnp.int8 if codes else jnp.bfloat16)
    scales = [shaped(batch, 4096, kv_heads, dtype=jnp.float32)] * 2 if codes else []
    q, lengths = shaped(batch, heads, dim, dtype=jnp.bfloat16), shaped(batch, dtype=jnp.int32)

    def f(*arguments):
        return run(*arguments, scale=0.1, window=window)

    compiled = ahead_of_time.compile_for_h200(f, q, cache, cache, lengths, *scales)
    text = compiled.as_text()
    assert "decode_attention" in text
    assert compiled.memory_analysis().temp_size_in_bytes < cache.size * cache.dtype.itemsize
