import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.layers.flattened import flattened


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first, self.factor = nnx.Linear(3, 3, rngs=rngs), 2.0
        self.inner = nnx.List([Inner(rngs), Inner(rngs)])
        self.pair = nnx.data((nnx.Linear(3, 3, rngs=rngs),))
        self.named = nnx.data({"last": nnx.Linear(3, 3, rngs=rngs)})

    def __call__(self, x):
        x = self.first(x) * self.factor
        for inner in self.inner:
            x = inner.linear(x)
        return self.named["last"](self.pair[0](x))


@functools.partial(jax.jit, static_argnums=0)
def run(structure, leaves, x):
    return structure.model(leaves)(x)


def check(model):
    x = np.ones((2, 3), np.float32)
    np.testing.assert_allclose(run(*flattened(model), x), model(x), rtol=1e-6)


def test_a_model_is_looked_at_once():
    model = Model()
    first, again = flattened(model), flattened(model)
    assert first.structure is again.structure
    assert all(a is b for a, b in zip(first.leaves, again.leaves, strict=True))
    check(model)


def test_models_that_are_alike_share_a_structure():
    one, other = Model(0), Model(1)
    assert flattened(one).structure is flattened(other).structure
    assert flattened(one).leaves[0] is not flattened(other).leaves[0]
    other.factor = 3.0
    assert flattened(one).structure is not flattened(other).structure


def exchange_array(model):
    model.inner[1].linear.kernel.set_value(jnp.eye(3) * 5)


def exchange_variable(model):
    model.first.kernel = nnx.Param(jnp.eye(3) * 5)


def exchange_module(model):
    model.inner[0].linear = nnx.Linear(3, 3, rngs=nnx.Rngs(9))


def exchange_in_a_list(model):
    model.inner[0] = Inner(nnx.Rngs(9))


def exchange_in_a_dictionary(model):
    model.named["last"] = nnx.Linear(3, 3, rngs=nnx.Rngs(9))


def exchange_static(model):
    model.factor = 7.0


def update_in_place(model):
    nnx.update(model, jax.tree.map(lambda leaf: leaf * 2, nnx.state(model)))


@pytest.mark.parametrize(
    "exchange",
    [
        exchange_array,
        exchange_variable,
        exchange_module,
        exchange_in_a_list,
        exchange_in_a_dictionary,
        exchange_static,
        update_in_place,
    ],
)
def test_what_has_been_exchanged_is_noticed(exchange):
    model = Model()
    before = flattened(model)
    exchange(model)
    after = flattened(model)
    assert after.structure is not before.structure or any(
        a is not b for a, b in zip(after.leaves, before.leaves, strict=True)
    )
    check(model)


def test_neither_the_model_nor_what_was_exchanged_is_held():
    model = Model()
    flattened(model)
    old = weakref.ref(model.first), weakref.ref(model.first.kernel.get_raw_value())
    model.first = nnx.Linear(3, 3, rngs=nnx.Rngs(5))
    gc.collect()
    assert [reference() for reference in old] == [None, None]
    whole, array = weakref.ref(model), weakref.ref(model.first.kernel.get_raw_value())
    flattened(model)
    del model
    gc.collect()
    assert whole() is None and array() is None


def test_small_arrays_become_part_of_a_structure_of_its_own():
    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(1)))
    model.layers[1].extra = nnx.Variable(jnp.zeros((0, 3)))
    structure, leaves = flattened(model)
    assert sorted(leaf.shape for leaf in leaves) == [(4,), (4, 4), (8, 4)]
    own, large = structure.holding(leaves, 8 * 4 * 4)
    assert [leaf.shape for leaf in large] == [(8, 4)] and own is not structure
    x = jnp.ones((2, 8))
    assert jnp.array_equal(jax.jit(lambda leaves: own.model(leaves)(x))(large), model(x))
    assert own.model(large).layers[1].extra.shape == (0, 3)
