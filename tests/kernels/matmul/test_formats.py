"""One entry point for every weight format, and a format that the package does not know."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Decoder, Weight, pack_int4, quantized_matmul, scale_accumulator, unpack_int4
from pallas_kernels.matmul import reference
from pallas_kernels.matmul.hopper import launch
from pallas_kernels.matmul.hopper.decoders import DECODERS
from pallas_kernels.matmul.hopper.problem import Problem
from tests.kernels.matmul.test_matmul import codes


def operands(decoder):
    """Activations and a weight of 64 x 256."""
    whole = codes((64, 256), 127 if decoder.bits == 8 else 7, 1)
    scale = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, 64), jnp.float32)
    groups = None
    if decoder.scale_dtype is not None:
        groups = jnp.asarray(np.random.default_rng(3).integers(1, 16, (2, 64)), decoder.scale_dtype)
    weight = Weight(decoder, whole if decoder.bits == 8 else pack_int4(whole), scale, groups)
    return codes((5, 256), 127, 0).astype(decoder.x_dtype), weight, whole


def exact(x, weight, whole):
    """The accumulator in 64 bits."""
    groups = np.ones((2, 64)) if weight.group_scale is None else np.asarray(weight.group_scale, np.float64)
    return np.asarray(x, np.float64) @ (np.asarray(whole, np.float64) * groups.repeat(128, axis=0).T).T


@pytest.mark.parametrize("name", DECODERS)
def test_every_format_equals_64_bit_numpy(name):
    x, weight, whole = operands(DECODERS[name])
    found = jax.jit(quantized_matmul, static_argnames="out_dtype")(x, weight, 0.25, out_dtype=jnp.float32)
    wanted = exact(x, weight, whole) * 0.25 * np.asarray(weight.scale)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-3)


def test_sums_over_parts_of_k_are_scaled_to_the_bits_of_the_whole():
    x, weight, _ = operands(DECODERS["int8"])
    x_scale, bias = jnp.linspace(0.1, 0.3, 5), jnp.linspace(-3, 3, 64)
    parts = [reference.product(x[:, i : i + 128], weight.codes[:, i : i + 128]) for i in (0, 128)]
    found = scale_accumulator(parts[0] + parts[1], x_scale, weight.scale, bias)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, quantized_matmul(x, weight, x_scale, bias))


@dataclasses.dataclass(frozen=True)
class Signs(Decoder):
    """A format from outside: a code is positive or not, and stands for 3 or -3."""

    bits = 4

    @property
    def name(self):
        return "signs"

    @property
    def kind(self):
        return "signs"

    def accumulate(self, x, codes, group_scale):
        return reference.product(x, jnp.where(unpack_int4(codes) > 0, 3, -3).astype(jnp.int8))


def test_a_format_from_outside_is_multiplied_and_differentiation_is_refused():
    x, weight, whole = operands(Signs())
    found = jax.jit(lambda x, weight: quantized_matmul(x, weight, out_dtype=jnp.int32))(x, weight)
    np.testing.assert_array_equal(found, np.asarray(x, np.int64) @ np.where(np.asarray(whole) > 0, 3, -3).T)
    with pytest.raises(NotImplementedError, match="signs_matmul cannot be differentiated"):
        jax.grad(lambda s: quantized_matmul(x, weight, s, out_dtype=jnp.float32).sum())(jnp.float32(1))


def test_a_format_without_a_kernel_is_refused_by_name():
    problem = Problem(m=8, n=64, k=256, decoder=Signs(), out_dtype=jnp.dtype("bfloat16"))
    assert launch.cannot_use(problem) == "weights in the format 'signs' have no kernel"


def test_a_weight_without_the_arrays_of_its_format_is_refused():
    x, weight, _ = operands(DECODERS["integer"])
    with pytest.raises(ValueError, match="group_scale must be int16, got float32"):
        quantized_matmul(x, dataclasses.replace(weight, group_scale=weight.group_scale.astype(jnp.float32)))
    with pytest.raises(ValueError, match="group_scale must be int16, got None"):
        quantized_matmul(x, dataclasses.replace(weight, group_scale=None))
