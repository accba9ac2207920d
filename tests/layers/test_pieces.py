"""Layers with pieces that no kernel takes up: a transform that runs before, branches, and something after the product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

import fqjax
from fqjax.core.layer import LayerInputs
from fqjax.core.table import Stored, array, static
from fqjax.drivers.assemble import assemble
from fqjax.drivers.candidates import plan_bytes
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.simulated import Simulated
from fqjax.layers.stacked import quantized_layers, stack
from fqjax.methods.arrays.absmax import absmax_plan
from fqjax.registry import register
from fqjax.runtime.errors import InputError

K, N, RANK = 48, 20, 3


@register("transforms")
class Mirror(Stored):
    """Channels in the opposite order, with signs, shifted; nothing that a kernel could take up."""

    kind = "mirror_of_a_test"

    signs: Array = array("in", dtype="float32")
    shift: Array = array("in", dtype="float32")

    def weight(self, w):
        return (w.astype(jnp.float32) * self.signs)[:, ::-1]

    def inputs(self, x):
        return ((x - self.shift) * self.signs)[..., ::-1]

    def bias(self, w, b):
        return w @ self.shift + (0 if b is None else b)

    def inverse(self):
        raise NotImplementedError

    def recipe(self):
        return None


@register("branches")
class LowRank(Stored):
    """The product of two narrow matrices with the transformed input."""

    kind = "low_rank_of_a_test"

    down: Array = array("in", "rank", dtype="float32")
    up: Array = array("rank", "out", dtype="float32")
    rank: int = static()

    @classmethod
    def axes(cls, sizes, statics):
        return super().axes(sizes, statics) | {"rank": statics["rank"]}

    def __call__(self, x):
        return x @ self.down @ self.up


@register("finishes")
class Squash(Stored):
    """A nonlinearity with a gain for every output."""

    kind = "squash_of_a_test"

    gain: Array = array("out", dtype="float32", positive=True)

    def __call__(self, y):
        return jnp.tanh(y * self.gain)


def low_rank(seed):
    rng = np.random.default_rng(seed)
    down, up = rng.normal(size=(K, RANK)) / 20, rng.normal(size=(RANK, N))
    return LowRank(down=jnp.asarray(down, jnp.float32), up=jnp.asarray(up, jnp.float32), rank=RANK)


PIECES = {
    "transform": ["transform"],
    "branches": ["branches"],
    "finish": ["finish"],
    "all": ["transform", "branches", "finish"],
}


def rows(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(30, K)) + 1, jnp.float32)


def made(names, *, bias=True):
    """A linear layer, and the plan and the codes of its quantized one."""
    signs = np.where(np.arange(K) % 3, 1.0, -1.0)
    pieces = {
        "transform": Mirror(signs=jnp.asarray(signs, jnp.float32), shift=jnp.linspace(0, 2, K)),
        "branches": (low_rank(1), low_rank(2)),
        "finish": Squash(gain=jnp.linspace(0.5, 1.5, N)),
    }
    linear = nnx.Linear(K, N, use_bias=bias, rngs=nnx.Rngs(0))
    chosen = {name: pieces[name] for name in names}
    x = chosen["transform"].inputs(rows()) if "transform" in chosen else rows()
    inputs = LayerInputs(linear.kernel[...].T, jnp.abs(x).max(axis=0), rows())
    plan = dataclasses.replace(absmax_plan(inputs, jnp.ones(K), 8), **chosen)
    return linear, plan, plan.round(inputs.weight), inputs


def layer_of(names, **settings):
    linear, plan, codes, inputs = made(names, **settings)
    return assemble("layer", linear, plan, codes, inputs, macs=K * N, recipe='{"name": "test"}')


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("names", PIECES.values(), ids=PIECES.keys())
def test_the_layer_computes_what_the_simulated_one_does(names, bias):
    linear, plan, codes, _ = made(names, bias=bias)
    found, simulated = layer_of(names, bias=bias)(rows(1)), Simulated.of(linear, plan, codes)(rows(1))
    assert found.dtype == simulated.dtype == jnp.float32
    np.testing.assert_allclose(found, simulated, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(found).max()) > 0.1


@pytest.mark.parametrize("names", PIECES.values(), ids=PIECES.keys())
def test_the_layer_is_near_what_its_pieces_say_in_floating_point(names):
    linear, plan, _, _ = made(names)
    x, wanted = rows(), linear(rows())
    if "branches" in names:
        changed = plan.transform.inputs(x)
        wanted = wanted + sum(branch(changed) for branch in plan.branches)
    wanted = plan.finish(wanted) if "finish" in names else wanted
    np.testing.assert_allclose(layer_of(names)(x), wanted, atol=0.05)


def test_a_transform_that_kernels_take_up_is_not_kept():
    assert layer_of([]).transform is None and layer_of([]).is_plain and layer_of([]).fuses


@pytest.mark.parametrize("names", PIECES.values(), ids=PIECES.keys())
def test_what_fuses_layers_leaves_it_alone(names):
    layer = layer_of(names, bias=False)
    assert not (layer.is_plain or layer.fuses or layer.gates) and stack([layer, layer]) is None
    plain = layer_of([], bias=False)
    assert plain.is_plain and plain.fuses and plain.gates and stack([plain, plain]) is not None


@pytest.mark.parametrize("names", PIECES.values(), ids=PIECES.keys())
def test_bytes_count_every_piece(names):
    linear, plan, _, _ = made(names)
    layer = layer_of(names)
    assert layer.nbytes == plan_bytes(linear, plan, layer.sizes.width)
    extra = {"transform": 8 * K, "branches": 2 * 4 * RANK * (K + N), "finish": 4 * N}
    assert layer.nbytes - layer_of([]).nbytes == sum(extra[name] for name in names)


@pytest.mark.parametrize("names", PIECES.values(), ids=PIECES.keys())
def test_a_layer_keeps_its_pieces_when_it_is_widened(names):
    layer = layer_of(names)
    wider = layer.widened(layer.sizes.width + 128)
    assert wider.sizes.width == layer.sizes.width + 128 and wider.parts().keys() == layer.parts().keys()
    np.testing.assert_allclose(wider(rows()), layer(rows()), rtol=1e-6, atol=1e-6)
    assert layer.widened(layer.sizes.width) is layer
    again = QuantizedLinear(**layer.parts())
    assert nnx.graphdef(again) == nnx.graphdef(layer)


@pytest.mark.parametrize("names", PIECES.values(), ids=PIECES.keys())
def test_checkpoints_keep_every_piece(names, tmp_path):
    model = nnx.Dict({"only": layer_of(names)})
    fqjax.save(tmp_path / "out", model)
    again = fqjax.load(tmp_path / "out", nnx.Dict({"only": nnx.Linear(K, N, rngs=nnx.Rngs(1))}))
    layer = quantized_layers(again)["only"]
    assert nnx.graphdef(again) == nnx.graphdef(model) and layer.recipe == '{"name": "test"}'
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    np.testing.assert_array_equal(layer(rows(1)), model["only"](rows(1)))


def test_an_unsound_piece_is_found_when_a_checkpoint_is_loaded(tmp_path):
    model = nnx.Dict({"only": layer_of(["finish"])})
    model["only"].finish.set_value(Squash(gain=jnp.zeros(N)))
    fqjax.save(tmp_path / "out", model)
    with pytest.raises(InputError, match="'only' has a scale that is not above 0"):
        fqjax.load(tmp_path / "out", nnx.Dict({"only": nnx.Linear(K, N, rngs=nnx.Rngs(1))}))
