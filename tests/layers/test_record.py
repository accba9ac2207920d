"""Figures beside a layer: kept as they are, and nothing to JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.core.channels import PADDING
from fqjax.core.formats.uniform import Uniform
from fqjax.core.overflow import LIMIT
from fqjax.core.stored_inputs import StaticInput
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.record import LARGEST_COUNT, Figures, Record, abstracted, split_to_run
from fqjax.layers.stacked import stack
from fqjax.runtime.errors import InputError


def layer(seed=0, figures=None, recipe="{}", **changes):
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(-127, 128, (16, 128)), jnp.int8)
    weight = Uniform(bits=8).store(codes.at[:, 24:].set(0), jnp.float32(rng.uniform(0.01, 0.02)))
    channels = {"source": jnp.zeros(104, jnp.int32), "part": jnp.full(104, PADDING, jnp.int32)}
    quantizer = StaticInput(multiplier=jnp.full(24, 30.0), **channels, scale=jnp.float32(1 / 30), bits=8)
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32} | changes
    return QuantizedLinear(weight, quantizer, figures=figures, recipe=recipe, **kinds)


@pytest.mark.parametrize(
    "figures",
    [
        Figures(),
        Figures(relative_error=0.1234567, accumulator_bound=LIMIT, macs=LARGEST_COUNT, flattened=3),
        Figures(relative_error=1e-30, macs=1),
        Figures(relative_error=float("inf")),
    ],
)
def test_figures_come_back(figures):
    found = Figures.decoded(figures.encoded())
    assert found.relative_error == float(np.float32(figures.relative_error))
    assert (found.accumulator_bound, found.macs, found.flattened) == (
        figures.accumulator_bound,
        figures.macs,
        figures.flattened,
    )
    assert Figures.decoded(found.encoded()) == found and figures.encoded().dtype == jnp.uint32


def test_counts_too_large_for_their_type_are_the_largest():
    assert Figures.decoded(Figures(macs=2**40).encoded()).macs == LARGEST_COUNT


def test_a_layer_says_what_was_measured_of_it():
    one = layer(figures=Figures(relative_error=0.25, accumulator_bound=9, macs=384, flattened=6))
    assert (one.figures.relative_error, one.figures.macs, one.expansion) == (0.25, 384, 30 / 24)
    assert layer().figures == Figures() and layer().expansion == 1


def test_a_bound_that_could_overflow_is_refused_when_the_layer_is_built():
    with pytest.raises(InputError, match="linear layer: the int32 accumulator"):
        layer(figures=Figures(accumulator_bound=LIMIT + 1))


def four():
    return [layer(i, Figures(relative_error=0.1 * i, accumulator_bound=i, macs=i, flattened=i)) for i in range(4)]


@pytest.mark.parametrize("split", [nnx.split, split_to_run])
def test_equal_layers_compile_once(split):
    """Whatever was measured of them: four layers, jitted one by one, are one program."""
    run = jax.jit(lambda graphdef, state, x: nnx.merge(graphdef, state)(x), static_argnums=0)
    x, outputs = jnp.ones((2, 24)), []
    for one in four():
        outputs.append(run(*split(one), x))
        np.testing.assert_allclose(outputs[-1], one(x), rtol=1e-6)
    assert run._cache_size() == 1
    assert len({float(y[0, 0]) for y in outputs}) == 4


def test_layers_of_other_formats_are_other_programs():
    run = jax.jit(lambda graphdef, state, x: nnx.merge(graphdef, state)(x), static_argnums=0)
    for one in (layer(), layer(1, dtype=jnp.bfloat16)):
        run(*split_to_run(one), jnp.ones((2, 24)))
    assert run._cache_size() == 2


def test_a_model_runs_without_its_records():
    model = nnx.List(four())
    graphdef, state = split_to_run(model)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(nnx.state(model))) - 4
    running = nnx.merge(graphdef, state)
    np.testing.assert_array_equal(running[3](jnp.ones((2, 24))), model[3](jnp.ones((2, 24))))
    assert model[3].figures.macs == 3  # It is not changed.


def test_a_model_without_arrays_still_has_its_figures():
    model = nnx.List(four())
    found = abstracted(model)
    assert [one.figures for one in found] == [one.figures for one in model]
    others = jax.tree.leaves(nnx.state(found, nnx.Not(Record)))
    assert others and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in others)
    assert found[0].nbytes == model[0].nbytes and found[0].sizes == model[0].sizes


def test_stacked_layers_keep_the_figures_and_recipes_of_each():
    layers = [layer(i, Figures(macs=i, flattened=i), recipe=f'{{"i": {i}}}') for i in range(3)]
    stacked = stack(layers)
    assert stacked is not None and stacked.record.get_value().shape == (3, 4)
    for one, again in zip(layers, stacked.layers(), strict=True):
        assert again.figures == one.figures and again.recipe == one.recipe
        np.testing.assert_array_equal(again.weight.get_value().codes, one.weight.get_value().codes)
