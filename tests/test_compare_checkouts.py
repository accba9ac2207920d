"""The comparison of two checkouts' bits: what it finds different, and that a layer's numbers are found and whole."""

import dataclasses
import json
import sys

import compare_checkouts
import fingerprint_checkout
import jax.numpy as jnp
import numpy as np
import pytest
from checkout_comparison import Comparison, Measured, compare, exit_code, table
from flax import nnx

from fqjax.core.formats.grouped import Grouped
from fqjax.core.formats.uniform import Uniform
from fqjax.core.stored_inputs import FloatingInput, StaticInput
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.record import Figures
from fqjax.report.report import report_of

ARRAYS = {
    "mlp": {"codes": np.array([[3, -4]], np.int8), "scale": np.float32([0.5]), "output": np.float32([1, 2])},
    fingerprint_checkout.MODEL: {"logits": np.float32([4, -8])},
}


@pytest.fixture
def measured(tmp_path):
    """Writes arrays as a run of a checkout does, some of them replaced, and reads the result."""

    def make(name, replaced=None, left_out=()):
        out = tmp_path / name
        out.mkdir()
        arrays = {layer: fields | (replaced or {}).get(layer, {}) for layer, fields in ARRAYS.items()}
        kept = {layer: fields for layer, fields in arrays.items() if layer not in left_out}
        fingerprint_checkout.write(out, kept, {"perplexity": 12.5, "seconds": 1.0})
        return Measured(arrays=out / "arrays.npz", **json.loads((out / "fingerprint.json").read_text()))

    return make


def test_equal_arrays_are_identical(measured):
    row = compare("tiny", "w8a8", measured("before"), measured("after"))
    assert (row.status, row.different, row.codes, row.scales, row.outputs) == ("identical", {}, 0, 0, 0)
    assert exit_code([row]) == 0


@pytest.mark.parametrize(
    ("layer", "field", "value", "status", "distances"),
    [
        ("mlp", "codes", np.array([[3, -7]], np.int8), "differs", (3, 0, 0)),
        ("mlp", "scale", np.float32([0.625]), "differs", (0, 0.25, 0)),
        ("mlp", "codes", np.array([[3]], np.int8), "differs", (None, 0, 0)),
        ("mlp", "group_scale", np.int32([[2]]), "differs", (0, None, 0)),
        ("mlp", "output", np.float32([1, 3]), "outputs differ", (0, 0, 0.5)),
        (fingerprint_checkout.MODEL, "logits", np.float32([5, -8]), "outputs differ", (0, 0, 0.125)),
    ],
)
def test_a_difference_is_found_and_measured(measured, layer, field, value, status, distances):
    row = compare("tiny", "w8a8", measured("before"), measured("after", {layer: {field: value}}))
    assert (row.status, row.different) == (status, {layer: [field]})
    assert (row.codes, row.scales, row.outputs) == distances
    assert exit_code([row]) == 1 and exit_code([row], ["w8a8"]) == 0


def test_a_layer_that_one_checkout_lacks_differs(measured):
    row = compare("tiny", "w8a8", measured("before"), measured("after", left_out=["mlp"]))
    assert (row.status, set(row.different), row.codes) == ("differs", {"mlp"}, None)


def test_a_failure_cannot_be_allowed():
    row = Comparison(model="tiny", scheme="w8a8", status="failed", reason="no layer")
    assert exit_code([row], ["w8a8"]) == 1
    assert "failed: no layer" in table([row], ["w8a8"])


def flattened():
    """A layer in INT8 with a bias and two flattened channels, whose activations have one scale."""
    rng = np.random.default_rng(0)
    source, part = np.zeros(104, np.int32), np.full(104, 1 << 20, np.int32)
    source[:2], part[:2] = 3, (1, 2)
    codes = np.where(np.arange(128) < 26, rng.integers(-127, 128, (16, 128)), 0)
    weight = Uniform(bits=8).store(jnp.int8(codes), jnp.float32(0.01))
    multiplier, channels = jnp.float32(rng.uniform(20, 60, 24)), {"source": source, "part": part}
    quantizer = StaticInput(multiplier=multiplier, **channels, scale=jnp.float32(0.03), bits=8)
    return weight, quantizer, jnp.ones(16, jnp.bfloat16)


def weight_only():
    """A layer in INT4 with a scale for each group, whose activations are in floating point."""
    rng = np.random.default_rng(0)
    codes = np.where(np.arange(256) < 24, rng.integers(-8, 8, (16, 256)), 0)
    weight = Grouped(bits=4).store(jnp.int8(codes), jnp.float32(1), jnp.float32(rng.uniform(0.1, 0.2, (2, 16))))
    padding = {"source": np.zeros(232, np.int32), "part": np.full(232, 1 << 20, np.int32)}
    return weight, FloatingInput(multiplier=jnp.ones(24), **padding), None


@pytest.fixture(scope="module", params=[flattened, weight_only])
def layer(request):
    figures = Figures(accumulator_bound=127 * 127 * 128, macs=384)
    return QuantizedLinear(*request.param(), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, figures=figures)


def test_numbers_of_a_layer_give_its_output(layer):
    found = fingerprint_checkout.layer_arrays("first", layer)
    assert found["output"].shape == (fingerprint_checkout.ROWS, 16)
    assert ("group_scale" in found) != ("input_scale" in found)
    assert ("bias" in found) == (layer.bias is not None)


def test_layers_are_those_of_the_report(layer):
    model = nnx.List([layer])
    assert fingerprint_checkout.quantized_layers(model) == {"0": layer}
    with pytest.raises(LookupError, match="1 layers found, 0 reported; different: 0"):
        fingerprint_checkout.all_arrays(model, report_of(nnx.List([])), "w8a8")


@pytest.mark.parametrize("name", ["codes", "multiplier", "activation_bits"])
def test_an_unknown_layout_is_refused(layer, monkeypatch, name):
    monkeypatch.setitem(fingerprint_checkout.PLACES, name, ("nowhere.at_all",))
    with pytest.raises(LookupError, match=f"first: QuantizedLinear has no {name} at nowhere.at_all: "):
        fingerprint_checkout.layer_arrays("first", layer)


def test_numbers_that_are_overlooked_are_noticed(layer, monkeypatch):
    for name in ("group_scale", "input_scale", "bias"):
        monkeypatch.setitem(fingerprint_checkout.PLACES, name, ())
    with pytest.raises(ValueError, match="first: .* see PLACES"):
        fingerprint_checkout.layer_arrays("first", layer)


def test_what_is_kept_depends_on_sources_and_sample(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a")
    sample = compare_checkouts.Sample(text=text, samples=8, window=128, windows=4)
    tree = tmp_path / "fqjax"
    tree.mkdir()
    (tree / "scheme.py").write_text("a = 1")

    def key(sample=sample):
        return compare_checkouts._key(compare_checkouts.tree_digest(tree), "", "w8a8", sample)

    first = key()
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "scheme.pyc").write_bytes(b"compiled")
    assert key() == first
    assert key(dataclasses.replace(sample, samples=4)) != first
    (tree / "scheme.py").write_text("a = 2")
    assert key() != first


def test_a_checkout_is_not_compared_with_itself(monkeypatch, capsys):
    root = str(compare_checkouts.FINGERPRINT_SCRIPT.parents[1])
    monkeypatch.setattr(sys, "argv", ["compare_checkouts.py", root, root])
    with pytest.raises(SystemExit) as ended:
        compare_checkouts.main()
    assert ended.value.code == 2
    assert "--fresh" in capsys.readouterr().err
