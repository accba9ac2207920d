import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqjax.drivers.statistics import calibrate


class Pair(nnx.Module):
    def __init__(self):
        self.a, self.b = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.b(self.a(x))


def data(batches=4, rows=10):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, 3, 6)), jnp.float32) for _ in range(batches)]


def rows_of(batches):
    return np.concatenate([np.asarray(x).reshape(-1, 6) for x in batches])


def test_maxima_are_those_of_all_rows():
    seen = calibrate(Pair(), data(), ["a", "b"])
    np.testing.assert_array_equal(seen["a"].absmax, np.abs(rows_of(data())).max(axis=0))
    assert seen["a"].rows == seen["b"].rows == 120


def test_samples_are_rows_of_the_data_without_repetition():
    sample = calibrate(Pair(), data(), ["a"], sample_rows=50)["a"].samples
    rows = {tuple(row) for row in rows_of(data())}
    assert sample.shape == (50, 6) and {tuple(row) for row in sample} <= rows
    assert len({tuple(row) for row in sample}) == 50


def test_all_rows_are_kept_where_there_are_few():
    sample = calibrate(Pair(), data(1, 2), ["a"], sample_rows=50)["a"].samples
    np.testing.assert_array_equal(np.sort(sample, axis=0), np.sort(rows_of(data(1, 2)), axis=0))


def test_rows_of_every_batch_are_drawn_alike():
    batches = [jnp.full((200, 6), float(i)) for i in range(5)]
    sample = calibrate(Pair(), batches, ["a"], sample_rows=200)["a"].samples
    counts = np.bincount(sample[:, 0].astype(int), minlength=5)
    assert (counts > 20).all() and (counts < 65).all()


def test_batches_of_other_sizes_are_taken():
    batches = [data()[0], data()[1][:3], data()[2][:1, :1]]
    assert calibrate(Pair(), batches, ["a"])["a"].rows == 30 + 9 + 1


def test_layers_not_named_are_not_watched():
    assert set(calibrate(Pair(), data(), ["b"])) == {"b"}


def test_the_statistics_are_reproducible():
    first, second = (calibrate(Pair(), data(), ["a"], sample_rows=30)["a"].samples for _ in range(2))
    np.testing.assert_array_equal(first, second)
