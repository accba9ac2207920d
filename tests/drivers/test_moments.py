import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.core.layer import fake_input
from fqjax.drivers import moments as module
from fqjax.drivers.candidates import layer_options
from fqjax.drivers.compensation import Moments
from fqjax.drivers.statistics import calibrate
from fqjax.drivers.trial import nearest
from fqjax.layers.simulated import Simulated
from fqjax.layers.stacked import quantized_layers
from fqjax.layers.surgery import find_linears
from fqjax.models.chain import Feed, chain, places, sweep
from fqjax.presets import PRESETS
from fqjax.runtime.errors import InputError


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
    plans = {name: layer_options(linear, seen[name], method)[-1].plan for name, linear in linears.items()}
    rough = {name: nearest(linear, plans[name]) for name, linear in linears.items()}
    return model, rough, plans, data


def compensate(model, rough, plans, batches, *, upstream):
    """Rounds the weights of all quantized layers anew."""
    parts, done, linears = chain(model, rough), {}, find_linears(model)
    inside, feed = places(parts.blocks, rough), Feed(parts, batches)

    def step(path, block, inputs):
        names = inside[path]
        codes = module.compensated(
            parts,
            block,
            lambda: {short: rough[name] for short, name in names.items()},
            {short: plans[name] for short, name in names.items()},
            feed,
            inputs,
            upstream,
        )
        layers = {s: Simulated.of(linears[name], plans[name], codes[s]()) for s, name in names.items()}
        done.update({names[short]: layer for short, layer in layers.items()})
        return module.propagated(parts, block, layers, feed, inputs)

    sweep(parts.blocks, lambda: module.twice(feed), step, "compensating for errors")
    return done


def test_the_moments_are_those_of_the_inputs(setup, monkeypatch):
    model, rough, plans, data = setup
    taken = {}

    def note(weight, plan, moments, damping):
        taken[weight.shape] = moments
        return plan.round(weight)

    monkeypatch.setattr(module, "rounded_weight", note)
    compensate(model, rough, plans, data, upstream=0.3)
    x = jnp.concatenate(data)
    exact, seen = np.tanh(np.asarray(model.first(x))), np.tanh(np.asarray(rough["first"](x)))
    x = np.asarray(x)
    for shape, name, wanted, given in (((48, 64), "first", x, x), ((32, 48), "second", exact, seen)):
        plan = plans[name]
        rows = np.asarray(fake_input(plan.transform, plan.inputs, jnp.asarray(given)), np.float64)
        aim = (given + 0.3 * (wanted - given)) / np.asarray(plan.transform.factors)
        for found, expected in zip(taken[shape], Moments(rows.T @ rows, rows.T @ aim), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


class Repeating(nnx.Module):
    """Calls its layer several times in one run."""

    def __init__(self, rngs, how):
        self.first, self.how = nnx.Linear(64, 64, rngs=rngs), how

    def __call__(self, x):
        return self.how(self.first, x)


def step(layer, x):
    return jnp.tanh(layer(x))


def goes_on(x):
    """Whether a loop goes on: not as often for every batch."""
    return jnp.mean(x**2) > 0.1


def unrolled(layer, x):
    return step(layer, step(layer, x)[:90])


def looped(layer, x):
    return nnx.fori_loop(0, 3, lambda i, carry: (carry[0], step(*carry)), (layer, x))[1]


def looped_by_data(layer, x):
    def body(carry):
        return carry[0], step(*carry) / 2

    return nnx.while_loop(lambda carry: goes_on(carry[1]), body, (layer, x))[1]


def chosen(layer, x):
    return nnx.cond(goes_on(x), step, lambda layer, x: x, layer, x)


def calls(how, layer, x):
    """The inputs of a layer in each call."""
    found = []
    if how is unrolled:
        return [x, step(layer, x)[:90]]
    while len(found) < 3 if how is looped else goes_on(x) and (how is looped_by_data or not found):
        found.append(x)
        x = step(layer, x) / (2 if how is looped_by_data else 1)
    return found


@pytest.mark.parametrize("how", [unrolled, looped, looped_by_data, chosen])
def test_the_moments_are_those_of_all_calls(how, monkeypatch):
    model, taken = Repeating(nnx.Rngs(0), how), []
    data = [x * scale for x, scale in zip(batches(), (1, 1.5, 0.01, 4), strict=True)]
    method = PRESETS["flattenquant-w4a4"].method
    plan = layer_options(model.first, calibrate(model, data, ["first"])["first"], method)[-1].plan
    rough = nearest(model.first, plan)
    monkeypatch.setattr(module, "rounded_weight", lambda weight, plan, moments, damping: taken.append(moments))
    parts = chain(model, ["first"])
    feed = Feed(parts, data)
    codes = module.compensated(parts, model, lambda: {"first": rough}, {"first": plan}, feed, module.twice(feed), 0.3)
    codes["first"]()
    gram, cross = np.zeros((64, 64)), np.zeros((64, 64))
    counts = set()
    for x in data:
        wanted, given = calls(how, model.first, x), calls(how, rough, x)
        counts.add(len(given))
        for i, seen in enumerate(given):
            rows = np.asarray(fake_input(plan.transform, plan.inputs, seen), np.float64)
            exact = wanted[i] if i < len(wanted) else seen
            gram += rows.T @ rows
            cross += rows.T @ (np.asarray(seen + 0.3 * (exact - seen)) / np.asarray(plan.transform.factors))
    assert (len(counts) > 1) == (how in (looped_by_data, chosen))
    (found,) = taken
    for values, expected in zip(found, (gram, cross), strict=True):
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_compensated_layers_are_closer_to_the_model(setup):
    model, rough, plans, data = setup
    done = compensate(model, rough, plans, data, upstream=0.3)
    fresh = batches(count=6)[-1]

    def error(layers):
        y = jnp.tanh(layers["second"](jnp.tanh(layers["first"](fresh))))
        return float(jnp.mean((y - model(fresh)) ** 2))

    assert set(done) == set(rough)
    assert error(done) < 0.7 * error(rough)


def less_definite(monkeypatch, by):
    """Takes some times the mean of its diagonal from every Hessian's diagonal."""
    whole = module._moments

    def changed(*args):
        return {
            name: found._replace(gram=found.gram - by * jnp.mean(jnp.diagonal(found.gram)) * jnp.eye(len(found.gram)))
            for name, found in whole(*args).items()
        }

    monkeypatch.setattr(module, "_moments", changed)


def test_moments_without_a_cholesky_factor_are_damped_more(setup, monkeypatch):
    model, rough, plans, data = setup
    less_definite(monkeypatch, by=0.05)
    done = compensate(model, rough, plans, data, upstream=0.3)
    x = jnp.concatenate(data)
    wanted, given, rounded = (layers["first"](x) for layers in (find_linears(model), done, rough))
    assert jnp.mean((given - wanted) ** 2) < 2 * jnp.mean((rounded - wanted) ** 2)


@pytest.mark.parametrize("scheme", ["flattenquant-w4a4", "w4a8-gptq"])
def test_moments_that_no_damping_helps_are_refused_with_the_layers_name(scheme, monkeypatch):
    less_definite(monkeypatch, by=100)
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=r"^layers\.0: rounding its weight gave values that are not finite$"):
        fqjax.quantize(model, scheme, batches())


def test_nothing_is_done_for_codes_that_nobody_asks_for(setup):
    model, rough, plans, data = setup
    parts, read, made = chain(model, rough), [], []
    feed = Feed(parts, data)

    def inputs():
        for pair in module.twice(feed):
            read.append(pair)
            yield pair

    def layers():
        made.append(rough)
        return rough

    (block,) = parts.blocks.values()
    codes = module.compensated(parts, block, layers, plans, feed, inputs(), 0.3)
    assert list(codes) == ["first", "second"] and not read and not made
    first = codes["first"]()
    assert len(read) == len(data) and len(made) == 1
    assert first.shape == (48, 64) and codes["second"]().shape == (32, 48)
    assert len(read) == len(data) and len(made) == 1


@pytest.mark.sample(1)
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
