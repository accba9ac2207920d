import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.rounding.gptq import aim_of, aim_of_more, factorize, gptq, prepare, solve_ridge


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
    factor = np.asarray(prepare(hessian, damping=0.0).factor, np.float64)
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


@pytest.mark.parametrize("act_order", [False, True])
def test_a_channel_without_input_is_rounded_as_it_is_and_changes_no_other(act_order):
    weight, hessian = problem()
    silent = hessian.at[5].set(0).at[:, 5].set(0)
    represented = gptq(weight, silent, nearest, act_order=act_order)
    np.testing.assert_array_equal(represented[:, 5], nearest(weight[:, 5], 5))
    other = gptq(weight.at[:, 5].set(0), silent, nearest, act_order=act_order)
    np.testing.assert_array_equal(np.delete(represented, 5, axis=1), np.delete(other, 5, axis=1))


def test_works_under_jit():
    weight, hessian = problem()
    jitted = jax.jit(lambda w, h: gptq(w, h, nearest))(weight, hessian)
    assert (np.asarray(jitted) != np.asarray(gptq(weight, hessian, nearest))).mean() < 0.01


@pytest.mark.parametrize(
    "damaged", [lambda h: h - 0.2 * jnp.trace(h) * jnp.eye(200), lambda h: h.at[3, 3].set(jnp.nan)]
)
def test_a_hessian_that_is_not_positive_definite_gives_nan(damaged):
    weight, hessian = problem()
    factored = factorize(damaged(hessian))
    assert not bool(factored.finite) and bool(factorize(hessian).finite)
    assert np.isnan(gptq(weight, damaged(hessian), nearest)[:, 1:]).all()


def test_least_squares_takes_more_damping_without_the_cross_moments():
    weight, hessian = problem()
    cross = hessian + 0.1 * jnp.diag(jnp.arange(200.0))
    aims = [aim_of(weight, hessian, cross, damping=damping) for damping in (0.01, 0.1)]
    np.testing.assert_allclose(aim_of_more(aims[0], weight, hessian, damping=0.1), aims[1], rtol=1e-4, atol=1e-2)
    solution, finite = solve_ridge(hessian, aims[1], damping=0.1)
    ridge = 0.1 * np.diag(hessian).mean() * np.eye(200)
    wanted = np.linalg.solve(
        np.asarray(hessian, np.float64) + ridge, (np.asarray(cross) + ridge) @ np.asarray(weight).T
    )
    assert bool(finite)
    np.testing.assert_allclose(solution, wanted.T, rtol=1e-2, atol=1e-2)
