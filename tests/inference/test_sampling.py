import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.inference.sampling import NOT_FINITE, Kinds, Sampling, keep_likeliest, penalized, pick, sample


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)])
def test_the_nucleus_is_the_smallest_set_with_that_probability(top_p, kept):
    probabilities = np.array([[0.15, 0.5, 0.05, 0.3]])
    logits = keep_likeliest(jnp.log(jnp.asarray(probabilities, jnp.float32)), jnp.float32(top_p))
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


def rows(count, **settings):
    defaults = {"seed": 0, "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "penalty": 1.0}
    types = {"seed": jnp.uint32, "top_k": jnp.int32}
    values = {name: settings.get(name, default) for name, default in defaults.items()}
    return Sampling(
        **{n: jnp.broadcast_to(jnp.asarray(v, types.get(n, jnp.float32)), count) for n, v in values.items()}
    )


ALL = Kinds(drawn=True, sorted=True, penalized=True)
PROBABILITIES = jnp.asarray([0.5, 0.25, 0.15, 0.1])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"min_p": 0.29}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.6, "top_k": 1}, {0}),
        ({"top_p": 0.9, "min_p": 0.4}, {0, 1}),
    ],
)
def test_filters_leave_the_likeliest(settings, kept):
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (500, 4))
    drawn = pick(
        logits,
        jnp.int32(3),
        rows(500, seed=np.arange(500), temperature=1.0, **settings),
        Kinds(drawn=True, sorted=True),
    )
    assert set(drawn.tolist()) == kept


def test_every_row_has_its_own_settings():
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (300, 4))
    top_k = np.arange(300) % 3
    drawn = np.asarray(
        pick(logits, jnp.int32(0), rows(300, seed=np.arange(300), temperature=2.0, top_k=top_k), Kinds(True, True))
    )
    assert [set(drawn[top_k == k].tolist()) for k in range(3)] == [{0, 1, 2, 3}, {0}, {0, 1}]
    cold = np.asarray(pick(logits, jnp.int32(0), rows(300, seed=np.arange(300), temperature=top_k * 1.0), Kinds(True)))
    assert set(cold[top_k == 0].tolist()) == {0}


def test_a_penalty_lowers_what_was_seen():
    logits, seen = jnp.asarray([[2.0, -2.0, 1.5]]), jnp.asarray([[True, True, False]])
    np.testing.assert_allclose(penalized(logits, seen, jnp.asarray([2.0])), [[1.0, -4.0, 1.5]])
    assert pick(logits, jnp.int32(0), rows(1, penalty=2.0), ALL, seen).tolist() == [2]
    assert pick(logits, jnp.int32(0), rows(1), ALL, seen).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_no_token(value, temperature):
    logits = jnp.asarray([[0.5, value, 0.0], [0.5, 2.0, 0.0], [value] * 3])
    picked = pick(logits, jnp.int32(0), rows(3, temperature=temperature), Kinds(drawn=temperature > 0))
    assert picked[1] in (0, 1, 2) and picked[2] == NOT_FINITE
    assert (picked[0] == NOT_FINITE) == (not value < 0)


def test_nobody_s_token_depends_on_what_others_need():
    """A row by the program for what it needs alone gets what it gets beside rows that need all there is."""
    logits, seen = jax.random.normal(jax.random.key(3), (40, 500)) * 5, jnp.zeros((40, 500), bool)
    seed = np.arange(40)
    for kinds, settings in (
        (Kinds(), {}),
        (Kinds(drawn=True), {"temperature": 3.0}),
        (Kinds(drawn=True), {"temperature": 3.0, "min_p": 0.01}),
        (Kinds(drawn=True, sorted=True), {"temperature": 3.0, "top_p": 0.9}),
    ):
        alone = pick(logits, jnp.int32(1), rows(40, seed=seed, **settings), kinds)
        assert pick(logits, jnp.int32(1), rows(40, seed=seed, **settings), ALL, seen).tolist() == alone.tolist()
