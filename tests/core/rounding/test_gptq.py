import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.rounding.gptq import _factor, gptq, gptq_grouped


def inputs(rows, k, seed=0):
    """Correlated inputs: a few directions carry most of them."""
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (rows, k // 4)) @ rng.normal(0, 1, (k // 4, k)) + rng.normal(0, 0.5, (rows, k))) / 4


def problem(n=24, k=200, rows=600):
    x = inputs(rows, k)
    weight = np.random.default_rng(1).normal(0, 3, (n, k)).astype(np.float32)
    return jnp.asarray(weight), jnp.asarray(x.T @ x, jnp.float32)


def output_error(weight, represented, hessian):
    """Squared error of the layer's output over the output's square, on the inputs of which ``hessian`` is X^T X."""
    change = weight - represented
    return jnp.sum((change @ hessian) * change) / jnp.sum((weight @ hessian) * weight)


def nearest(column, index):
    return jnp.clip(jnp.round(column), -7, 7)


def textbook(weight, hessian, damping, order):
    """Optimal brain quantization, one column at a time, with the inverse of what is left worked out anew each time."""
    weight, hessian = np.array(weight, np.float64), np.array(hessian, np.float64)
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    represented, left = weight.copy(), list(order)
    while left:
        i = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        represented[:, i] = np.clip(np.rint(weight[:, i]), -7, 7)
        error = (weight[:, i] - represented[:, i]) / inverse[0, 0]
        weight[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return represented


def test_the_factor_is_that_of_the_inverse():
    _, hessian = problem()
    hessian = hessian + 10 * jnp.eye(200)
    factor = np.asarray(_factor(hessian), np.float64)
    assert not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor.T @ factor @ np.asarray(hessian, np.float64), np.eye(200), atol=2e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_equals_the_textbook(act_order):
    weight, hessian = problem(n=8, k=150)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(150)
    represented = np.asarray(gptq(weight, hessian, nearest, damping=0.05, act_order=act_order))
    wanted = textbook(weight, hessian, 0.05, order)
    assert (represented != wanted).mean() < 0.01  # A tie may fall either way in float32; what follows it then differs.


def test_makes_up_for_most_of_the_error_of_rounding_to_nearest():
    weight, hessian = problem()
    by_gptq = output_error(weight, gptq(weight, hessian, nearest), hessian)
    by_rounding = output_error(weight, nearest(weight, 0), hessian)
    assert by_gptq < 0.4 * by_rounding


def test_independent_inputs_leave_rounding_to_nearest():
    weight, _ = problem()
    np.testing.assert_array_equal(gptq(weight, 3 * jnp.eye(200), nearest), nearest(weight, 0))


def test_the_quantizer_is_told_the_column_in_the_original_order():
    weight, hessian = problem(k=256)
    scales = jnp.asarray([1.0, 0.5])  # one a group of 128

    def grouped(column, index):
        scale = scales[index // 128]
        return jnp.clip(jnp.round(column / scale), -7, 7) * scale

    for act_order in (False, True):
        represented = np.asarray(gptq(weight, hessian, grouped, act_order=act_order))
        assert (represented[:, :128] == np.round(represented[:, :128])).all()
        assert np.abs(represented[:, 128:]).max() <= 3.5 and (2 * represented % 1 == 0).all()
        assert (represented[:, 128:] % 1 != 0).any()


def test_a_channel_without_input_is_zero_and_harms_no_other():
    weight, hessian = problem()
    dead = hessian.at[5].set(0).at[:, 5].set(0)
    represented = gptq(weight, dead, nearest)
    assert not np.asarray(represented[:, 5]).any() and np.isfinite(represented).all()


def test_works_under_jit():
    weight, hessian = problem()
    jitted = jax.jit(lambda w, h: gptq(w, h, nearest))(weight, hessian)
    assert (np.asarray(jitted) != np.asarray(gptq(weight, hessian, nearest))).mean() < 0.01


def largest(group):
    return jnp.max(jnp.abs(group), axis=1) / 7


def on_grid(column, scale):
    return jnp.clip(jnp.round(column / scale), -7, 7) * scale


def wide_ranges(k=256):
    weight, hessian = problem(k=k)
    return weight * jnp.exp(jnp.linspace(-2, 2, k)), hessian


@pytest.mark.parametrize("group_size", [32, 128])
def test_static_groups_keep_the_scales_of_the_weight_as_it_was(group_size):
    weight, hessian = wide_ranges()
    represented, scales = gptq_grouped(
        weight, hessian, largest, on_grid, group_size=group_size, act_order=True, static_groups=True
    )
    groups = weight.reshape(len(weight), -1, group_size)
    np.testing.assert_allclose(scales, jnp.max(jnp.abs(groups), axis=2) / 7, rtol=1e-6)
    assert_on_grid(represented, scales, group_size)
    plain = on_grid(weight, jnp.repeat(scales, group_size, axis=1))
    assert output_error(weight, represented, hessian) < 0.4 * output_error(weight, plain, hessian)


@pytest.mark.parametrize("group_size", [32, 64])
def test_groups_take_their_scales_when_they_are_reached(group_size):
    weight, hessian = wide_ranges()
    represented, scales = gptq_grouped(weight, hessian, largest, on_grid, group_size=group_size)
    groups = weight.reshape(len(weight), -1, group_size)
    first = jnp.max(jnp.abs(groups), axis=2) / 7
    np.testing.assert_allclose(scales[:, 0], first[:, 0], rtol=1e-6)  # Nothing has been rounded in front of it.
    assert (jnp.abs(scales[:, 1:] / first[:, 1:] - 1) > 1e-4).mean() > 0.9
    assert_on_grid(represented, scales, group_size)
    plain = on_grid(weight, jnp.repeat(first, group_size, axis=1))
    assert output_error(weight, represented, hessian) < 0.6 * output_error(weight, plain, hessian)


def test_one_group_of_all_channels_is_no_group():
    weight, hessian = problem(k=128)
    scale = largest(weight)
    represented, _ = gptq_grouped(weight, hessian, largest, on_grid, group_size=128)
    np.testing.assert_array_equal(represented, gptq(weight, hessian, lambda column, _: on_grid(column, scale)))


def assert_on_grid(represented, scales, group_size):
    codes = represented / jnp.repeat(scales, group_size, axis=1)
    np.testing.assert_allclose(codes, jnp.round(codes), atol=1e-4)
    assert jnp.max(jnp.abs(codes)) < 7.001


@pytest.mark.parametrize(
    "settings, complaint",
    [({"group_size": 48}, "must divide 128"), ({"group_size": 32, "act_order": True}, "static_groups")],
)
def test_groups_that_do_not_fit_are_refused(settings, complaint):
    weight, hessian = problem(k=256)
    with pytest.raises(ValueError, match=complaint):
        gptq_grouped(weight, hessian, largest, on_grid, **settings)
