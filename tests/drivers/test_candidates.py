import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fqjax.drivers.assemble import assemble
from fqjax.drivers.candidates import Outline, costs_by_bits, layer_options, select
from fqjax.drivers.settings import Allocation
from fqjax.drivers.statistics import Statistics, layer_inputs
from fqjax.presets import PRESETS
from fqjax.runtime.errors import InputError

SCHEME = PRESETS["flattenquant"]
WIDE = SCHEME.override(["max_expansion=3"]).method


@pytest.fixture(scope="module")
def linear():
    return nnx.Linear(300, 64, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def seen():
    samples = np.random.default_rng(0).normal(size=(500, 300)).astype(np.float32)
    samples[7, 3] = 1000  # one extreme token
    samples[1:, 5] = 0  # a channel that is zero but once
    return Statistics(2 * np.abs(samples).max(axis=0), samples, 5000, 5000)


def test_a_percentile_leaves_out_single_extreme_tokens(linear, seen):
    known = np.delete(np.arange(300), 5)  # Channel 5 is hardly ever excited, and gets what is typical of the others.
    whole = layer_inputs(linear, seen).x_max
    np.testing.assert_array_equal(whole[known], seen.absmax[known])
    assert whole[5] == pytest.approx(np.quantile(seen.absmax[known], 0.75))
    usual = layer_inputs(linear, seen, 99).x_max
    np.testing.assert_allclose(usual[10:], np.percentile(np.abs(seen.samples), 99, axis=0)[10:], rtol=1e-5)
    assert usual[3] < 4 and usual[5] == pytest.approx(np.quantile(usual[known], 0.75))


@pytest.mark.parametrize("percentile", [49, 100.5, "most"])
def test_a_percentile_that_is_none_is_refused(percentile):
    with pytest.raises(InputError, match="activation_percentile"):
        SCHEME.override([f"activation_percentile={percentile}"])


def test_options_are_of_rising_width_and_falling_error(linear, seen):
    options = layer_options(linear, seen, WIDE)
    by_bits = {bits: [option for option in options if option.bits == bits] for bits in (8, 4)}
    assert [option.bits for option in options] == [8] * len(by_bits[8]) + [4] * len(by_bits[4])
    for bits, block in ((8, 128), (4, 256)):
        widths = [option.width for option in by_bits[bits]]
        assert widths == sorted(set(widths)) and all(width % block == 0 for width in widths)
        assert [option.bytes for option in by_bits[bits]] == sorted(option.bytes for option in by_bits[bits])
    assert len(by_bits[4]) > 1
    errors = [option.error for option in by_bits[4]]
    assert errors == sorted(errors, reverse=True)


def test_a_layer_costs_as_chosen_or_as_little_as_the_other_bits_can(linear, seen):
    options = layer_options(linear, seen, WIDE)
    low = [option for option in options if option.bits == 4]
    costs = costs_by_bits({"a": options}, {"a": low[0]}, {"a": 2.0})["a"]
    assert costs[4] == pytest.approx(2 * low[0].error / low[-1].error)
    assert costs[8] == pytest.approx(2 * min(o.error for o in options if o.bits == 8) / low[-1].error)
    assert costs_by_bits({"a": options}, {"a": options[0]}, {"a": 2.0})["a"][4] == pytest.approx(2.0)
    assert jnp.isfinite(jnp.asarray(list(costs.values()))).all()


@pytest.mark.sample(3)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["flattenquant", "flattenquant-hopper", "w4a8", "w4a8-integer-scale-folded"])
def test_an_option_takes_the_bytes_of_the_layer_made_of_it(seen, scheme, bias):
    method = PRESETS[scheme].override(["max_expansion=3"] if scheme.startswith("flatten") else []).method
    linear = nnx.Linear(300, 64, use_bias=bias, rngs=nnx.Rngs(0))
    inputs = layer_inputs(linear, seen)
    for option in layer_options(linear, seen, method):
        layer = assemble("a", linear, option.plan, option.plan.round(inputs.weight), inputs, macs=1)
        assert layer.nbytes == option.bytes and layer.sizes.width == option.width


@pytest.mark.parametrize("selection", ["sensitivity", "kl", "budget"])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), share=st.floats(0, 0.99))
def test_every_selection_keeps_the_share_whatever_layers_have_no_option_in_int4(selection, data, share):
    layers = st.tuples(st.booleans(), st.integers(0, 9), st.floats(0.01, 1))
    drawn = data.draw(st.lists(layers, min_size=1, max_size=8).filter(lambda some: sum(m for _, m, _ in some) > 0))
    options = {
        str(i): [
            Outline(bits=bits, error=error / bits, divergence=error / bits, width=256, bytes=bits)
            for bits in ((8, 4) if able else (8,))
        ]
        for i, (able, _, error) in enumerate(drawn)
    }
    macs = {str(i): m for i, (_, m, _) in enumerate(drawn)}
    costs = {str(i): error for i, (*_, error) in enumerate(drawn)}
    allocation = Allocation(selection=selection, int4_share=share)
    able = sum(macs[name] for name, some in options.items() if len(some) > 1)
    if able < share * sum(macs.values()):
        with pytest.raises(InputError, match=r"^int4_share=.*: out of reach, as layers kept in INT8"):
            select(options, macs, 400, allocation, lambda: costs)
        return
    picked = select(options, macs, 400, allocation, lambda: costs)
    assert sum(macs[name] for name in options if picked[name].bits == 4) >= share * sum(macs.values())


@pytest.mark.parametrize(("saved", "chosen"), [(0.5, 4), (0.1, 8)])
def test_bytes_are_asked_for_where_int4_saves_some(saved, chosen):
    """One layer has all of the arithmetic that has to be INT4, the other bytes that INT4 saves, or hardly."""

    def outlines(smaller):
        kinds = {"divergence": 0.0, "width": 256}
        return [Outline(bits=8, error=0.1, bytes=100, **kinds), Outline(bits=4, error=0.9, bytes=smaller, **kinds)]

    options = {"arithmetic": outlines(100), "bytes": outlines(round(100 - 200 * saved))}
    macs, costs = {"arithmetic": 10, "bytes": 1}, {"arithmetic": 0.1, "bytes": 5.0}
    picked = select(options, macs, 400, SCHEME.method.allocation, lambda: costs)
    assert (picked["arithmetic"].bits, picked["bytes"].bits) == (4, chosen)
