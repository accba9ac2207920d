"""Weights to and from qwix."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.runtime.errors import InputError

K, N = 96, 40


@pytest.fixture
def qwix():
    return pytest.importorskip("qwix", reason="needs qwix, which only the 'parity' extra installs")


def layer(scheme):
    linear = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    batch = jax.random.normal(jax.random.key(1), (32, K))
    model, _ = fqjax.quantize(nnx.Sequential(linear), scheme, [batch])
    return model.layers[0]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-integer-scale", "w4a16", "flattenquant-hopper-int4"])
def test_the_weight_is_kept(qwix, scheme):
    chosen = fqjax.PRESETS[scheme].override(["max_expansion=1"] if scheme.startswith("flatten") else [])
    quantized = layer(chosen)
    weight = quantized.weight.get_value()
    array = fqjax.to_qwix(quantized)
    np.testing.assert_array_equal(qwix.dequantize(array).T, weight.dequantize()[:, :K])
    assert array.qvalue.dtype == (jnp.int4 if weight.format.bits == 4 else jnp.int8)
    again = fqjax.from_qwix(array)
    np.testing.assert_array_equal(again.dequantize()[:, :K], weight.dequantize()[:, :K])
    np.testing.assert_array_equal(again.unpacked()[:, :K], weight.unpacked()[:, :K])
    assert again.shape == weight.shape


@pytest.mark.parametrize(
    ("qtype", "axes", "tiles"),
    [
        (jnp.int8, (), {}),
        (jnp.int8, (1,), {}),
        (jnp.int4, (1,), {0: 32}),
        (jnp.int4, (1,), {0: 48}),
        (jnp.int8, (1,), {0: 16}),
    ],
)
def test_what_qwix_quantizes_is_taken(qwix, qtype, axes, tiles):
    kernel = jax.random.normal(jax.random.key(0), (K, N))
    array = qwix.quantize(kernel, qtype, channelwise_axes=axes, tiled_axes=tiles)
    weight = fqjax.from_qwix(array)
    np.testing.assert_array_equal(weight.dequantize()[:, :K].T, qwix.dequantize(array))
    assert getattr(weight.format, "group_size", 0) == {32: 32, 48: 16, 16: 16}.get(tiles.get(0), 0)


@dataclasses.dataclass
class Lookalike:
    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None

    @property
    def qtype(self):
        return self.qvalue.dtype


CODES = jnp.ones((K, N), jnp.int8)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (Lookalike(CODES[0], jnp.ones(1)), r"shape \(40,\); expected a matrix"),
        (Lookalike(CODES.astype(jnp.float32), jnp.ones((1, 1))), "codes of float32; expected int4 or int8"),
        (Lookalike(CODES, jnp.ones((1, 1)), jnp.ones((1, 1), jnp.int8)), "zero point"),
        (Lookalike(CODES, jnp.zeros((1, 1))), "not a finite number above 0"),
        (Lookalike(CODES, jnp.ones((1, 5))), r"scales \(1, 5\) of an array \(96, 40\)"),
        (Lookalike(CODES, jnp.ones((12, N))), "groups of 8 channels; expected a multiple of 16"),
    ],
)
def test_what_cannot_be_taken(array, message):
    with pytest.raises(InputError, match=message):
        fqjax.from_qwix(array)


def test_flattened_channels_are_refused(qwix):
    quantized = layer("w8a8")
    figures = dataclasses.replace(quantized.figures, flattened=3)
    quantized = quantized.changed(quantized.weight.get_value(), quantized.input.get_value(), figures)
    with pytest.raises(InputError, match="3 flattened channels"):
        fqjax.to_qwix(quantized)


def test_qwix_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match="qwix is not installed; pip install qwix"):
        fqjax.to_qwix(layer("w8a8"))
