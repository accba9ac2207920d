import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.channels import MAX_PIECES, count_pieces
from fqjax.core.thresholds import threshold, within_budget


def channels(outliers=6, size=512, seed=0):
    rng = np.random.default_rng(seed)
    maxima = rng.uniform(0.8, 1.2, size)
    maxima[:outliers] *= 12
    return jnp.asarray(maxima, jnp.float32)


def test_tukey_is_the_upper_whisker():
    m = channels()
    q1, q3 = np.percentile(m, [25, 75])
    assert float(threshold(m, "tukey", 1.5)) == pytest.approx(q3 + 1.5 * (q3 - q1), rel=1e-5)


def test_mean_looks_at_the_bulk_alone():
    m = np.asarray(channels())
    assert float(threshold(jnp.asarray(m), "mean", 1.3)) == pytest.approx(1.3 * m[6:].mean(), rel=1e-4)


@pytest.mark.parametrize("rule", ["tukey", "mean"])
def test_a_threshold_lies_between_a_sixteenth_of_the_maximum_and_the_maximum(rule):
    far = jnp.asarray([1000.0] + [1.0] * 99)
    assert float(threshold(far, rule, 1.0)) == pytest.approx(1000 / MAX_PIECES)
    assert float(threshold(jnp.ones(100), rule, 50.0)) == 1.0


@pytest.mark.parametrize("rule", ["tukey", "mean"])
def test_zeros_have_a_positive_threshold(rule):
    assert float(threshold(jnp.zeros(64), rule, 1.0)) > 0


@pytest.mark.parametrize("budget", [1.0, 1.02, 1.1, 1.5])
def test_the_budget_is_kept_and_used(budget):
    x, w = channels(seed=1), channels(seed=2)
    low = jnp.float32(0.7)
    tx, tw = within_budget(x, w, low, low, (127, 127), budget)

    def cost(tx, tw):
        return float(jnp.mean(count_pieces(x, tx, 127) * count_pieces(w, tw, 127)))

    assert cost(low, low) > 1.5
    assert cost(tx, tw) <= budget
    assert cost(tx / 1.01, tw / 1.01) > budget


def test_thresholds_within_the_budget_are_left_alone():
    x, w = channels(), channels()
    tx, tw = within_budget(x, w, jnp.float32(2), jnp.float32(3), (127, 127), 4.0)
    assert (float(tx), float(tw)) == (2.0, 3.0)
