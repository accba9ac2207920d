import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.inference.sampling import keep_nucleus, sample


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)])
def test_the_nucleus_is_the_smallest_set_with_that_probability(top_p, kept):
    probabilities = np.array([[0.15, 0.5, 0.05, 0.3]])
    logits = keep_nucleus(jnp.log(jnp.asarray(probabilities, jnp.float32)), jnp.float32(top_p))
    assert int(np.isfinite(logits).sum()) == kept
    assert np.isfinite(logits[0, 1])


def test_draws_follow_the_distribution():
    probabilities = jnp.asarray([0.6, 0.3, 0.1])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = sample(jnp.broadcast_to(jnp.log(probabilities), (4000, 3)), keys, jnp.float32(1), jnp.float32(1))
    np.testing.assert_allclose(np.bincount(drawn) / 4000, probabilities, atol=0.03)


def test_temperature_sharpens():
    keys = jax.random.split(jax.random.key(0), 500)
    logits = jnp.broadcast_to(jnp.asarray([0.0, 0.5]), (500, 2))
    cold, hot = (np.asarray(sample(logits, keys, jnp.float32(t), jnp.float32(1))).mean() for t in (0.1, 10.0))
    assert cold > 0.97 and 0.4 < hot < 0.62


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jax.random.normal(jax.random.key(1), (5, 30))
    keys = jax.random.split(jax.random.key(2), 5)
    together = sample(logits, keys, jnp.float32(1), jnp.float32(0.9))
    alone = [sample(logits[i : i + 1], keys[i : i + 1], jnp.float32(1), jnp.float32(0.9))[0] for i in range(5)]
    assert together.tolist() == [int(a) for a in alone]
