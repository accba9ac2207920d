"""Checkpoints whose manifest has version 1 (tests/checkpoint/data/README.md): they load, and compute what they did then."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.checkpoint.manifest import MANIFEST_FILE, current, read_manifest, read_stored_manifest
from fqjax.checkpoint.orbax.read import load_abstract
from fqjax.checkpoint.tree import named_leaves
from fqjax.cli import main as cli
from fqjax.layers.head import Int8Table
from fqjax.layers.stacked import StackedExperts, quantized_layers
from fqjax.runtime.errors import InputError
from tests.models import variants

DATA = Path(__file__).parent / "data" / "version_1"
LOGITS = dict(np.load(DATA / "logits.npz"))
NAMES = sorted(LOGITS)


def changed(name, tmp_path, change, *, checksums=False):
    """A copy of a checkpoint whose manifest is changed; it may lack checksums, as the first ones did."""
    directory = shutil.copytree(DATA / name, tmp_path / name)
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    change(manifest)
    if not checksums:
        manifest.pop("checksums", None)
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
    return directory


def test_every_checkpoint_has_logits_and_the_first_version():
    assert NAMES == sorted(path.name for path in DATA.iterdir() if path.is_dir()) and len(NAMES) == 8
    assert {read_stored_manifest(DATA / name)["format_version"] for name in NAMES} == {1}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_recorded_and_survive_being_saved_again(name, tmp_path):
    model = fqjax.load(DATA / name)
    found = np.asarray(variants.logits(model), np.float32)
    # But for the order in which other versions of XLA add floats.
    np.testing.assert_allclose(found, LOGITS[name], rtol=1e-5, atol=1e-5 * np.abs(LOGITS[name]).max())
    fqjax.save(tmp_path / "again", model)
    assert read_stored_manifest(tmp_path / "again")["format_version"] == 2
    again = fqjax.load(tmp_path / "again")
    before, after = named_leaves(nnx.state(model)), named_leaves(nnx.state(again))
    assert before.keys() == after.keys()
    for key, leaf in before.items():
        assert leaf.dtype == after[key].dtype
        np.testing.assert_array_equal(leaf, after[key])
    assert fqjax.report_of(again) == fqjax.report_of(model)
    assert nnx.graphdef(again) == nnx.graphdef(model)


@pytest.mark.parametrize("name", NAMES)
def test_figures_and_recipes_are_taken_over(name):
    """Of the manifest alone, as it was written."""
    old, layers = read_stored_manifest(DATA / name), quantized_layers(load_abstract(DATA / name))
    assert layers.keys() == old["layers"].keys()
    for path, entry in old["layers"].items():
        layer, figures = layers[path], layers[path].figures
        assert layer.sizes == (entry["out_features"], entry["in_features"], entry["width"])
        assert (figures.macs, figures.accumulator_bound) == (entry["macs"], entry["accumulator_bound"])
        assert figures.flattened == entry["flattened"] and figures.relative_error == np.float32(entry["relative_error"])
        assert json.loads(layer.recipe) == old["schemes"][entry["scheme"]]
        assert layer.bits == entry["weight"]["bits"]


def test_kinds_of_layers_are_the_right_ones():
    def kinds(name):
        layers = quantized_layers(load_abstract(DATA / name)).values()
        return {(layer.weight.get_value().format.label, layer.bits, layer.input.get_value().kind) for layer in layers}

    assert kinds("int8-flattened") == {("tensor", 8, "static")}
    assert kinds("int4-and-int8") == {("tensor", 8, "static"), ("tensor", 4, "static")}
    assert kinds("channel") == {("channel", 4, "static")}
    assert kinds("grouped-float") == {("group of 64", 4, "per_token")}
    assert kinds("grouped-integer") == {("group of 128, integer", bits, "per_token") for bits in (4, 8)}
    assert kinds("grouped-folded") == {("group of 128, folded", 4, "per_token")}
    assert kinds("weight-only") == {("group of 128", 4, "floating")}
    assert kinds("experts") == {("tensor", 8, "static")}


def test_flattened_channels_stacked_experts_and_heads_are_there():
    flattened = quantized_layers(fqjax.load(DATA / "int8-flattened"))
    assert sum(layer.input.get_value().flattened() for layer in flattened.values()) > 10
    assert isinstance(fqjax.load(DATA / "int8-flattened").lm_head, Int8Table)
    assert isinstance(fqjax.load(DATA / "experts").layers[0].mlp.experts, StackedExperts)


def test_the_command_inspects_them(capsys):
    assert cli.main(["inspect", str(DATA / "int4-and-int8")]) == 0
    out = capsys.readouterr().out
    assert "layers.0.fc1" in out and "INT4" in out


@pytest.mark.parametrize("name", ["channel", "grouped-integer"])
def test_the_first_manifests_said_less(name, tmp_path):
    """Neither whether channels have scales of their own nor the dtype of groups' scales: int32 if they are integers."""
    whole = read_manifest(DATA / name)

    def shorten(manifest):
        for entry in manifest["layers"].values():
            del entry["channel_scales"], entry["group_scales"]

    short = current(read_stored_manifest(changed(name, tmp_path, shorten)), tmp_path)
    for path, entry in short["layers"].items():
        if name == "channel":
            assert entry == whole["layers"][path]
        else:
            assert entry["weight"]["granularity"] == "tensor" and entry["dtypes"] == {"group_scale": "int32"}


def test_codes_of_eight_bits_were_said_to_be_folded(tmp_path):
    """Which they were not: their scales do not fit beside them into a byte."""

    def say(manifest):
        for entry in manifest["layers"].values():
            entry["weight"]["folded"] = True

    directory = changed("grouped-integer", tmp_path, say)
    found = {
        entry["weight"]["bits"]: entry["weight"]["scales"] for entry in read_manifest(directory)["layers"].values()
    }
    assert found == {8: "integer", 4: "folded"}


def test_what_cannot_be_read_any_more_is_no_matter(tmp_path):
    """A recipe says how a checkpoint was made; loading does not need to know."""

    def forget(manifest):
        manifest["schemes"] = [{"name": "of another program", "method": "unheard of"}]

    directory = changed("channel", tmp_path, forget)
    np.testing.assert_array_equal(variants.logits(fqjax.load(directory)), variants.logits(fqjax.load(DATA / "channel")))
    assert fqjax.report_of(fqjax.load(directory)).scheme == "of another program"


LAYER = "layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("schemes"), "no entry 'schemes'"),
        (lambda m: m.pop("layers"), "no entry 'layers'"),
        (lambda m: m.update(layers=[]), "layers \\[\\]: expected an object"),
        (lambda m: m["layers"].update({LAYER: 3}), f"{LAYER}' has no valid format: expected an object"),
        (lambda m: m["layers"][LAYER].pop("macs"), "no entry 'macs'"),
        (lambda m: m["layers"][LAYER].update(scheme=1), "recipe 1: expected the index"),
        (lambda m: m["layers"][LAYER].update(activation_bits=5), "activation_bits 5: expected 4 or 8 or 16"),
        (lambda m: m["layers"][LAYER]["weight"].update(packed=False), "expected packed codes with 4 bits"),
        (lambda m: m["layers"][LAYER]["weight"].update(group_size=64), "and a group size with groups"),
        (lambda m: m["layers"][LAYER]["weight"].update(granularity="row"), "granularity 'row'"),
        (lambda m: m["layers"][LAYER].update(accumulator_bound=3), "the checkpoint is damaged"),
        (lambda m: m["layers"][LAYER].update(accumulator_bound=2**31), "o_proj: the int32 accumulator"),
    ],
)
def test_a_manifest_that_is_not_valid(tmp_path, change, message):
    directory = changed("channel", tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        fqjax.load(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_checksums_are_those_of_the_manifest_as_it_was_written(tmp_path):
    fqjax.load(changed("channel", tmp_path, lambda m: None, checksums=True))
    shutil.rmtree(tmp_path / "channel")
    directory = changed("channel", tmp_path, lambda m: m["layers"][LAYER].update(macs=1), checksums=True)
    with pytest.raises(InputError, match=r"fqjax\.json: not what was saved, by its checksum"):
        fqjax.load(directory)
