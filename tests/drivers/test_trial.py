import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.drivers.candidates import layer_options
from fqjax.drivers.statistics import calibrate
from fqjax.drivers.trial import divergence, nearest, sensitivities
from fqjax.layers.surgery import find_linears, replace_modules
from fqjax.models.chain import chain
from fqjax.presets import PRESETS


class Scorer(nnx.Module):
    """Token model in which one layer decides, and another hardly matters."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.strong, self.weak = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) * 8
        return (self.strong(x) + 0.01 * self.weak(x)) @ self.embed.embedding[...].T


@pytest.fixture
def setup():
    model, batch = Scorer(), jnp.asarray(np.random.default_rng(0).integers(0, 20, (4, 12)))
    linears = find_linears(model)
    seen = calibrate(model, [batch], linears)
    candidates = {
        name: nearest(linear, layer_options(linear, seen[name], PRESETS["flattenquant"].method)[-1].plan)
        for name, linear in linears.items()
    }
    return model, batch, candidates


def tried(model, candidates, batch):
    """The sensitivity of every layer of a model that is one block."""
    return sensitivities(chain(model, candidates), list(candidates), lambda *_: candidates, batch)


def test_each_sensitivity_is_that_of_the_model_with_one_layer_replaced(setup):
    model, batch, candidates = setup
    found = tried(model, candidates, batch)
    for name, layer in candidates.items():
        replaced = replace_modules(model, {name: layer})
        assert found[name] == pytest.approx(float(divergence(model(batch), replaced(batch), True)), rel=0.05)


def test_the_layer_that_decides_is_the_sensitive_one(setup):
    model, batch, candidates = setup
    found = tried(model, candidates, batch)
    assert found["strong"] > 100 * found["weak"] > 0


def test_divergence_of_logits_ignores_a_shift():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 9)), jnp.float32)
    assert abs(float(divergence(logits, logits + 3, True))) < 1e-6
    assert float(divergence(logits, 2 * logits, True)) > 0.01


def test_divergence_of_other_outputs_is_relative():
    tree = {"a": jnp.ones(4), "n": jnp.arange(3), "b": (2 * jnp.ones(3),)}
    other = {"a": jnp.ones(4), "n": jnp.zeros(3, int), "b": (2.4 * jnp.ones(3),)}
    assert float(divergence(tree, other, False)) == pytest.approx(3 * 0.16 / 16, rel=1e-5)
