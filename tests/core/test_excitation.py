"""Channels of which a sample says too little."""

import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.excitation import known_channels, with_typical


@pytest.mark.parametrize(("rows", "needed"), [(4, 1), (64, 1), (127, 1), (128, 2), (512, 8)])
def test_a_channel_is_known_from_a_share_of_the_rows_on(rows, needed):
    samples = np.zeros((rows, 4), np.float32)
    samples[: needed - 1, 1] = samples[:needed, 2] = samples[:, 3] = -1e-30
    assert known_channels(jnp.asarray(samples)).tolist() == [False, False, True, True]


def test_channels_that_are_known_keep_their_values():
    values = jnp.asarray([0.0, 1e-30, 5.0, 1.0])
    np.testing.assert_array_equal(with_typical(values, jnp.ones(4, bool)), values)


def test_others_are_raised_to_what_is_typical():
    values, known = (
        jnp.asarray([0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0]),
        jnp.asarray([False, False, *[True] * 5, False]),
    )
    np.testing.assert_allclose(with_typical(values, known), [4, 4, 1, 2, 3, 4, 5, 100])
    np.testing.assert_array_equal(with_typical(jnp.asarray([0.0, 0.2]), jnp.zeros(2, bool)), [1, 1])
