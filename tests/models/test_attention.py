import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.models import attention
from fqjax.models.attention import attend_in_blocks
from fqjax.models.cache import KeyValueCache, LayerCache
from fqjax.runtime.errors import InputError

LENGTH, CAPACITY = 11, 16


def projections(heads, length=LENGTH):
    rng = np.random.default_rng(heads)
    return [rng.normal(size=(2, length, h, 4)).astype(np.float32) for h in (heads, 2, 2)]


def attend(q, k, v, cache, lengths, **kinds):
    return attention.attend(jnp.concatenate([q, k, v], axis=2), k.shape[2], cache, lengths, **kinds)


def expected(q, k, v, window):
    """One query at a time, over the keys that it sees."""
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
        shared = h // (q.shape[2] // k.shape[2])
        scores = np.exp(k[b, seen, shared] @ q[b, t, h] / 2)
        out[b, t, h] = scores @ v[b, seen, shared] / scores.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 3, LENGTH - 1, 40])
def test_a_query_sees_its_window(window):
    q, k, v = projections(heads=4)
    out, cache = attend(q, k, v, None, None, window=window)
    np.testing.assert_allclose(out, expected(q, k, v, window), rtol=1e-5, atol=1e-6)
    assert cache is None


@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_window_reaches_into_the_cache(window):
    """Sequences of different lengths, padded on the right, taken up in pieces of several tokens and of one."""
    q, k, v = projections(heads=4)
    whole = expected(q, k, v, window)
    step = jax.jit(lambda *args: attend(*args, window=window))
    # What stands in a cache behind a sequence's end may be anything.
    cache = LayerCache(*(np.full((2, CAPACITY, 2, 4), 9, np.float32) for _ in range(2)))
    lengths = np.zeros(2, np.int32)
    for width, counts in ((4, (4, 2)), (4, (3, 4)), (1, (1, 1)), (1, (1, 1)), (1, (1, 1))):
        at = np.minimum(lengths[:, None] + np.arange(width), LENGTH - 1)
        out, cache = step(*(np.take_along_axis(x, at[..., None, None], axis=1) for x in (q, k, v)), cache, lengths)
        for row, count in enumerate(counts):
            first = lengths[row]
            np.testing.assert_allclose(out[row, :count], whole[row, first : first + count], rtol=1e-5, atol=1e-6)
        lengths = lengths + np.array(counts, np.int32)
    assert lengths.tolist() == [10, 9]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_what_cudnn_does_not_take_goes_to_xla(dtype, capability, monkeypatch, caplog):
    """Here it is not installed, or there is no GPU; either way the reason is logged, once."""
    monkeypatch.setattr("fqjax.models.attention.capability", lambda: capability)
    attention.say.cache_clear()
    q, k, v = (jnp.asarray(x, dtype) for x in projections(heads=4))
    with caplog.at_level("INFO", "pallas_kernels"):
        for _ in range(2):
            out = attention.causal_attention(q, k, v, window=3)
    wanted = expected(*(np.asarray(x, np.float32) for x in (q, k, v)), 3)
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=1e-5 if dtype == jnp.float32 else 0.05)
    (message,) = [record.message for record in caplog.records]
    assert "xla" in message and (("8.0 or more" in message) == (capability == (7, 5)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_an_empty_cache_is_filled_and_not_read(dtype, window):
    """Tokens that attend to each other see what the cache keeps of them, and later ones see the same."""
    q, k, v = projections(heads=4)
    cache = KeyValueCache.create(1, 2, CAPACITY, 2, 4, dtype).layers[0]
    fresh, filled = attend(q, k, v, cache, None, window=window)
    kept = [np.asarray(x[:, :LENGTH]) for x in filled.read(jnp.float32)]
    np.testing.assert_allclose(fresh, expected(q, *kept, window), rtol=1e-5, atol=1e-6)
    for part, whole in zip(kept, (k, v), strict=True):
        error = np.abs(part - whole).max(axis=-1)
        assert (error <= (np.abs(whole).max(axis=-1) / 254 * 1.001 if dtype == jnp.int8 else 0)).all()
    read, again = attend(q, k, v, cache, np.zeros(2, np.int32), window=window)
    np.testing.assert_allclose(read, fresh, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, again, filled)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("block", [1, 5, 16, 32])
def test_blocks_of_a_cache_are_attended_to_like_all_of_it(dtype, window, block):
    q, k, v = projections(heads=4)
    cache = KeyValueCache.create(1, 2, CAPACITY, 2, 4, dtype).layers[0]
    lengths = np.array([5, 0], np.int32)
    _, cache = attend(q[:, :5], k[:, :5], v[:, :5], cache, None)
    whole, cache = attend(q[:, 5:], k[:, 5:], v[:, 5:], cache, lengths, window=window)
    parts = jax.jit(attend_in_blocks, static_argnums=(3, 4, 5))(q[:, 5:], cache, lengths, None, window, block)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_long_cache_is_read_in_blocks(monkeypatch):
    q, k, v = projections(heads=4)
    cache = KeyValueCache.create(1, 2, CAPACITY, 2, 4, jnp.float32).layers[0]
    whole, _ = attend(q, k, v, cache, np.zeros(2, np.int32))
    monkeypatch.setattr("fqjax.models.attention.BLOCK", 4)
    parts, _ = attend(q, k, v, cache, np.zeros(2, np.int32))
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_cache_knows_its_bytes_and_its_dtypes():
    plain = KeyValueCache.create(3, 2, 10, 4, 8, jnp.bfloat16)
    assert plain.nbytes == 3 * 2 * (2 * 10 * 4 * 8) * 2 + 2 * 4
    codes = KeyValueCache.create(3, 2, 10, 4, 8, jnp.int8)
    assert codes.nbytes == 3 * 2 * (2 * 10 * 4) * (8 + 4) + 2 * 4 and codes.capacity == 10
    with pytest.raises(InputError, match="int32: expected int8 or a floating dtype"):
        KeyValueCache.create(1, 1, 1, 1, 1, jnp.int32)


def test_pages_of_several_layers_stand_in_one_array(monkeypatch):
    cache = KeyValueCache.create(5, 3, 4, 2, 4, jnp.int8)  # 5 layers of 3 pages.
    (whole,) = cache.pooled().layers
    assert whole.keys.shape == (15, 4, 2, 4) and whole.value_scales.shape == (15, 4, 2)
    monkeypatch.setattr("fqjax.models.cache.MOST_ELEMENTS", 2 * cache.layers[0].keys.size)
    assert [layer.keys.shape[0] for layer in cache.pooled().layers] == [6, 6, 3]
