import jax.numpy as jnp
import numpy as np

from fqjax.core.wide import WideLinear, output, relative_error, round_weight
from fqjax.methods.absmax import scale_by_absmax


def layer(seed=0, bits=8):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(12, 20)), rng.normal(size=(30, 20))
    weight, x = jnp.asarray(weight, jnp.float32), jnp.asarray(x, jnp.float32)
    return scale_by_absmax(weight, jnp.abs(x).max(0), jnp.ones(20), bits), x, weight


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
    ones = jnp.ones(4, jnp.int32)
    codes = round_weight(weight, jnp.ones(4), jnp.float32(1), ones, 8)
    wide = WideLinear(jnp.ones(4), jnp.float32(1), jnp.float32(1), ones, ones, codes, 8)
    assert float(relative_error(wide, jnp.asarray([[1.0, 2, 3, 4]]), weight)) == 0
    assert float(relative_error(wide, jnp.zeros((1, 4)), weight)) == 0


def test_codes_of_sixteen_pieces_fit_their_type():
    pieces = jnp.full(1, 16, jnp.int32)
    codes = round_weight(jnp.full((1, 1), 1e9), jnp.ones(1), jnp.float32(1), pieces, 8)
    assert codes.tolist() == [[16 * 127]]
