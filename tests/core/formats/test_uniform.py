import dataclasses

import jax.numpy as jnp
import numpy as np

from fqjax.core.formats.uniform import Grid, output, relative_error
from fqjax.core.layer import LayerInputs
from fqjax.methods.absmax import absmax_grid


def layer(seed=0, bits=8):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(12, 20)), rng.normal(size=(30, 20))
    weight, x = jnp.asarray(weight, jnp.float32), jnp.asarray(x, jnp.float32)
    inputs = LayerInputs(weight, jnp.abs(x).max(0), x)
    return absmax_grid(inputs, jnp.ones(20), bits).round(weight), x, weight


def unit_grid(k, pieces=1):
    """Codes of 8 bits that stand for themselves."""
    one, many = jnp.float32(1), jnp.full(k, pieces, jnp.int32)
    return Grid(smoothing=jnp.ones(k), x_scale=one, w_scale=one, x_pieces=many, w_pieces=many, x_bits=8, bits=8)


def test_output_is_the_product_of_the_rounded_operands():
    wide, x, _ = layer()
    codes = np.clip(np.rint(np.asarray(x) * np.asarray(wide.multiplier)), -127, 127)
    expected = (codes * float(wide.x_scale)) @ (np.asarray(wide.w_codes) * float(wide.w_scale)).T
    np.testing.assert_allclose(output(wide, x), expected, rtol=1e-4, atol=1e-5)


def test_the_error_falls_with_the_bits():
    errors = [float(relative_error(*layer(bits=bits))) for bits in (8, 4)]
    assert 0 < errors[0] < 1e-3 < errors[1] < 0.2


def test_an_exact_layer_has_no_error():
    weight = jnp.eye(4)
    wide = unit_grid(4).round(weight)
    assert float(relative_error(wide, jnp.asarray([[1.0, 2, 3, 4]]), weight)) == 0
    assert float(relative_error(wide, jnp.zeros((1, 4)), weight)) == 0


def test_codes_of_sixteen_pieces_fit_their_type():
    assert unit_grid(1, pieces=16).round(jnp.full((1, 1), 1e9)).w_codes.tolist() == [[16 * 127]]


def test_a_scale_for_every_output_channel():
    _, _, weight = layer()
    scale = jnp.abs(weight).max(1) / 127
    wide = dataclasses.replace(unit_grid(20), w_scale=scale).round(weight)
    np.testing.assert_allclose(wide.weight, np.rint(weight / scale[:, None]) * scale[:, None], rtol=1e-6)
    assert (np.abs(wide.w_codes).max(axis=1) == 127).all()


def test_activations_and_weights_have_bits_of_their_own():
    _, x, weight = layer()
    grid = dataclasses.replace(unit_grid(20), bits=4)
    assert np.abs(grid.round(100 * weight).w_codes).max() == 7
    assert np.abs(grid.activations(1000 * x)).max() == 127


def test_codes_are_rounded_half_to_even_and_clipped_by_channel():
    one, whole = jnp.float32(1), jnp.asarray([1, 1, 1, 2])
    grid = Grid(smoothing=jnp.ones(4), x_scale=one, w_scale=one, x_pieces=whole, w_pieces=whole, x_bits=4, bits=4)
    codes = grid.round(jnp.asarray([[0.5, 1.5, 9.0, -30.0]])).w_codes
    assert codes.tolist() == [[0, 2, 7, -14]] and codes.dtype == jnp.int16
