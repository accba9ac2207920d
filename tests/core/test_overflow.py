import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.overflow import LIMIT, accumulator_bound, check_accumulator, row_sums
from fqjax.runtime.errors import InputError


def test_the_bound_is_reached_by_the_worst_input_and_by_no_other():
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (5, 300)).astype(np.int8)
    bound = accumulator_bound(int(row_sums(jnp.asarray(codes)).max()), 127)
    worst = 127 * np.sign(codes.astype(np.int64))
    assert np.abs(worst @ codes.T.astype(np.int64)).max() == bound
    assert np.abs(rng.integers(-127, 128, (100, 300)) @ codes.T.astype(np.int64)).max() <= bound


def test_the_largest_safe_bound_passes_and_the_next_is_refused():
    check_accumulator(LIMIT, "layer")
    with pytest.raises(InputError, match=r"layers\.3\.down.*2147483648"):
        check_accumulator(LIMIT + 1, "layers.3.down")


def test_sums_count_the_most_negative_code():
    assert row_sums(jnp.full((1, 4), -128, jnp.int8)).tolist() == [512]
