import itertools
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqjax.core.allocation import choose, histogram_divergence, select_low_bits

LAYERS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(layers=LAYERS, share=st.floats(0, 1))
def test_the_share_is_reached_and_no_chosen_layer_is_dispensable(layers, share):
    errors, macs = [e for e, _ in layers], [m for _, m in layers]
    chosen = select_low_bits(errors, macs, share * sum(macs))
    total = sum(m for m, low in zip(macs, chosen, strict=True) if low)
    assert total >= share * sum(macs)
    assert all(total - m < share * sum(macs) for m, low in zip(macs, chosen, strict=True) if low)


def test_the_least_sensitive_layers_are_chosen():
    assert select_low_bits([0.5, 0.1, 0.9, 0.2], [10, 10, 10, 10], 20.0) == [False, True, False, True]


@pytest.mark.parametrize(("share", "expected"), [(0.0, False), (1.0, True)])
def test_the_ends(share, expected):
    assert select_low_bits([0.3, 0.0], [1, 5], 6 * share) == [expected] * 2


@pytest.mark.parametrize("needed", [0.0, 10.0])
def test_layers_without_arithmetic_are_not_chosen(needed):
    assert select_low_bits([0.0, 0.3, 0.0], [0, 10, 0], needed) == [False, needed > 0, False]


def test_sensitivity_counts_by_arithmetic():
    assert select_low_bits([0.2, 0.3], [10, 100], 55.0) == [False, True]


def all_choices(errors, macs, sizes, least, most):
    """The least error of all combinations within the bounds, or None."""
    best = None
    for picked in itertools.product(*(range(len(row)) for row in errors)):
        total = [sum(row[o] for row, o in zip(table, picked, strict=True)) for table in (errors, macs, sizes)]
        if total[1] >= least and total[2] <= most and (best is None or total[0] < best):
            best = total[0]
    return best


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.4829, 1.0]), room=st.floats(0.5, 1.2))
def test_the_choice_keeps_its_bounds_and_is_the_best(seed, share, room):
    rng = np.random.default_rng(seed)
    errors, macs, sizes = [], [], []
    for _ in range(6):
        m, options = int(rng.integers(1, 20)), int(rng.integers(1, 4))
        errors.append([float(rng.uniform(0, 0.01)), *np.sort(rng.uniform(0.01, 1, options))[::-1].tolist()])
        macs.append([0, *[m] * options])
        sizes.append([8 * m, *[4 * m + 2 * m * o for o in range(options)]])
    least, most = share * sum(row[1] for row in macs), room * sum(row[0] for row in sizes)
    picked = choose(errors, macs, sizes, least_macs=least, most_bytes=most)
    total = [sum(row[o] for row, o in zip(table, picked, strict=True)) for table in (errors, macs, sizes)]
    best = all_choices(errors, macs, sizes, least, most)
    if best is not None:
        assert total[1] >= least and total[2] <= most
        assert total[0] == pytest.approx(best, rel=2e-6)
    else:  # The share comes first, then the bytes, then the errors.
        smallest = all_choices(sizes, macs, sizes, least, float("inf"))
        assert total[1] >= least and total[2] == smallest
        assert total[0] == pytest.approx(all_choices(errors, macs, sizes, least, smallest), rel=2e-6)


def test_as_much_as_can_be_is_in_the_lower_precision_where_the_share_is_out_of_reach():
    errors, macs, sizes = [[0.1, 0.9, 0.5], [0.2, 0.3]], [[0, 5, 5], [0, 0]], [[9, 5, 6], [4, 3]]
    assert choose(errors, macs, sizes, least_macs=8.0, most_bytes=float("inf")) == [2, 0]
    assert choose(errors, macs, sizes, least_macs=8.0, most_bytes=9.0) == [2, 1]
    assert choose(errors, macs, sizes, least_macs=8.0, most_bytes=1.0) == [1, 1]


def test_a_large_table_is_chosen_from_quickly_and_within_its_bounds():
    rng, errors, macs, sizes = np.random.default_rng(0), [], [], []
    for m in rng.choice([8192 * 8192, 8192 * 1024, 8192 * 28672], 560).tolist():
        worst = float(np.exp(rng.normal(-6, 2)))
        errors.append([worst / 100, *np.sort(worst * rng.uniform(0.3, 1, 3))[::-1].tolist()])
        macs.append([0, m, m, m])
        sizes.append([m, m // 2, m // 2 + m // 32, m // 2 + m // 16])
    least, most = 0.4829 * sum(row[1] for row in macs), 0.7 * sum(row[0] for row in sizes)
    start = time.process_time()
    picked = choose(errors, macs, sizes, least_macs=least, most_bytes=most)
    assert time.process_time() - start < 10
    total = [sum(row[o] for row, o in zip(table, picked, strict=True)) for table in (macs, sizes)]
    assert total[0] >= least and total[1] <= most
    assert picked == choose(errors, macs, sizes, least_macs=least, most_bytes=most)


def test_without_bounds_every_layer_takes_its_best():
    picked = choose([[0.3, 0.1], [0.2]], [[0, 5], [0]], [[9, 5], [4]], least_macs=0.0, most_bytes=float("inf"))
    assert picked == [1, 0]


def test_the_divergence_of_a_histogram():
    values = jnp.asarray(np.random.default_rng(0).normal(size=5000), jnp.float32)
    assert float(histogram_divergence(values, values)) == 0
    coarse, fine = (float(histogram_divergence(values, jnp.round(values * n) / n)) for n in (2, 200))
    assert 0 < fine < coarse
    assert np.isfinite(float(histogram_divergence(jnp.zeros(4), jnp.ones(4))))
