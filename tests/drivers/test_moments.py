import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.drivers import moments as module
from fqjax.drivers.assemble import assemble, count_macs
from fqjax.drivers.candidates import layer_inputs, layer_options
from fqjax.drivers.moments import Moments
from fqjax.drivers.settings import Compensated
from fqjax.drivers.statistics import calibrate
from fqjax.layers.surgery import find_linears
from fqjax.models.chain import Feed, chain, places, sweep
from fqjax.presets import PRESETS
from fqjax.report.report import quantized_layers


class Chain(nnx.Module):
    """Two linear layers one after the other, the second in front of a nonlinearity."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 48, rngs=rngs)
        self.second = nnx.Linear(48, 32, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.second(jnp.tanh(self.first(x))))


def batches(count=4, rows=200):
    """Correlated inputs: a few directions carry most of them."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 64))
    return [jnp.asarray(rng.normal(size=(rows, 16)) @ mix / 4, jnp.float32) for _ in range(count)]


@pytest.fixture
def setup():
    model, data = Chain(nnx.Rngs(0)), batches()
    linears, method = find_linears(model), PRESETS["flattenquant-w4a4"].method
    seen = calibrate(model, data, linears)
    macs = count_macs(linears, seen)
    grids = {name: layer_options(linear, seen[name], method)[-1].grid for name, linear in linears.items()}

    def finish(name, view):
        inputs = layer_inputs(linears[name], seen[name], method)
        return assemble(name, linears[name], view(), inputs, "{}", macs[name])

    nearest = {name: finish(name, lambda n=name: grids[n].round(linears[n].kernel[...].T)) for name in linears}
    return model, nearest, grids, data, finish


def compensate(model, nearest, grids, batches, finish, *, upstream):
    """Rounds the weights of all quantized layers anew; ``finish`` makes a layer of its name and of its integer view."""
    parts, done = chain(model, nearest), {}
    inside, feed = places(parts.blocks, nearest), Feed(parts, batches)

    def step(path, block, inputs):
        names = inside[path]
        layers = module.compensated(
            parts,
            block,
            lambda: {short: nearest[name] for short, name in names.items()},
            {short: grids[name] for short, name in names.items()},
            feed,
            inputs,
            {short: functools.partial(finish, name) for short, name in names.items()},
            Compensated(upstream=upstream),
        )
        done.update({names[short]: layer for short, layer in layers.items()})
        return module.propagated(parts, block, layers, feed, inputs)

    sweep(parts.blocks, lambda: module.twice(feed), step, "compensating for errors")
    return done


def test_the_moments_are_those_of_the_inputs(setup, monkeypatch):
    model, nearest, grids, data, finish = setup
    taken = {}

    def note(weight, grid, moments, damping):
        assert damping == 0.01
        taken[weight.shape] = moments
        return grid.round(weight)

    monkeypatch.setattr(module, "_rounded", note)
    compensate(model, nearest, grids, data, finish, upstream=0.3)
    x = jnp.concatenate(data)
    exact, seen = np.tanh(np.asarray(model.first(x))), np.tanh(np.asarray(nearest["first"](x)))
    x = np.asarray(x)
    for shape, name, wanted, given in (((48, 64), "first", x, x), ((32, 48), "second", exact, seen)):
        grid = grids[name]
        rows = np.asarray(grid.activations(jnp.asarray(given)), np.float64)
        aim = (given + 0.3 * (wanted - given)) / np.asarray(grid.smoothing)
        for found, expected in zip(taken[shape], Moments(rows.T @ rows, rows.T @ aim), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_compensated_layers_are_closer_to_the_model(setup):
    model, nearest, grids, data, finish = setup
    done = compensate(model, nearest, grids, data, finish, upstream=0.3)
    fresh = batches(count=6)[-1]

    def error(layers):
        y = jnp.tanh(layers["second"](jnp.tanh(layers["first"](fresh))))
        return float(jnp.mean((y - model(fresh)) ** 2))

    assert set(done) == set(nearest)
    assert error(done) < 0.7 * error(nearest)


def test_layers_come_block_after_block_and_only_as_they_are_asked_for(setup):
    model, nearest, grids, data, _ = setup
    asked = []

    def remembered(name, view):
        asked.append(name)
        return nearest[name]

    assert compensate(model, nearest, grids, data, remembered, upstream=0.3) == nearest
    assert asked == ["first", "second"]


@pytest.mark.parametrize("scheme", ["flattenquant", "flattenquant-hopper", "flattenquant-hopper-int4"])
def test_presets_that_compensate(scheme):
    model, data = Chain(nnx.Rngs(0)), batches()
    quantized, report = fqjax.quantize(model, scheme, (batch for batch in data))
    assert report.int4_mac_share >= PRESETS[scheme].method.allocation.int4_share
    layers = quantized_layers(quantized)
    if "hopper" in scheme:
        assert all(layer.input.get_value().bits == 8 for layer in layers.values())
        assert all(layer.weight.get_value().format.granularity == "channel" for layer in layers.values())
    exact, approximate = model(data[0]), quantized(data[0])
    assert float(jnp.mean((exact - approximate) ** 2)) < 0.02 * float(jnp.mean(exact**2))
