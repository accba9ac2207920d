"""A matmul with a gate: the kernel's sums in interpret mode, that it lowers for CUDA, and which implementation is taken.

With a GPU, every configuration is compared with the matmul and the quantization one after the other.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Weight, device, gated_matmul, unpack_int4
from pallas_kernels.matmul import gated
from pallas_kernels.matmul.hopper import decode, gate, launch, tuning
from pallas_kernels.matmul.hopper.decode import DecodeConfig
from pallas_kernels.matmul.hopper.decoders import Int4Shifted, Int8
from pallas_kernels.matmul.hopper.gemm import GemmConfig
from pallas_kernels.matmul.hopper.problem import Gate
from pallas_kernels.mosaic import compat
from tests.kernels.matmul.test_hopper import (
    FLOAT,
    FOLDED,
    INTEGER,
    KINDS,
    WEIGHT_ONLY,
    changed,
    interpreted,
    needs_hopper,
    operands,
    problem,
)

CODES = [kind for kind in KINDS if kind != "weight_only"]
GATE = Gate(activation="silu", qmax=127, extra=128)
PER_TOKEN = Gate(activation="silu", qmax=127, per_token=True)


def recipe(half, extra, seed=0):
    """Multiplier, sources in no order, some of them for padding, and parts."""
    rng = np.random.default_rng(seed)
    multiplier = rng.uniform(0.5, 2, half)
    source = rng.integers(0, half, extra)
    source[-extra // 8 :] = 0
    part = rng.integers(1, 4, extra)
    part[-extra // 8 :] = 1 << 20
    return jnp.asarray(multiplier, jnp.float32), jnp.asarray(source, jnp.int32), jnp.asarray(part, jnp.int32)


def arguments(p, extra, seed=0):
    """Of :func:`gated_matmul`, such that codes are of all sizes and some reach beyond the largest one."""
    x, weight, x_scale, weight_scale, groups, bias = operands(p, seed)
    weight_scale = weight_scale * 2e-5 / (8 if p.decoder.operands else 1) / (1 if p.decoder.bits == 8 else 0.06)
    multiplier, source, part = recipe(p.n // 2, extra, seed)
    weight = Weight(p.decoder, weight, weight_scale, groups)
    return (x, weight, x_scale, multiplier * 20, source, part), {"bias": bias, "out_dtype": p.out_dtype}


def one_after_the_other(given, kinds):
    """The reference, not jitted as a whole: XLA would not round the product to its dtype where it need not write it."""
    return gated_matmul(*given, **kinds, implementation="xla")


def close(found, wanted):
    """Codes are the same, but for few that are one apart; scales to float32's rounding."""
    apart = np.abs(np.asarray(found.codes, np.int32) - np.asarray(wanted.codes))
    assert found.codes.shape == wanted.codes.shape and apart.max() <= 1 and (apart > 0).mean() < 0.002
    assert 0.02 < (np.abs(np.asarray(wanted.codes)) > 5).mean() < 0.98
    if wanted.scale is not None:
        np.testing.assert_allclose(found.scale, wanted.scale, rtol=1e-5)


@pytest.mark.sample(1)
@interpreted
@pytest.mark.parametrize(
    ("p", "config"),
    [
        (problem(16, 512, 1024, 4), DecodeConfig(splits=1, stages=3)),
        (problem(5, 512, 768, 8), DecodeConfig(splits=1, stages=5, ctas=3)),
        (problem(16, 256, 768, 4, **INTEGER), DecodeConfig(splits=1)),
        (problem(16, 512, 768, 4, **FLOAT), DecodeConfig(splits=1)),
        (problem(16, 256, 768, 4, **FOLDED), DecodeConfig(splits=1, fold=True)),
    ],
)
def test_the_sums_of_both_halves_in_interpret_mode(p, config):
    x, weight, _, _, groups, _ = operands(p)
    given = dataclasses.replace(p, gate=PER_TOKEN)
    kernel = decode.build(given, config, interpret=compat.interpret_params())
    ones = jnp.ones(p.n // 2)
    (found,) = kernel(weight, x, jnp.ones(p.n), jnp.ones(1), *(() if groups is None else (groups,)), ones)
    halves = np.asarray(found)[:, : p.m].reshape(-1, 2, 64, p.m).swapaxes(0, 1).reshape(p.n, p.m)
    (wanted,) = decode.build(p, config, interpret=compat.interpret_params())(
        weight, x, jnp.ones(p.n), jnp.ones(1), *(() if groups is None else (groups,))
    )
    np.testing.assert_allclose(
        halves, np.asarray(wanted)[: p.n, : p.m], rtol=1e-5 if p.decoder.total_dtype == jnp.float32 else 0
    )


@pytest.mark.smoke
@pytest.mark.sample(4)
@pytest.mark.parametrize("gate", [GATE, PER_TOKEN, Gate(activation="relu", qmax=7)])
@pytest.mark.parametrize(("m", "dtype"), [(1, "bfloat16"), (13, "float32"), (64, "bfloat16")])
@pytest.mark.parametrize("kind", ["int8", "int4", "integer", "folded"])
def test_kernels_lower_for_cuda(kind, m, dtype, gate):
    bits, scales = KINDS[kind]
    p = problem(m, 1024, 2048, bits, out_dtype=jnp.dtype(dtype), per_token=True, bias=True, gate=gate, **scales)
    given = recipe(512, gate.extra)[: 3 if gate.extra else 1]
    f = jax.jit(lambda *a: launch.gated_matmul(p, DecodeConfig(splits=1), *a))
    text = f.trace(*operands(p), given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"m": 65}, "65 rows are more than 64"),
        ({"n": 384}, "N = 384 is not a multiple of 256"),
        ({"out_dtype": jnp.dtype("int32")}, "there must be codes, one weight, and scales"),
        (WEIGHT_ONLY, "there must be codes"),
        ({"gate": Gate(activation="gelu", qmax=127)}, "they know no gelu"),
        ({"gate": Gate(activation="silu", qmax=127, extra=64)}, "64 extra channels are not one of 128"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(change, reason):
    p = problem(4, 512, 256, 4, gate=GATE)
    assert launch.cannot_use(p) is None
    assert reason in launch.cannot_use(changed(p, **change))


@pytest.mark.parametrize(
    "config",
    [DecodeConfig(splits=2), DecodeConfig(splits=1, warpgroups=4), DecodeConfig(splits=1, warpgroups=1), GemmConfig()],
)
def test_configurations_without_two_halves_are_refused(config):
    p = problem(16, 1536, 2048, 8)
    assert tuning.fits(p, config) and not tuning.fits(dataclasses.replace(p, gate=GATE), config)


def test_a_gate_is_taken_unless_k_had_better_be_split(monkeypatch):
    measured = {1: DecodeConfig(splits=1, warpgroups=4), 16: DecodeConfig(splits=2), 64: None}
    shapes = [(4, None, 28672, 4096), (4, None, 512, 14336)]  # Of the second, four CTAs would do all the work.
    monkeypatch.setattr(tuning, "_table", lambda device: dict.fromkeys(shapes, measured))
    p = problem(1, 28672, 4096, 4, gate=GATE)
    one, many, most = (tuning.choose(dataclasses.replace(p, m=m), "a GPU") for m in (1, 16, 64))
    assert one == many == dataclasses.replace(tuning.GATED_CONFIG, stages=5) and most is None
    assert tuning.choose(problem(16, 512, 14336, 4, gate=GATE), "a GPU") is None
    assert tuning.choose(problem(1, 512, 14336, 4, gate=GATE), "a GPU") == one


@pytest.mark.smoke
@pytest.mark.sample(2)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", CODES)
def test_it_is_the_matmul_and_what_follows_it(kind, per_token):
    bits, scales = KINDS[kind]
    p = problem(5, 512, 512, bits, out_dtype=jnp.dtype("bfloat16"), bias=True, per_token=True, **scales)
    given, kinds = arguments(p, 128)
    found = gated_matmul(*given, **kinds, activation="silu", qmax=127, per_token=per_token)
    assert found.codes.dtype == jnp.int8 and found.codes.shape == (5, 256 + 128) and (found.scale is None) != per_token
    y = expected_product(p, given, kinds)
    h = y[:, :256] / (1 + np.exp(-y[:, :256])) * y[:, 256:] * np.asarray(given[3])
    if per_token:
        np.testing.assert_allclose(found.scale, np.abs(h).max(-1) / 127, rtol=1e-4)
        h = h / np.asarray(found.scale)[:, None]
    apart = np.abs(np.clip(np.round(h), -127, 127) - np.asarray(found.codes, np.int32)[:, :256])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def expected_product(p, given, kinds):
    """In float64, rounded to the dtype of the output."""
    x, weight, x_scale = given[:3]
    groups = np.ones((p.k // 128, p.n)) if weight.group_scale is None else np.asarray(weight.group_scale, np.float64)
    codes = np.asarray(unpack_int4(weight.codes) if p.decoder.bits == 4 else weight.codes, np.float64)
    codes = codes * groups.repeat(128, axis=0).T
    y = np.asarray(x, np.float64) @ codes.T * np.asarray(x_scale)[:, None] * np.asarray(weight.scale) + np.asarray(
        kinds["bias"]
    )
    return np.asarray(jnp.asarray(y, jnp.float32).astype(p.out_dtype), np.float64)


def test_transformations():
    p = problem(6, 512, 512, 8, out_dtype=jnp.dtype("bfloat16"))
    given, kinds = arguments(p, 128)
    f = lambda x, *rest: gated_matmul(x, *rest, **kinds, activation="silu", qmax=127)  # noqa: E731
    wanted = f(*given).codes
    x, *rest = given
    in_three = jax.jit(jax.vmap(lambda x: f(x, *rest).codes))(x.reshape(3, 2, -1))
    assert in_three.reshape(wanted.shape).tolist() == wanted.tolist()
    assert f(x.reshape(3, 2, -1), *rest).codes.reshape(wanted.shape).tolist() == wanted.tolist()
    assert f(x[:0], *rest).codes.shape == (0, 384)
    with pytest.raises(NotImplementedError, match="gated_matmul cannot be differentiated"):
        jax.grad(
            lambda scale: gated_matmul(
                x, rest[0], scale, *rest[2:], **kinds, activation="silu", qmax=127, per_token=True
            )[1].sum()
        )(jnp.float32(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation 'swish' is not one of: silu, relu, gelu"),
        ({"out_dtype": jnp.int32}, "out_dtype must be a floating dtype, got int32"),
        ({"decoder": Int4Shifted()}, "has 512 input channels, the weight has 1024"),
        ({"bias": jnp.ones(3)}, r"bias must be \(512,\), got \(3,\)"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given, kinds = arguments(problem(2, 512, 512, 8, out_dtype=jnp.dtype("bfloat16")), 128)
    settings = {"activation": "silu", "qmax": 127} | kinds | change
    x, weight, *rest = given
    weight = dataclasses.replace(weight, decoder=settings.pop("decoder", weight.decoder))
    with pytest.raises(ValueError, match=message):
        gated_matmul(x, weight, *rest, **settings)


def test_a_recipe_of_other_channels_is_refused():
    (*given, multiplier, source, part), kinds = arguments(problem(2, 512, 512, 8, out_dtype=jnp.dtype("bfloat16")), 128)
    with pytest.raises(ValueError, match=r"gated_matmul: .* needs multiplier \(256,\)"):
        gated_matmul(*given, multiplier[1:], source, part, **kinds, activation="silu", qmax=127)


def test_an_odd_number_of_channels_has_no_halves():
    weight, recipe = Weight(Int8(), jnp.ones((3, 256), jnp.int8)), (jnp.ones(1), *[jnp.zeros(0, jnp.int32)] * 2)
    with pytest.raises(ValueError, match="3 channels are no two halves"):
        gated_matmul(jnp.ones((2, 256), jnp.int8), weight, 1.0, *recipe, activation="silu", qmax=127)


@pytest.fixture
def hopper(monkeypatch):
    """A process that believes to have an H200, and the problems its kernel got."""
    calls = []

    def kernel(p, config, *operands, recipe):
        calls.append((p, config))
        return tuple(jnp.zeros(a.shape, a.dtype) for a in gate.Gating(p, p.gate, config.warpgroups, 64).out())

    monkeypatch.setattr(device, "hopper_device", lambda: "NVIDIA H200")
    monkeypatch.setattr(launch, "gated_matmul", kernel)
    device.clear_caches()
    yield calls
    device.clear_caches()


@pytest.mark.parametrize("per_token", [False, True])
def test_the_kernel_is_taken_where_it_can_be(hopper, per_token):
    p = problem(16, 28672, 512, 4, out_dtype=jnp.dtype("bfloat16"), per_token=True)
    given, kinds = arguments(p, 128)
    found = gated_matmul(*given, **kinds, activation="silu", qmax=127, per_token=per_token, implementation="mosaic")
    ((taken, config),) = hopper
    assert taken.gate == Gate(activation="silu", qmax=127, extra=0 if per_token else 128, per_token=per_token)
    assert tuning.fits(taken, config) and found.codes.shape == (16, 14336 + 128)


def test_two_kernels_are_taken_where_one_cannot_do_it(hopper, monkeypatch):
    monkeypatch.setattr(gated, "matmul", lambda kind, implementation: kind.xla)
    p = problem(65, 512, 512, 8, out_dtype=jnp.dtype("bfloat16"))
    given, kinds = arguments(p, 128)
    found = gated_matmul(*given, **kinds, activation="silu", qmax=127)
    assert not hopper and found.codes.shape == (65, 384)
    with pytest.raises(NotImplementedError, match=r"gated_matmul: implementation 'mosaic' .* 65 rows are more than 64"):
        gated_matmul(*given, **kinds, activation="silu", qmax=127, implementation="mosaic")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("m", [1, 13, 64])
@pytest.mark.parametrize("gate", [dataclasses.replace(GATE, extra=384), PER_TOKEN, Gate(activation="relu", qmax=127)])
def test_every_configuration_on_the_gpu(kind, m, gate):
    bits, scales = KINDS[kind]
    shape = {"out_dtype": jnp.dtype("float32" if gate.activation == "relu" else "bfloat16"), "bias": True}
    for n, k in ((2560, 1280), (28672, 512)):  # Of the second, some CTAs have two blocks.
        p = problem(m, n, k, bits, per_token=m > 1, **shape, **scales)
        given, kinds = arguments(p, gate.extra)
        kinds |= {"activation": gate.activation, "qmax": gate.qmax, "per_token": gate.per_token}
        wanted = one_after_the_other(given, kinds)
        for config in tuning.candidates(dataclasses.replace(p, gate=gate))[: None if n < 28672 else 1]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tuning, "choose", lambda p, device, config=config: config)
                device.clear_caches()
                f = jax.jit(lambda *a, kinds=kinds: gated_matmul(*a, **kinds, implementation="mosaic"))
                close(f(*given), wanted)
    device.clear_caches()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("kind", "gate"), [*itertools.product(("int8", "int4", "integer"), (GATE, PER_TOKEN))])
@pytest.mark.parametrize("m", [1, 16, 64])
def test_no_races_in_fifty_runs(kind, gate, m):
    bits, scales = KINDS[kind]
    p = problem(m, 28672, 4096, bits, out_dtype=jnp.dtype("bfloat16"), **scales)
    for seed in range(5):
        given, kinds = arguments(p, gate.extra, seed)
        kinds |= {"activation": gate.activation, "qmax": gate.qmax, "per_token": gate.per_token}
        f = jax.jit(lambda *a, kinds=kinds: gated_matmul(*a, **kinds, implementation="mosaic"))
        first = f(*given)
        close(first, one_after_the_other(given, kinds))
        for _ in range(9):
            again = f(*given)
            assert all(bool(jnp.array_equal(a, b)) for a, b in zip(again, first, strict=True) if a is not None)
