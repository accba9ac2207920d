"""Norm or activation, quantization and flattening in one pass: the kernel in interpret mode, and XLA, against NumPy."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_activated, quantize_normalized, quantize_per_token
from pallas_kernels.attention.parts import Parts
from pallas_kernels.device import NO_GPU, capability
from pallas_kernels.quantize import dispatch as rows
from pallas_kernels.quantize.kind import Quantization
from tests.kernels import ahead_of_time
from tests.kernels.quantize.test_activations import oracle

EPSILON = 1e-5
FRONTS = {
    "plain": {},
    "rms norm": {"epsilon": EPSILON, "weight": True},
    "bare rms norm": {"epsilon": EPSILON},
    "sum, rms norm": {"epsilon": EPSILON, "weight": True, "residual": True},
    "sum, layer norm": {"epsilon": EPSILON, "center": True, "weight": True, "bias": True, "residual": True},
    "silu, gated": {"activation": "silu", "gated": True},
    "gelu, gated": {"activation": "gelu", "gated": True},
    "relu": {"activation": "relu"},
    "attention": {"parts": Parts(3, 2, 64)},
}
IN_TRITON = [(name, p) for name in FRONTS if not name.startswith("gelu") for p in (False, True)]
SIZES = [(1, 128, 0), (3, 384, 128), (5, 1664, 256), (2, 14336, 384)]
"""Rows, channels, extra channels; one to five powers of two make them up."""
MANY = (rows.ROWS_IN_PIECES + 1, 384, 128)


def kind(front, per_token, qmax=127):
    return Quantization(name="quantize_rows", qmax=qmax, per_token=per_token, **FRONTS[front])


def operands(kind, count_of_rows, k, extra, dtype=jnp.bfloat16, seed=0):
    """A twentieth of the channels is large, all of them flattened where there are extra ones."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(0.3, 2, (count_of_rows, k * (1 + kind.gated))), dtype)
    found = [x]
    if kind.parts is not None:
        count, group, dim = dataclasses.astuple(kind.parts)
        sums = rng.normal(0, 3, (count_of_rows, k // (group * dim), count, group))
        sums[:, :, 0][rng.random(sums[:, :, 0].shape) < 0.3] = -np.inf  # Parts without positions find nothing.
        x = rng.normal(0.3, 2, (*sums.shape, dim))
        x[~np.isfinite(sums)] = np.nan
        found = [jnp.asarray(array.reshape(count_of_rows, -1), jnp.float32) for array in (x, sums)]
    if kind.residual:
        found.append(jnp.asarray(rng.normal(0.3, 2, x.shape), dtype))
    if kind.weight:
        found.append(jnp.asarray(rng.uniform(0.5, 2, k), dtype))
    if kind.bias:
        found.append(jnp.asarray(rng.normal(0, 1, k), dtype))
    multiplier = rng.uniform(10, 40, k).astype(np.float32)
    source = rng.integers(0, k, extra).astype(np.int32)
    multiplier[source] *= 8
    part = rng.choice([1, 2, 3, 1 << 20], extra).astype(np.int32)
    return [*found, *map(jnp.asarray, (multiplier, source, part))]


def check(kind, found, given):
    """Equal to NumPy in float64, but for values that are within float32's rounding of a half."""
    x, sums, _, residual, weight, bias, (multiplier, source, part) = kind.split(given)
    k, extra = multiplier.shape[0], source.shape[0]
    codes, *rest = map(np.asarray, found)
    y = np.asarray(x, np.float64)
    if kind.parts is not None:
        shape = (len(y), -1, kind.parts.count, kind.parts.group)
        shares = np.exp(np.asarray(sums, np.float64).reshape(shape))[..., None]
        y = np.where(shares > 0, y.reshape(*shape, kind.parts.dim), 0)
        y = ((y * shares).sum(2) / shares.sum(2)).reshape(len(y), -1)
    if residual is not None:
        y = y + np.asarray(residual, np.float64)
        np.testing.assert_array_equal(rest[-1], np.asarray(y.astype(np.float32)).astype(rest[-1].dtype))
    if kind.epsilon is not None:
        y = y - y.mean(-1, keepdims=True) if kind.center else y
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + kind.epsilon)
        y = y if weight is None else y * np.asarray(weight, np.float64)
        y = y if bias is None else y + np.asarray(bias, np.float64)
    if kind.activation is not None:
        functions = {
            "silu": lambda x: x / (1 + np.exp(-x)),
            "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
            "relu": lambda x: np.maximum(x, 0),
        }
        y = functions[kind.activation](y[:, :k]) * (y[:, k:] if kind.gated else 1)
    y = y * np.asarray(multiplier)
    if kind.per_token:
        scale = np.maximum(np.abs(y).max(-1), 1e-8) / kind.qmax
        np.testing.assert_allclose(rest[0], scale, rtol=1e-5)
        y = y / scale[:, None]
        part = jnp.full(extra, 1 << 20)
    wanted = oracle(y, np.float32(1), np.asarray(source), np.asarray(part), kind.qmax)
    unsure = np.abs(np.abs(y - np.trunc(y)) - 0.5) < 2e-5 * np.maximum(np.abs(y), 1)
    unsure = np.concatenate([unsure, unsure[:, np.asarray(source)]], axis=-1)
    assert codes.shape == wanted.shape and unsure.mean() < 0.02
    np.testing.assert_array_equal(np.where(unsure, 0, codes), np.where(unsure, 0, wanted))


@pytest.mark.smoke
@pytest.mark.sample(5)
@pytest.mark.parametrize(("front", "per_token"), IN_TRITON)
@pytest.mark.parametrize("sizes", [*SIZES, MANY])
def test_the_kernel_in_interpret_mode(front, per_token, sizes):
    p = kind(front, per_token)
    given = operands(p, *sizes)
    check(p, rows.call(p, *given, interpret=True), given)


@pytest.mark.parametrize("sizes", [*SIZES, MANY])
def test_magnitudes_that_are_known_are_not_looked_for(sizes):
    """The row itself would give another scale."""
    known = dataclasses.replace(kind("plain", True), largest=True)
    x, *how = operands(kind("plain", True), *sizes)
    largest = np.abs(np.asarray(x, np.float32) * np.asarray(how[0])).reshape(len(x), -1, 16).max(-1)
    check(kind("plain", True), rows.call(known, x, jnp.asarray(largest), *how, interpret=True), [x, *how])
    _, scale = rows.call(known, x, jnp.asarray(2 * largest), *how, interpret=True)
    np.testing.assert_allclose(scale, 2 * largest.max(-1) / 127, rtol=1e-6)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("front", FRONTS)
def test_a_row_is_never_cut_into_more_pieces_than_pay(front, per_token):
    """Each of which reads it whole, where that is needed."""
    of = kind(front, per_token)
    for k, count in itertools.product([*range(128, 8192, 128), 12288, 14336, 28672], (1, 8, 9, 16, 17, 64)):
        size, warps = rows.best_piece(of, count, k)
        assert (size == 0) == (warps == 0)
        if size and of.whole:
            assert k // math.gcd(k, size) <= (rows.MOST_PIECES if count <= rows.WHOLE_ROWS_IN_PIECES else 8)
    assert rows.best_piece(of, rows.ROWS_IN_PIECES + 1, 4096) == (0, 0)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("count", [3, 9])
def test_heads_that_are_larger_than_a_piece(per_token, count):
    p = dataclasses.replace(kind("attention", per_token), parts=Parts(2, 2, 256))
    given = operands(p, count, 1024, 128)
    check(p, rows.call(p, *given, interpret=True), given)


@pytest.mark.smoke
@pytest.mark.sample(8)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("front", "sizes"),
    [
        *itertools.product(FRONTS, SIZES),
        *itertools.product([front for front in FRONTS if front != "attention"], [(4, 100, 0), (4, 130, 7)]),
    ],
)
def test_xla(front, per_token, sizes, dtype):
    p = kind(front, per_token, 7)
    given = operands(p, *sizes, dtype)
    check(p, rows.quantize(p, "xla")(*given), given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("front", "per_token"), IN_TRITON)
@pytest.mark.parametrize("sizes", [*SIZES, (700, 4096, 256), (1, 4096, 0), (300, 28672, 1024)])
def test_the_compiled_kernel(front, per_token, sizes, dtype):
    if capability() < (8, 0):
        pytest.skip(NO_GPU)
    p = kind(front, per_token)
    given = operands(p, *sizes, dtype)
    check(p, jax.jit(rows.quantize(p, "triton"))(*given), given)


@pytest.mark.thorough
@pytest.mark.skipif(not ahead_of_time.HAS_PLUGIN, reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize(("front", "per_token"), IN_TRITON)
def test_machine_code_for_a_hopper_gpu(front, per_token):
    p = kind(front, per_token)
    ahead_of_time.compile_for_h200(functools.partial(rows.call, p), *operands(p, 2, 14336, 384))


def test_values_beyond_the_codes_saturate():
    multiplier, source, part = jnp.full(128, 1e30), jnp.zeros(128, jnp.int32), jnp.full(128, 300)
    x = jnp.tile(jnp.asarray([[1.0, -1.0]], jnp.float32), (1, 64))
    p = kind("relu", False)
    for found in (rows.call(p, x, multiplier, source, part, interpret=True), p.xla(x, multiplier, source, part)):
        assert found[0][0, :2].tolist() == [127, 0] and not np.asarray(found[0])[:, 128:].any()


def test_a_row_of_zeros_stays_zero():
    p, none = kind("rms norm", True), jnp.zeros(0, jnp.int32)
    found = rows.call(p, jnp.zeros((2, 128)), jnp.ones(128), jnp.ones(128), none, none, interpret=True)
    assert not np.asarray(found[0]).any() and np.isfinite(found[1]).all()


def test_what_the_kernel_cannot_take_is_said():
    p = kind("rms norm", False)

    def reason(k=128, extra=0, dtype=jnp.bfloat16, count=4):
        _, _, recipe = (given := operands(p, count, k, extra, dtype))[0], given[1], given[2:]
        return rows.cannot_use(p, given[0], *recipe)

    assert reason() is None
    assert "100 channels" in reason(k=100) and "65536 channels" in reason(k=65536)
    assert "7 extra channels" in reason(extra=7)
    assert "nothing to do" in reason(count=0)
    gelu = kind("gelu, gated", False)
    x, *recipe = operands(gelu, 4, 128, 0)
    assert "knows no gelu" in rows.cannot_use(gelu, x, *recipe)
    parts = kind("attention", True)
    x, _, *recipe = operands(parts, 4, 128, 0)
    parts = dataclasses.replace(parts, parts=Parts(33, 2, 64))
    assert "33 parts, more than 32" in rows.cannot_use(parts, x, *recipe)
    with jax.enable_x64(True):
        assert "float64" in reason(dtype=jnp.float64)
    if capability() < (8, 0):
        with pytest.raises(NotImplementedError, match="quantize_per_token: implementation 'triton' cannot take x"):
            quantize_per_token(jnp.zeros((2, 128)), jnp.ones(128), qmax=127, width=128, implementation="triton")


def test_normalized_rows_under_transformations():
    x, residual = (jnp.asarray(np.random.default_rng(i).normal(0, 3, (4, 3, 64)), jnp.float32) for i in range(2))
    _, weight, multiplier, source, part = operands(kind("rms norm", False), 1, 64, 8)

    def quantize(x, residual, m, per_token=True):
        kinds = {"qmax": 127, "epsilon": EPSILON, "weight": weight, "residual": residual, "per_token": per_token}
        return quantize_normalized(x, m, source, part, **kinds)

    plain = quantize(x, residual, multiplier)
    assert plain.codes.shape == (4, 3, 72) and plain.scale.shape == (4, 3) and plain.x.shape == x.shape
    mapped = jax.vmap(quantize, (0, 0, None))(x, residual, multiplier)
    jax.tree.map(np.testing.assert_array_equal, mapped, plain)
    several = jax.vmap(quantize)(x, residual, jnp.stack([multiplier * (i + 1) for i in range(4)]))
    np.testing.assert_array_equal(several.codes[2], quantize(x[2], residual[2], multiplier * 3).codes)
    assert quantize(x, None, multiplier, per_token=False)[1:] == (None, None)
    with pytest.raises(NotImplementedError, match="quantize_normalized cannot be differentiated"):
        jax.grad(lambda x: quantize(x, None, multiplier).scale.sum())(x)


def test_operands_that_do_not_fit_are_refused():
    x, ones, none = jnp.zeros((2, 8)), jnp.ones(8), jnp.zeros(0, jnp.int32)
    normalize = functools.partial(quantize_normalized, x, ones, none, none, qmax=127, epsilon=EPSILON)
    with pytest.raises(ValueError, match=r"weight must be \(8,\), got \(3,\)"):
        normalize(weight=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"residual must be float32\(2, 8\), got bfloat16\(2, 8\)"):
        normalize(residual=x.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="'mosaic' is not one of: triton, xla"):
        normalize(implementation="mosaic")
    with pytest.raises(ValueError, match="activation 'tanh' is not one of: silu, relu, gelu"):
        quantize_activated(x, ones, none, none, activation="tanh", qmax=127)
    with pytest.raises(ValueError, match=r"needs multiplier \(4,\)"):
        quantize_activated(x, ones, none, none, activation="silu", gated=True, qmax=127)
