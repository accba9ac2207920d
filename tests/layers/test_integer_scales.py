"""Grouped schemes from end to end, and integer scales put onto any of them."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import fqjax
from fqjax.core.formats.grouped import group_sums_of
from fqjax.core.inputs import PerToken
from fqjax.core.integer_scale import scaled_bound
from fqjax.core.overflow import LIMIT
from fqjax.core.transforms.base import Recipe
from fqjax.layers import integer_scales as module
from fqjax.layers.stacked import quantized_layers
from fqjax.runtime.errors import InputError

GROUPED = [name for name in fqjax.PRESETS if name.startswith("w4a")]


class Model(nnx.Module):
    """Channels that fill groups, and such that do not."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(256, 300, rngs=rngs), nnx.Linear(300, 64, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(64, 256)) / 8
    return [jnp.asarray(rng.normal(size=(80, 64)) @ mix, jnp.float32) for _ in range(4)]


@pytest.fixture(scope="module")
def model():
    return Model()


class Quantized(dict):
    """The model and its report by preset, each made when it is asked for."""

    def __init__(self, model, data):
        self.model, self.data = model, data

    def __missing__(self, name):
        self[name] = fqjax.quantize(self.model, name, self.data)
        return self[name]


@pytest.fixture(scope="module")
def quantized(model, data):
    return Quantized(model, data)


def error(model, other, x):
    return float(jnp.mean((model(x) - other(x)) ** 2) / jnp.mean(model(x) ** 2))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", GROUPED)
def test_presets(model, data, quantized, name):
    changed, report = quantized[name]
    kind = {"w4a8-integer-scale": ", integer", "w4a8-integer-scale-folded": ", folded"}
    kind = kind.get(name.removesuffix("-gptq").removesuffix("-awq"), "")
    assert {row.scales for row in report.layers} == {f"group of 128{kind}"}
    assert report.int4_mac_share == 1 and report.expansion == 1
    assert error(model, changed, data[-1]) < 0.02
    assert all(0 < row.relative_error < 0.02 for row in report.layers)


@pytest.mark.thorough
def test_integer_and_folded_scales_cost_little(model, data, quantized):
    for method in ("", "-gptq", "-awq"):
        exact = error(model, quantized[f"w4a8{method}"][0], data[-1])
        assert error(model, quantized[f"w4a8-integer-scale{method}"][0], data[-1]) < 1.03 * exact
        assert error(model, quantized[f"w4a8-integer-scale-folded{method}"][0], data[-1]) < 1.4 * exact
    assert error(model, quantized["w4a8-gptq"][0], data[-1]) < 0.7 * error(model, quantized["w4a8"][0], data[-1])


def test_activations_in_floating_point(model, data, quantized):
    changed, report = quantized["w4a16-gptq"]
    assert error(model, changed, data[-1]) < error(model, quantized["w4a8-gptq"][0], data[-1])
    layer = quantized_layers(changed)["second"]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 300)), jnp.float32)
    weight = layer.weight.get_value().dequantize()[:, :300]
    np.testing.assert_allclose(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert all(row["overflow_margin_bits"] is None for row in report.to_json()["layers"])
    with pytest.raises(InputError, match="it has none"):
        fqjax.integer_scales(changed)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["w4a8", "w4a8-integer-scale", "w4a8-integer-scale-folded", "w4a16-awq"])
def test_checkpoints(tmp_path, data, quantized, name):
    changed, report = quantized[name]
    fqjax.save(tmp_path / "out", changed)
    again = fqjax.load(tmp_path / "out", Model())
    np.testing.assert_array_equal(again(data[0]), changed(data[0]))
    assert fqjax.report_of(again).layers == report.layers


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["w4a8", "w4a8-gptq", "w4a8-awq"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_integer_scales_for_any_grouped_model(model, data, name, size):
    scheme = fqjax.PRESETS[name].override([f"group_size={size}"])
    before, _ = fqjax.quantize(model, scheme, data)
    after, report = fqjax.integer_scales(before)
    assert {row.scales for row in report.layers} == {f"group of {size}, integer"}
    for path, layer in quantized_layers(after).items():
        weight, old = layer.weight.get_value(), quantized_layers(before)[path].weight.get_value()
        np.testing.assert_array_equal(weight.codes, old.codes)
        assert weight.group_scale.dtype == jnp.int16 and int(weight.group_scale.min()) >= 1
        assert layer.figures.accumulator_bound <= LIMIT
    np.testing.assert_allclose(error(model, after, data[-1]), error(model, before, data[-1]), rtol=0.03)


def test_integer_scales_for_groups_in_int8(model, data):
    scheme = fqjax.PRESETS["w4a8"].override(["int4_share=0", "group_size=64"])
    before, report = fqjax.quantize(model, scheme, data)
    assert {row.bits for row in report.layers} == {8}
    after, report = fqjax.integer_scales(before, 256)
    assert {row.scales for row in report.layers} == {"group of 64, integer"}
    assert error(model, after, data[-1]) < 1.1 * error(model, before, data[-1])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_layers_in_int8_beside_folded_scales(model, data, share):
    """Codes of 8 bits leave no room for scales in their bytes, so theirs stay beside them."""
    scheme = fqjax.PRESETS["w4a8-integer-scale-folded"].override([f"int4_share={share}"])
    changed, report = fqjax.quantize(model, scheme, data)
    kinds = {8: "group of 128, integer", 4: "group of 128, folded"}
    assert 8 in {row.bits for row in report.layers} and all(row.scales == kinds[row.bits] for row in report.layers)
    assert error(model, changed, data[-1]) < (0.02 if share else 1e-3)
    for row in report.layers:
        assert row.relative_error < (1e-3 if row.bits == 8 else 0.02)


def test_as_in_the_paper_without_units(model, data, quantized):
    before, _ = quantized["w4a8"]
    after, _ = fqjax.integer_scales(before, 4096, units=False)
    layer, old = quantized_layers(after)["first"], quantized_layers(before)["first"]
    scales = old.weight.get_value().group_scale
    np.testing.assert_array_equal(layer.weight.get_value().group_scale, jnp.maximum(jnp.round(scales * 4096), 1))
    assert float(layer.weight.get_value().scale) == 1 / 4096
    assert error(model, fqjax.integer_scales(before, 16, units=False)[0], data[-1]) > error(model, after, data[-1])


def test_a_layer_that_cannot_be_made_safe_keeps_its_float_scales(monkeypatch, quantized):
    before, _ = quantized["w4a8"]
    monkeypatch.setattr(module, "safe_amplifier", lambda scales, *_, **settings: None if len(scales) > 2 else 64)
    _, report = fqjax.integer_scales(before)
    assert [row.scales for row in report.layers] == ["group of 128, integer", "group of 128"]


def test_one_step_past_the_bound_is_refused_when_built_and_when_loaded(tmp_path, quantized):
    layer = quantized_layers(quantized["w4a8-integer-scale"][0])["first"]
    weight = layer.weight.get_value()
    sums = np.asarray(group_sums_of(weight))
    column = int(np.argmax(sums[0]))
    most = LIMIT // (127 * 16 * int(sums[0, column]))
    only = jnp.ones_like(weight.group_scale)
    safe, unsafe = (only.at[0, column].set(value) for value in (most - 10, most + 10))
    assert scaled_bound(sums, np.asarray(safe), 127, 4) <= LIMIT < scaled_bound(sums, np.asarray(unsafe), 127, 4)
    assert with_weight(layer, dataclasses.replace(weight, group_scale=safe)).figures.accumulator_bound <= LIMIT
    with pytest.raises(InputError, match="int32 accumulator could reach"):
        with_weight(layer, dataclasses.replace(weight, group_scale=unsafe))
    model = nnx.Dict({"first": with_weight(layer, dataclasses.replace(weight, group_scale=safe))})
    fqjax.save(tmp_path / "out", model)
    bad = nnx.clone(model)
    bad["first"].weight.set_value(dataclasses.replace(weight, group_scale=unsafe))
    fqjax.save(tmp_path / "bad", bad)
    plain = nnx.Dict({"first": nnx.Linear(256, 300, rngs=nnx.Rngs(0))})
    assert set(quantized_layers(fqjax.load(tmp_path / "out", plain))) == {"first"}
    with pytest.raises(InputError, match="'first' has an accumulator bound"):
        fqjax.load(tmp_path / "bad", plain)


def with_weight(layer, weight):
    quantizer = layer.input.get_value()
    return layer.changed(
        weight, quantizer, dataclasses.replace(layer.figures, accumulator_bound=weight.bound(quantizer.qmax))
    )


def test_a_model_without_groups_is_refused(model, data):
    changed, _ = fqjax.quantize(model, "flattenquant-w8a8", data)
    with pytest.raises(InputError, match="float scales for groups"):
        fqjax.integer_scales(changed)


@pytest.mark.parametrize("name", ["w4a8-gptq", "w4a8-integer-scale", "w4a8-integer-scale-folded-awq"])
def test_grouped_layers_can_be_simulated(data, quantized, name):
    """What a layer stores gives the weight on its original channels, which is all that a simulation multiplies."""
    layer = quantized_layers(quantized[name][0])["first"]
    quantizer, weight = layer.input.get_value(), layer.weight.get_value()
    rows = PerToken.of(quantizer.bits).fake(data[0], Recipe(1 / quantizer.multiplier))
    simulated = rows @ weight.weight(quantizer.source, quantizer.part)().T + layer.bias[...]
    np.testing.assert_allclose(simulated, layer(data[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", ["group_size=48", "amplifier=1000", "amplifier=0", "weights=flattenquant"])
def test_settings_that_do_not_fit_are_refused(setting):
    with pytest.raises(InputError, match=f"^{setting}: expected"):
        fqjax.PRESETS["w4a8-integer-scale"].override([setting])


def test_activations_in_floating_point_need_float_scales():
    with pytest.raises(InputError, match="activation_bits=16: integer scales need integer activations"):
        fqjax.PRESETS["w4a8-integer-scale"].override(["activation_bits=16"])


def test_the_table_says_which_layers_have_integer_scales(quantized, monkeypatch):
    monkeypatch.setattr(module, "safe_amplifier", lambda scales, *_, **settings: None if len(scales) > 2 else 64)
    _, report = fqjax.integer_scales(quantized["w4a8"][0])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = " ".join(console.export_text().split())
    assert "128 int" in text and "Float group scales: 1 of 2 layers." in text and "\u2026" not in text
