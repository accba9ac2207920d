"""Quantizers of a plan, and what is stored of them: both must make the same of an input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.core.channels import PADDING, lay_out
from fqjax.core.codes import qmax
from fqjax.core.inputs import COARSE_BITS, Floating, InputQuantizer, PerToken, Static, bits_of
from fqjax.core.stored_inputs import FloatingInput, PerTokenInput, StaticInput
from fqjax.core.transforms.base import Recipe

K = 40


def rows(seed=0, n=12):
    x = np.random.default_rng(seed).normal(size=(n, K)) * np.where(np.arange(K) < 4, 30, 1)
    return jnp.asarray(x, jnp.float32)


def recipe():
    return Recipe(jnp.asarray(2.0 ** np.random.default_rng(1).integers(-3, 4, K), jnp.float32))


def pieces():
    return jnp.asarray([4, 3, 2, 2] + [1] * (K - 4), jnp.int32)


PLANS = {
    "static8": lambda: Static.of(jnp.float32(2**-5), pieces(), 8),
    "static4": lambda: Static.of(jnp.float32(0.25), pieces(), 4),
    "token8": lambda: PerToken.of(8),
    "token4": lambda: PerToken.of(4),
    "floating": Floating,
}


def stored(name, taken=None, multiple=128):
    plan = PLANS[name]()
    channels = lay_out(plan.pieces, None, K, multiple)
    return plan, plan.stored(taken, channels), channels


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_a_stored_quantizer_gives_the_codes_of_what_the_plan_says(name, taken):
    """The codes of an extra channel are added to those of its source: what is left is what ``fake`` makes of the input."""
    given = recipe() if taken else None
    plan, runs, channels = stored(name, given)
    assert isinstance(plan, InputQuantizer) and type(runs) is type(plan).runs
    assert (runs.inputs, runs.width, runs.flattened()) == (K, channels.width, channels.used)
    codes, scale = runs(rows())
    assert codes.shape == (12, 128) and scale.shape == ((12,) if name.startswith("token") else ())
    real = np.asarray(codes, np.float64) * (np.asarray(scale)[:, None] if scale.ndim else float(scale))
    whole = real[:, :K].copy()
    np.add.at(whole.T, channels.source, real[:, K:].T)
    np.testing.assert_allclose(whole, plan.fake(rows(), given), rtol=1e-5, atol=2e-3 if name == "floating" else 1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_leading_axes_do_not_matter(name):
    _, runs, _ = stored(name)
    codes, scale = runs(rows().reshape(3, 4, K))
    flat, flat_scale = runs(rows())
    np.testing.assert_array_equal(codes.reshape(12, -1), flat)
    np.testing.assert_array_equal(scale.reshape(flat_scale.shape), flat_scale)


@pytest.mark.parametrize("name", PLANS)
def test_padding_and_pieces_never_pass_the_largest_code(name):
    _, runs, channels = stored(name)
    codes = np.asarray(runs(1e3 * rows()).codes, np.float64)
    assert not codes[:, K + channels.used :].any()
    if runs.qmax is not None:
        assert np.abs(codes).max() == runs.qmax == qmax(runs.code_bits)


@pytest.mark.parametrize("name", PLANS)
def test_experts_with_quantizers_of_their_own(name):
    """Every row is quantized as the quantizer of its expert would do it."""
    taken = [recipe(), Recipe(3 * recipe().divisors)]
    both = [stored(name, one)[1] for one in taken]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    expert = jnp.asarray(np.arange(12) % 2, jnp.int32)
    codes, scale = together.of_experts(rows(), expert)
    for e, one in enumerate(both):
        wanted, wanted_scale = one(rows()[expert == e])
        np.testing.assert_array_equal(codes[expert == e], wanted)
        own = scale[expert == e] if scale.ndim else scale
        np.testing.assert_allclose(own, jnp.broadcast_to(wanted_scale, own.shape), rtol=1e-6)


def test_fused_kernels_are_told_what_to_do():
    for name, per_token, limit in (("static8", False, 127), ("token4", True, 7)):
        _, runs, _ = stored(name)
        told = runs.recipe()
        assert (told.qmax, told.per_token) == (limit, per_token) and told.multiplier is runs.multiplier
    assert stored("floating")[1].recipe() is None


def test_codes_of_a_kernel_come_with_a_scale():
    codes, own = jnp.ones((2, 128), jnp.int8), jnp.asarray([1.0, 2.0])
    static, token = stored("static8")[1], stored("token8")[1]
    assert static.scaled(codes, None).scale is static.scale
    assert token.scaled(codes, own).scale is own
    with pytest.raises(AssertionError):
        token.scaled(codes, None)


def test_programs_for_four_and_eight_bits_are_the_same():
    fake = jax.jit(lambda plan, x: plan.fake(x))
    for name in ("static8", "static4", "token8", "token4"):
        fake(PLANS[name](), rows())
    assert fake._cache_size() == 2


def test_coarse_inputs_are_those_of_few_bits():
    assert [PLANS[name]().is_coarse() for name in PLANS] == [False, True, False, True, False]
    assert [bits_of(qmax(bits)) for bits in range(2, 9)] == list(range(2, 9)) and COARSE_BITS == 4


def test_flattening_of_activations():
    quantizer = StaticInput(
        multiplier=jnp.ones(4),
        source=jnp.asarray([1, 1, 0, 0], jnp.int32),
        part=jnp.asarray([1, 2, PADDING, PADDING], jnp.int32),
        scale=jnp.float32(1),
        bits=4,
    )
    result, scale = quantizer(jnp.asarray([[1.0, 17.0, -9.0, 3.0]]))
    assert result.tolist() == [[1, 7, -7, 3, 7, 3, 0, 0]] and float(scale) == 1
    assert quantizer.width == 8 and quantizer.flattened() == 2


def test_tokens_can_have_scales_of_their_own():
    none = {"source": jnp.zeros(4, jnp.int32), "part": jnp.full(4, PADDING, jnp.int32)}
    quantizer = PerTokenInput(multiplier=jnp.ones(4), **none, bits=8)
    result, scale = quantizer(jnp.asarray([[1.0, -2, 0, 0], [0.1, 0.2, 0, 0]]))
    assert result.shape == (2, 8) and scale.shape == (2,) and quantizer.flattened() == 0
    assert np.abs(np.asarray(result, int)).max(axis=1).tolist() == [127, 127]


def test_floating_inputs_keep_their_dtype():
    none = {"source": jnp.zeros(4, jnp.int32), "part": jnp.full(4, PADDING, jnp.int32)}
    quantizer = FloatingInput(multiplier=jnp.asarray([1.0, 0.5, 2, 4]), **none)
    result, scale = quantizer(jnp.asarray([[1.0, -2, 3, 0.5]], jnp.bfloat16))
    assert result.tolist() == [[1, -1, 6, 2, 0, 0, 0, 0]] and result.dtype == jnp.bfloat16 and float(scale) == 1
    assert quantizer.qmax is None
