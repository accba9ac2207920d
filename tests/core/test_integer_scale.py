import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.integer_scale import (
    LARGEST_FOLDED,
    amplify,
    fold_scales,
    group_sums,
    round_on_integer_grid,
    safe_amplifier,
    scaled_bound,
)
from fqjax.core.overflow import LIMIT


def problem(n=48, k=512, size=128, std=0.02, seed=0):
    """A weight, its group scales, and its codes rounded to the nearest."""
    weight = np.random.default_rng(seed).normal(0, std, (n, k)).astype(np.float32)
    groups = weight.reshape(n, k // size, size)
    scales = (np.abs(groups).max(axis=2) / 7).T
    codes = np.clip(np.rint(groups / scales.T[:, :, None]), -8, 7).reshape(n, k)
    return jnp.asarray(weight), jnp.asarray(scales), jnp.asarray(codes, jnp.int8)


def represented(codes, scales, unit):
    n, k = codes.shape
    step = np.asarray(scales * unit).T
    return (np.asarray(codes, np.float64).reshape(n, len(scales), -1) * step[:, :, None]).reshape(n, k)


def test_no_scale_becomes_zero():
    scales = jnp.asarray([[1e-9, 0.4 / 1024], [2.6 / 1024, 1.0]], jnp.float32)
    np.testing.assert_array_equal(amplify(scales, 1024), [[1, 1], [3, 1024]])


def test_the_bound_is_reached_by_the_worst_activations():
    _, scales, codes = problem()
    integers = np.asarray(amplify(scales, 1024), np.int64)
    bound = scaled_bound(np.asarray(group_sums(codes, 128)), integers, 127)
    assert scaled_bound(np.asarray(group_sums(codes, 128)), integers, 127, bits=4) == 16 * bound
    worst = 127 * np.sign(np.asarray(codes, np.int64))
    parts = np.einsum("ngk,ngk->gn", *(a.reshape(48, 4, 128) for a in (worst, np.asarray(codes, np.int64))))
    assert (parts * integers).sum(axis=0).max() == bound


def test_bounds_beyond_32_bits_are_counted_exactly():
    assert scaled_bound(np.full((9, 1), 2**30, np.int32), np.full((9, 1), 2**20, np.int32), 127) == 9 * 127 * 2**50


@pytest.mark.parametrize("std", [0.02, 1.0, 300.0])
def test_the_amplifier_is_the_largest_that_is_safe(std):
    _, scales, codes = problem(std=std, k=1024)
    sums = group_sums(codes, 128)
    amplifier = safe_amplifier(scales, sums, x_qmax=127, bits=4)
    bound = lambda a: scaled_bound(np.asarray(sums), np.asarray(amplify(scales, a)), 127, 4)  # noqa: E731
    assert amplifier and bound(amplifier) <= LIMIT
    assert amplifier == 1024 or bound(2 * amplifier) > LIMIT
    assert (amplifier == 1024) == (std < 100)


def test_a_layer_that_cannot_be_made_safe_is_left_alone():
    sums, scales = jnp.full((4, 8), 2**20, jnp.int32), jnp.ones((4, 8))
    assert safe_amplifier(scales, sums, x_qmax=127, bits=8) == 4
    assert safe_amplifier(scales, 2 * sums, x_qmax=127, bits=8) is None
    assert safe_amplifier(scales, sums, x_qmax=127, bits=4) is None


def test_rounding_on_the_integer_grid_brings_back_what_rounding_the_scales_lost():
    weight, scales, codes = problem()
    integers = amplify(scales, 512)
    unit = jnp.float32(1 / 512)
    again = round_on_integer_grid(weight, integers, unit)

    def error(w):
        return np.mean((w - np.asarray(weight)) ** 2)

    exact, kept, anew = (
        error(represented(c, s, u))
        for c, s, u in ((codes, scales, 1.0), (codes, integers, unit), (again, integers, unit))
    )
    assert kept > 1.1 * exact and anew < 1.05 * exact
    assert int(again.min()) >= -8 and int(again.max()) <= 7


def test_folded_scales_times_codes_fit_into_int8():
    weight, scales, _ = problem()
    weight = weight * jnp.exp(jnp.asarray(np.random.default_rng(1).normal(0, 1, (48, 1)), jnp.float32))
    weight = weight.at[:, :128].multiply(3)
    scales = (jnp.abs(weight.reshape(48, 4, 128)).max(axis=2) / 7).T
    integers, unit = fold_scales(weight, scales, jnp.ones(512))
    assert int(integers.min()) >= 1 and int(integers.max()) <= LARGEST_FOLDED and unit.shape == (48,)
    codes = round_on_integer_grid(weight, integers, unit)
    product = np.asarray(codes, int).reshape(48, 4, 128) * np.asarray(integers).T[:, :, None]
    assert np.abs(product).max() <= 127
    plain = np.clip(np.rint(np.asarray(weight).reshape(48, 4, 128) / np.asarray(scales).T[:, :, None]), -8, 7)
    plain = (plain * np.asarray(scales).T[:, :, None]).reshape(48, 512)
    error = lambda w: np.sum((w - np.asarray(weight)) ** 2)  # noqa: E731
    assert error(represented(codes, integers, unit)) < 1.15 * error(plain)


def test_folding_weighs_errors_by_their_inputs():
    weight, scales, _ = problem()
    importance = jnp.where(jnp.arange(512) < 128, 100.0, 0.01)

    def error(weights):
        integers, unit = fold_scales(weight, scales, weights)
        w = represented(round_on_integer_grid(weight, integers, unit), integers, unit)
        return float(np.sum((w - np.asarray(weight)) ** 2 * np.asarray(importance)))

    assert error(importance) < error(jnp.ones(512))


@pytest.mark.parametrize(("scale", "found"), [(0.1, None), (0.5, 8)])
def test_groups_and_channels_without_codes_do_not_make_a_coarse_amplifier_good_enough(scale, found):
    """200 000 times a scale of up to 5 fits into the accumulator, and a scale has to become 4 at least."""
    scales = jnp.asarray([[scale, 1.0], [1.0, 1.0]])
    sums = jnp.asarray([[200_000, 0], [0, 0]])
    assert safe_amplifier(scales, sums, x_qmax=127, bits=4) == found
