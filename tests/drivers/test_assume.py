"""Quantization without calibration data: scales by the weights alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.drivers.assume import TOKENS, expert_shares, statistics_of_nothing
from fqjax.layers.experts import Expert, MixtureOfExperts
from fqjax.layers.stacked import quantized_layers
from fqjax.presets import PRESETS
from fqjax.runtime.errors import InputError

K, N = 300, 24


@pytest.fixture(scope="module")
def model():
    return nnx.Sequential(nnx.Linear(K, N, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(N, 8, rngs=nnx.Rngs(1)))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 20, K])
def test_channels_of_a_group_are_alike_and_independent(size, channels):
    found = statistics_of_nothing(channels, 1.0)
    assert (found.absmax == 1).all()
    for start in range(0, channels, size):
        part = found.samples[:, start : start + size]
        np.testing.assert_array_equal(part.T @ part, np.eye(part.shape[1]))


@pytest.mark.parametrize("scheme", [name for name, preset in PRESETS.items() if preset.calibration == "optional"])
def test_scales_round_each_group_of_the_weight_best(model, scheme):
    quantized, report = fqjax.quantize(model, scheme)
    assert report.calibration is None and [row.macs for row in report.layers] == [K * N, N * 8]
    assert all(row.silent_channels is None and row.bits == 4 for row in report.layers)
    layer, weight = next(iter(quantized_layers(quantized).values())), np.asarray(model.layers[0].kernel[...].T)
    rounded = np.asarray(layer.weight.get_value().dequantize())[:, :K]
    whole = np.stack([np.abs(weight[:, i : i + 128]).max(1) / 7.5 for i in range(0, K, 128)])
    best = np.full((3, N), np.inf)
    for shrink in 1 - np.arange(11) / 20:
        step = np.repeat((shrink * whole).T, 128, axis=1)[:, :K]
        change = (np.clip(np.round(weight / step), -8, 7) * step - weight) ** 2
        best = np.minimum(best, [change[:, i : i + 128].sum(1) for i in range(0, K, 128)])
    error = ((rounded - weight) ** 2).sum()
    allowed = 1.0001 if scheme in ("w4a8", "w4a16") else 1.3  # Of integer scales, those beside the best.
    assert error <= allowed * best.sum()
    assert report.layers[0].relative_error == pytest.approx(error / (weight**2).sum(), rel=0.3)


def test_the_result_is_near_that_with_data(model):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, K)), jnp.float32)
    exact = model(x)
    error = {}
    for name, data in {"none": None, "some": [x]}.items():
        quantized, _ = fqjax.quantize(model, "w4a16", data)
        error[name] = float(jnp.mean((quantized(x) - exact) ** 2) / jnp.mean(exact**2))
    assert error["some"] <= error["none"] < 2 * error["some"] < 0.05


@pytest.mark.parametrize("scheme", ["flattenquant", "w8a8", "smoothquant", "w4a8-gptq", "w4a16-awq"])
def test_other_schemes_say_which_can_do_without_data(model, scheme):
    with pytest.raises(InputError, match=f"'{scheme}' needs calibration data.*; w4a8, w4a8-integer.* w4a16 do without"):
        fqjax.quantize(model, scheme)


@pytest.mark.parametrize(
    ("settings", "calibration"),
    [([], "optional"), (["int4_share=0.5"], "needed"), (["int4_share=0"], "optional"), (["int8_layers=0"], "optional")],
)
def test_a_choice_of_bits_needs_data(settings, calibration):
    assert PRESETS["w4a8"].override(settings).calibration == calibration
    assert PRESETS["bf16"].calibration == "none"


def test_layers_kept_in_int8_need_no_data_either(model):
    report = fqjax.quantize(model, PRESETS["w4a8"].override(["int8_layers=0"]))[1]
    assert [row.bits for row in report.layers] == [8, 4]


def test_experts_get_equal_shares_of_the_tokens():
    rngs = nnx.Rngs(0)
    experts = [Expert(nnx.Linear(8, 16, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)) for _ in range(8)]
    mixture = MixtureOfExperts(nnx.Linear(8, 8, rngs=rngs), experts, 2, normalized=True)
    shares = expert_shares(nnx.Dict({"mlp": mixture}))
    assert shares == {"mlp.experts.": 0.25}
    assert statistics_of_nothing(8, shares["mlp.experts."]).rows == TOKENS // 4
