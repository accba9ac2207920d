import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

import fqjax
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.checkpoint.orbax.read import load
from fqjax.checkpoint.orbax.write import save
from fqjax.checkpoint.tree import named_leaves
from fqjax.layers.surgery import replace_modules
from fqjax.runtime.errors import InputError
from tests.models import variants

SCHEMES = ["bf16", "w8a8", "flattenquant"]


def batches():
    return [np.random.default_rng(0).integers(3, 64, (4, 32)).astype(np.int32)]


def quantized(directory, scheme="flattenquant", variant="llama-grouped"):
    model, _ = load_hf(variants.write_checkpoint(directory / "hf", variants.VARIANTS[variant]))
    return fqjax.quantize(model, scheme, batches())[0]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint that tests take copies of."""
    folder = tmp_path_factory.mktemp("original")
    save(folder / "out", quantized(folder))
    return folder / "out"


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


@pytest.mark.sample(1)
@pytest.mark.smoke
@pytest.mark.parametrize("variant", ["llama-grouped", "llama-attention-bias", "opt-350m", "opt-plain-norms"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_round_trip_is_exact(tmp_path, scheme, variant):
    model = quantized(tmp_path, scheme, variant)
    save(tmp_path / "out", model)
    again = load(tmp_path / "out")
    before, after = named_leaves(nnx.state(model)), named_leaves(nnx.state(again))
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert leaf.dtype == after[name].dtype
        np.testing.assert_array_equal(leaf, after[name])
    assert fqjax.report_of(again) == fqjax.report_of(model)
    assert again.config == model.config
    np.testing.assert_array_equal(variants.logits(again), variants.logits(model))


@pytest.mark.thorough
def test_a_fresh_process_computes_the_same_logits(saved, tmp_path):
    np.save(tmp_path / "expected.npy", np.asarray(variants.logits(load(saved))))
    code = (
        "import sys, numpy as np, fqjax\n"
        "from flax import nnx\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[1])\n"
        "tokens = np.random.default_rng(7).integers(3, 64, (2, 24)).astype(np.int32)\n"
        "logits = nnx.jit(lambda model, tokens: model(tokens))(fqjax.load(folder / 'out'), tokens)\n"
        "np.testing.assert_array_equal(logits, np.load(folder / 'expected.npy'))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_orbax_alone_reads_the_arrays(saved):
    tree = ocp.load(saved, jax.tree.map(_on_device, ocp.metadata(saved).metadata))
    codes = tree["layers"]["0"]["mlp"]["down_proj"]["weight"]["codes"]
    layer = load(saved).layers[0].mlp.down_proj
    np.testing.assert_array_equal(codes, layer.weight.get_value().codes)


def _on_device(metadata):
    place = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(metadata.shape, metadata.dtype, sharding=place)


def test_loading_builds_no_float_weights(saved, monkeypatch):
    skeletons = []

    def watch(model, replacements):
        skeletons.append(model)
        return replace_modules(model, replacements)

    monkeypatch.setattr("fqjax.checkpoint.orbax.read.replace_modules", watch)
    load(saved)
    leaves = jax.tree.leaves(nnx.state(skeletons[0]))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_arrays_go_where_they_are_asked_to(saved):
    device = jax.devices()[0]
    asked = []

    def place(name, shape):
        asked.append(name)
        return SingleDeviceSharding(device)

    load(saved, sharding=place)
    assert "layers.1.self_attn.qkv_proj.weight.codes" in asked
    load(saved, sharding=SingleDeviceSharding(device))


class Mine(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros(3))

    def __call__(self, x):
        return self.layers[1](self.dropout(jnp.tanh(self.layers[0](x))))


@pytest.mark.parametrize("abstract", [False, True])
def test_a_model_of_ones_own_is_loaded_into_its_class(tmp_path, abstract):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
    model, _ = fqjax.quantize(Mine(nnx.Rngs(0)), "flattenquant", [x], ignore=["layers.1"])
    save(tmp_path / "out", model)
    skeleton = nnx.eval_shape(lambda: Mine(nnx.Rngs(1))) if abstract else Mine(nnx.Rngs(1))
    again = load(tmp_path / "out", skeleton)
    assert isinstance(again, Mine)
    expected, found = (nnx.view(m, deterministic=True)(x) for m in (model, again))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="pass it as load"):
        load(tmp_path / "out")


def test_a_skeleton_that_lacks_a_layer_is_refused(tmp_path):
    x = jnp.ones((8, 16))
    save(tmp_path / "out", fqjax.quantize(Mine(nnx.Rngs(0)), "w8a8", [x])[0])
    with pytest.raises(InputError, match=r"no linear layer 'layers\.0'"):
        load(tmp_path / "out", nnx.Linear(3, 3, rngs=nnx.Rngs(0)))


def test_a_model_of_other_sizes_is_blamed_itself(tmp_path):
    save(tmp_path / "out", nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    told = r"bias is stored as float32 \(3,\), the model that was passed has float32 \(4,\)"
    with pytest.raises(InputError, match=told):
        load(tmp_path / "out", nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="bias is stored, but the model that was passed has none of that name"):
        load(tmp_path / "out", nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0)))


def test_an_existing_directory_is_not_touched(tmp_path, saved):
    before = sorted(path.name for path in saved.rglob("*"))
    with pytest.raises(InputError, match="exists already"):
        save(saved, load(saved))
    assert sorted(path.name for path in saved.rglob("*")) == before


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = quantized(tmp_path)
    monkeypatch.setattr("fqjax.checkpoint.orbax.write.ocp.save", fail)
    with pytest.raises(InputError, match=r"out: cannot be written \(No space left"):
        save(tmp_path / "out", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def change_manifest(directory, change):
    path = directory / "fqjax.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def fails(directory, message):
    with pytest.raises(InputError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused(saved):
    change_manifest(saved, lambda m: m.update(format_version=3, recipes=None))
    fails(saved, "format version 3; this fqjax reads versions up to 2")


def test_what_is_no_checkpoint(tmp_path, saved):
    fails(tmp_path / "absent", "no such directory")
    fails(tmp_path, "no fqjax.json")
    (saved / "fqjax.json").write_text("{")
    fails(saved, "not a manifest")
    for version, entry in ((1, "schemes"), (2, "architecture")):
        (saved / "fqjax.json").write_text(json.dumps({"format": "fqjax", "format_version": version}))
        fails(saved, f"no entry '{entry}'")


LAYER = "layers.0.mlp.down_proj"


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["layers"][LAYER]["weight"].update(bits=5), "down_proj' has no valid format"),
        (lambda m: m["layers"][LAYER]["figures"].pop("macs"), "down_proj' has no valid format"),
        (lambda m: m["layers"][LAYER].update(out_features=49), r"down_proj.weight.codes is stored as int8 .*says int8"),
        (lambda m: m["layers"][LAYER]["figures"].update(accumulator_bound=3), "the checkpoint is damaged"),
        (lambda m: m["layers"][LAYER]["figures"].update(accumulator_bound=2**31), "down_proj: the int32 accumulator"),
        (lambda m: m["layers"].update(other=m["layers"][LAYER]), "no linear layer 'other'"),
        (lambda m: m["layers"].pop(LAYER), "down_proj"),
        (lambda m: m["architecture"].update(name="Bert"), "no valid architecture"),
        (lambda m: m["architecture"]["config"].pop("vocab_size"), "no valid architecture"),
        (lambda m: m["architecture"]["config"].update(vocab_size=65), r"embedding is stored as bfloat16 \(64, 48\)"),
        (lambda m: m["architecture"].update(dtype="float32"), "is stored as bfloat16.*says float32"),
    ],
)
def test_a_manifest_that_does_not_fit_the_arrays(saved, change, message):
    change_manifest(saved, change)
    fails(saved, message)


def test_arrays_that_are_gone(saved):
    for path in saved.glob("state/d/*"):
        path.unlink()
    for path in saved.glob("state/ocdbt*/d/*"):
        path.unlink()
    fails(saved, "cannot be read|no readable")


def test_a_changed_code_is_noticed_by_its_bound(tmp_path):
    model = quantized(tmp_path)
    layer = model.layers[0].mlp.down_proj
    weight = layer.weight.get_value()
    worst = jnp.argmax(jnp.sum(jnp.abs(weight.unpacked().astype(jnp.int32)), axis=1))
    codes = weight.codes.at[worst, 0].set(weight.codes[worst, 0] ^ 3)
    layer.weight.set_value(dataclasses.replace(weight, codes=codes))
    save(tmp_path / "out", model)
    fails(tmp_path / "out", "the checkpoint is damaged")


def test_the_tokenizer_travels_with_the_model(checkpoint, tmp_path):
    model, tokenizer = fqjax.load_hf(checkpoint)
    save(tmp_path / "out", model, tokenizer=tokenizer)
    again = fqjax.load_tokenizer(tmp_path / "out")
    assert again("class Path").input_ids == tokenizer("class Path").input_ids
