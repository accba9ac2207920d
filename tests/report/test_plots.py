"""Pictures of quantized models, by what is drawn in them."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.checkpoint.calibration_record import CalibrationRecord
from fqjax.layers.stacked import quantized_layers
from fqjax.report import channel_plots, layer_plots
from fqjax.report.canvas import TALLEST, row_height
from fqjax.report.channel_plots import activation_channels, is_smoothed, most_telling, plot_channels, weight_channels
from fqjax.report.layer_plots import grouped, place, plot_bits, plot_layers, plot_share
from fqjax.report.report import LayerReport, Report

WITH_OUTLIERS = np.random.default_rng(0).normal(size=(64, 64)) * np.r_[np.full(3, 30.0), np.ones(61)]


class Two(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture(scope="module")
def quantized():
    """Layers and calibration of the same model by scheme."""

    def make(scheme):
        model, report = fqjax.quantize(Two(), scheme, [jnp.asarray(WITH_OUTLIERS, jnp.float32)])
        return quantized_layers(model), report.calibration

    return {scheme: make(scheme) for scheme in ("flattenquant-w8a8", "w4a8")}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    figures = []
    for module in (channel_plots, layer_plots):
        monkeypatch.setattr(
            module, "save", lambda figure, path: (figure.canvas.draw(), figures.append(figure), path)[-1]
        )
    return figures


def row(name, bits=8, expansion=1.0, error=0.01):
    return LayerReport(
        name=name,
        bits=bits,
        expansion=expansion,
        relative_error=error,
        bytes=1,
        bytes_bf16=2,
        macs=100,
        accumulator_bound=1,
        scales="tensor",
    )


def mixture(blocks, experts):
    """Layers of a mixture of experts."""
    kinds = ["self_attn.o_proj", *(f"mlp.experts.{expert}.down_proj" for expert in range(experts))]
    return [
        row(f"layers.{block}.{kind}", error=0.01 + i / 1000) for block in range(blocks) for i, kind in enumerate(kinds)
    ]


def report_on(rows):
    return Report(scheme="some", layers=tuple(rows), skipped={}, model_bytes=1)


def texts(figure):
    """Everything that stands in the panels of a figure."""
    panels = figure.axes
    return [text.get_text() for axis in panels for text in axis.texts] + [axis.get_title() for axis in panels]


def test_flattened_channels_hold_what_the_large_ones_held(quantized):
    layers, record = quantized["flattenquant-w8a8"]
    layer = layers["first"]
    source = np.asarray(layer.input.get_value().source)[: layer.figures.flattened]
    assert len(source)
    for channels in (weight_channels(layer), activation_channels(layer, record.activations["first"])):
        assert len(channels.before) == 64 and channels.added == len(source)
        assert channels.after.max() <= channels.limit + 1e-4
        whole = np.setdiff1d(np.arange(64), source)
        np.testing.assert_allclose(channels.after[whole], channels.before[whole])


def test_a_scale_for_every_token_spends_all_codes_on_the_largest_channel(quantized):
    layers, record = quantized["w4a8"]
    seen = record.activations["first"]
    channels = activation_channels(layers["first"], seen)
    assert channels.limit == 127 and channels.added == 0 and "per token" in channels.unit
    np.testing.assert_allclose(channels.before, 127 * seen / seen.max(), rtol=1e-5)


def test_weights_with_scales_of_groups_are_shown_as_they_are_and_not_as_codes(quantized):
    layer = quantized["w4a8"][0]["first"]
    channels, exact = weight_channels(layer), np.abs(layer.weight.get_value().dequantize()).max(axis=0)[:64]
    assert channels.limit is None and "%" in channels.unit
    np.testing.assert_allclose(channels.before, 100 * exact / exact.max(), rtol=1e-5)


def test_channels_are_called_smoothed_where_they_are(quantized):
    assert is_smoothed(quantized["flattenquant-w8a8"][0]["first"]) and not is_smoothed(quantized["w4a8"][0]["first"])


def test_layers_that_nothing_flattened_are_not_among_those_that_flattening_changed(quantized, drawn, tmp_path):
    layers, record = quantized["flattenquant-w8a8"]
    flattened = [name for name, layer in layers.items() if layer.figures.flattened]
    assert list(most_telling(layers)) == flattened and flattened != list(layers)
    plot_channels(layers, record, tmp_path / "channels.png")
    assert len(drawn[0].axes) == 2 * len(flattened) and all("added by flattening" in text for text in texts(drawn[0]))


def test_without_flattening_one_line_shows_the_channels_of_the_layers_with_the_largest_errors(
    quantized, drawn, tmp_path
):
    layers, record = quantized["w4a8"]
    errors = [layer.figures.relative_error for layer in most_telling(layers).values()]
    assert errors == sorted(errors, reverse=True)
    plot_channels(layers, record, tmp_path / "channels.png")
    assert not any("added" in text for text in texts(drawn[0])) and len(drawn[0].axes) == 4
    assert "first: weights in INT4, 64 channels" in texts(drawn[0])
    assert all(len([line for line in axis.lines if len(line.get_xdata()) > 2]) == 1 for axis in drawn[0].axes)
    assert plot_channels(layers, None, tmp_path / "channels.png") and len(drawn[1].axes) == 2  # Weights alone.


@pytest.mark.parametrize(("expansion", "panels"), [(1.0, 1), (1.25, 2)])
def test_there_is_a_panel_for_added_channels_where_there_are_some(drawn, tmp_path, expansion, panels):
    rows = [row("a"), row("b", 4, expansion)]
    plot_layers(report_on(rows), rows, tmp_path / "layers.png")
    assert len(drawn[0].axes) == panels and all(axis.patches for axis in drawn[0].axes)
    legend = [text.get_text() for text in drawn[0].legends[0].texts]
    assert legend == [
        "INT4 weights: 50.0% of the multiply-accumulates",
        "INT8 weights: 50.0% of the multiply-accumulates",
    ]


@pytest.mark.parametrize(("errors", "scale"), [((0.0099, 0.0101), "linear"), ((0.0002, 0.01), "log")])
def test_errors_of_one_size_are_drawn_from_zero_and_others_with_plain_numbers(drawn, tmp_path, errors, scale):
    rows = [row(name, error=error) for name, error in zip("ab", errors, strict=True)]
    plot_layers(report_on(rows), rows, tmp_path / "layers.png")
    (axis,) = drawn[0].axes
    assert axis.get_xscale() == scale and (scale == "log" or axis.get_xlim()[0] == 0)
    labels = [text.get_text() for text in axis.get_xticklabels(which="both") if text.get_text()]
    assert len(labels) >= 3 and all(re.fullmatch(r"[\d.e-]+", label) for label in labels)


def test_errors_that_are_not_known_are_said_to_be_so(drawn, tmp_path):
    rows = [row("a", error=0.0), row("b", error=0.0)]
    plot_layers(report_on(rows), rows, tmp_path / "layers.png")
    assert texts(drawn[0])[0] == "not known"


def test_experts_of_a_block_are_drawn_as_one_layer(drawn, tmp_path):
    rows = mixture(2, 3)
    rows[1] = dataclasses.replace(rows[1], bits=4)
    assert [(group.name, len(group.rows)) for group in grouped(rows)[:2]] == [
        ("layers.0.self_attn.o_proj", 1),
        ("layers.0.mlp.experts.*.down_proj", 3),
    ]
    assert grouped(rows)[1].errors == pytest.approx((0.011, 0.012, 0.013))
    plot_bits(rows, "some", tmp_path / "bits.png")
    assert [text for text in texts(drawn[0]) if text] == ["INT8", "1 INT4, 2 INT8", "INT8", "INT8"]
    plot_layers(report_on(rows), rows, tmp_path / "layers.png")
    assert "experts of different bits" in [text.get_text() for text in drawn[1].legends[0].texts]


def test_pictures_of_large_models_are_no_higher_than_a_person_scrolls(drawn, tmp_path):
    rows = mixture(32, 8)
    plot_bits(rows, "some", tmp_path / "bits.png")
    plot_layers(report_on(rows), rows, tmp_path / "layers.png")
    assert drawn[0].get_figheight() < 12 and drawn[1].get_figheight() < 18
    assert 1000 * row_height(1000, 0.22) < TALLEST


def test_many_layers_without_blocks_stand_below_each_other(drawn, tmp_path):
    plot_bits([row(name) for name in "abcdefghijkl"], "some", tmp_path / "bits.png")
    assert drawn[0].get_figwidth() <= 6 and len(drawn[0].axes[0].get_yticks()) == 12


@pytest.mark.parametrize(("is_text", "unit"), [(True, "nats"), (False, "relative squared difference")])
def test_the_cost_of_int4_has_a_unit(drawn, tmp_path, is_text, unit):
    found = CalibrationRecord({}, {"a": {8: 0.1, 4: 0.5}, "b": {8: 0.0, 4: 0.2}})
    rows = [row("a"), row("b")]
    report = dataclasses.replace(report_on(rows), calibration=found)
    plot_share(report, rows, tmp_path / "int4_share.png", is_text=is_text)
    assert unit in drawn[0].axes[0].get_ylabel()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("layers.3.mlp.down_proj", ("layers.3", "mlp.down_proj")),
        ("encoder.0.blocks.12.fc", ("encoder.0.blocks.12", "fc")),
        ("first", ("", "first")),
        ("tail.2", ("", "tail.2")),
        ("", ("", "the model")),
    ],
)
def test_places_in_the_map_of_bits(name, expected):
    assert place(name) == expected
