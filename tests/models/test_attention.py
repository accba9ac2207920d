import jax
import numpy as np
import pytest

from fqjax.models.attention import attend

LENGTH, CAPACITY = 11, 16


def projections(heads, length=LENGTH):
    rng = np.random.default_rng(heads)
    return [rng.normal(size=(2, length, h, 4)).astype(np.float32) for h in (heads, 2, 2)]


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
    cache = (np.full((2, CAPACITY, 2, 4), 9, np.float32), np.full((2, CAPACITY, 2, 4), 9, np.float32))
    lengths = np.zeros(2, np.int32)
    for width, counts in ((4, (4, 2)), (4, (3, 4)), (1, (1, 1)), (1, (1, 1)), (1, (1, 1))):
        at = np.minimum(lengths[:, None] + np.arange(width), LENGTH - 1)
        out, cache = step(*(np.take_along_axis(x, at[..., None, None], axis=1) for x in (q, k, v)), cache, lengths)
        for row, count in enumerate(counts):
            first = lengths[row]
            np.testing.assert_allclose(out[row, :count], whole[row, first : first + count], rtol=1e-5, atol=1e-6)
        lengths = lengths + np.array(counts, np.int32)
    assert lengths.tolist() == [10, 9]
