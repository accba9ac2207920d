"""Conversion of a checkpoint block by block gives what quantization in memory gives, and holds one block at a time."""

import dataclasses
import gc
import json
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import fqjax
from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.checkpoint.tree import named_leaves
from fqjax.convert import run as conversion
from fqjax.convert.streamed import StreamedModel
from fqjax.drivers.statistics import calibrate
from fqjax.layers.surgery import select_linears
from fqjax.models.chain import Chain, as_arguments, call_model, chain
from fqjax.models.sites import sites_of
from fqjax.presets import PRESETS
from fqjax.runtime.errors import InputError
from tests.conftest import make_checkpoint
from tests.models import variants
from tests.tiers import thorough_but


def assert_same(first, second):
    a, b = named_leaves(nnx.state(first)), named_leaves(nnx.state(second))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=".".join(name))


CASES = {
    "all passes": ("llama-grouped", "flattenquant", [], ()),
    "tied, no trial": ("llama-tied", "flattenquant-w8a8", [], ()),
    "GPTQ and integer scales": ("qwen3", "w4a8-integer-scale-gptq", ["int8_layers=down_proj"], ()),
    "projections and ignored layers": ("opt-350m", "flattenquant-hopper", [], ("layers.0.fc1", "1.*out_proj")),
    "head in INT8": ("opt", "smoothquant", ["int8_head=true"], ()),
    "experts": ("mixtral-window", "flattenquant", [], ()),
    "experts, GPTQ": ("qwen3-moe-mlp-only", "w4a8-integer-scale-gptq", [], ()),
    "experts, some ignored": ("mixtral", "w4a8-awq", [], (r"layers\.0\.mlp\.experts\.2\.down",)),
    "no quantization": ("llama-grouped", "bf16", ["int8_head=true"], ()),
}


@pytest.mark.parametrize("case", thorough_but(("tied, no trial", "head in INT8"), CASES))
def test_the_result_is_that_of_quantization_in_memory(case, text, tmp_path):
    variant, preset, settings, ignore = CASES[case]
    source = make_checkpoint(tmp_path / "source", variant)
    scheme = PRESETS[preset].override(settings)
    asked = conversion.Conversion(
        source=str(source),
        out=tmp_path / "out",
        scheme=scheme,
        calibration=text,
        samples=5,
        window=32,
        ignore=ignore,
    )
    made = conversion.plan(asked)
    report = conversion.convert(made)
    model, _ = load_hf(source)
    wanted, expected = fqjax.quantize(model, scheme, made.batches, ignore=ignore)
    loaded = fqjax.load(asked.out)
    assert_same(loaded, wanted)
    assert report.layers == expected.layers and report.skipped == expected.skipped
    assert report.model_bytes == expected.model_bytes
    if expected.calibration is not None:
        assert report.calibration.costs == expected.calibration.costs
        for name, values in expected.calibration.activations.items():
            np.testing.assert_array_equal(report.calibration.activations[name], values)
    # What is written part by part looks like what is written at once.
    fqjax.save(tmp_path / "saved", wanted, report=expected)
    manifests = [json.loads((path / "fqjax.json").read_text()) for path in (asked.out, tmp_path / "saved")]
    files = [set(manifest["checksums"].pop("files")) for manifest in manifests]
    assert manifests[0] == manifests[1] and "tokenizer/tokenizer.json" in files[0] - files[1]


def test_without_calibration_data_neither_text_nor_tokenizer_is_needed(tmp_path):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    for file in source.glob("tokenizer*"):
        file.unlink()
    asked = conversion.Conversion(source=str(source), out=tmp_path / "out", scheme=PRESETS["w4a16"], data_free=True)
    made = conversion.plan(asked)
    assert not made.batches and "Calibration: none." in str(conversion.plan_table(made).caption)
    report = conversion.convert(made)
    model, _ = load_hf(source)
    wanted, expected = fqjax.quantize(model, "w4a16")
    assert_same(fqjax.load(asked.out), wanted)
    assert report.layers == expected.layers and report.calibration is None
    with pytest.raises(InputError, match="--calibration none: scheme 'w8a8' needs"):
        conversion.plan(dataclasses.replace(asked, out=tmp_path / "other", scheme=PRESETS["w8a8"]))


def test_statistics_block_by_block_are_those_of_the_whole_model(tmp_path, monkeypatch):
    """In float32, but for its rounding.  In bfloat16 a model compiled as one keeps what it fuses in float32."""
    source = make_checkpoint(tmp_path / "source")
    batches = [np.random.default_rng(i).integers(3, 2000, (2, 32)).astype(np.int32) for i in range(3)]
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        model, _ = load_hf(source, dtype)
        names = list(select_linears(model).linears)
        blockwise = calibrate(model, batches, names)
        with monkeypatch.context() as patch:
            whole = Chain({"": nnx.view(model)}, as_arguments, call_model, lambda output: output, sites_of(model))
            patch.setattr("fqjax.drivers.statistics.chain", lambda *_, whole=whole: whole)
            at_once = calibrate(model, batches, names)
        for name in names:
            assert blockwise[name].rows == at_once[name].rows
            largest = at_once[name].absmax.max()
            for field in ("absmax", "samples"):
                one, other = getattr(blockwise[name], field), getattr(at_once[name], field)
                np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.thorough
def test_one_block_is_in_memory_at_a_time(text, tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "source")
    alive, original = [], StreamedModel.block

    def block(self, index):
        gc.collect()
        assert not any(reference() is not None for reference in alive), "the block before is still held"
        found = original(self, index)
        alive.extend(weakref.ref(leaf) for leaf in named_leaves(nnx.state(found)).values())
        return found

    monkeypatch.setattr(StreamedModel, "block", block)
    asked = conversion.Conversion(
        source=str(source), out=tmp_path / "out", scheme=PRESETS["flattenquant"], calibration=text, samples=4, window=32
    )
    conversion.convert(conversion.plan(asked))
    assert len(alive) > 4 * 2 * 4  # Four passes over two blocks, calibration and writing among them.


@pytest.mark.parametrize("variant", ["llama-grouped", "llama-tied", "opt-350m", "qwen3-moe-mlp-only"])
def test_a_streamed_model_computes_what_the_model_computes(variant, tmp_path):
    source = make_checkpoint(tmp_path / "source", variant)
    model, _ = load_hf(source)
    tokens = np.arange(3, 35, dtype=np.int32)[None]
    logits = []
    for parts in (chain(model, []), StreamedModel(source, *read_architecture(source)).chain()):
        x, others = parts.begin(tokens)
        for path in parts.blocks:
            x = call_layer_of(parts, path, x, others)
        logits.append(np.asarray(parts.end(x)))
    np.testing.assert_array_equal(*logits)


def call_layer_of(parts, path, x, others):
    from fqjax.models.chain import run

    return run(parts, nnx.split(parts.blocks[path]), x, others)


def test_a_dry_run_needs_no_shard_and_no_tokenizer(text, tmp_path, capsys):
    from fqjax.cli import main as cli

    source = make_checkpoint(tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    shards = sorted(source.glob("*.safetensors"))
    shards[0].unlink()
    length = 8 + int.from_bytes(shards[1].read_bytes()[:8], "little")
    shards[1].write_bytes(shards[1].read_bytes()[:length])
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in (
        "layers.1.mlp.down_proj",
        "Memory at most",
        "Not there yet",
        "00001-of-00002.safetensors",
        "no tokenizer",
    ):
        assert part in out
    (source / "model.safetensors.index.json").unlink()
    shards[1].unlink()
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "model.safetensors: missing" in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({p.name for p in before if p.parent == tmp_path})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"num_hidden_layers": 9999}, "num_hidden_layers 9999: expected 512 at most without weights"),
        ("mixtral", {"num_hidden_layers": 500, "num_local_experts": 1024}, "num_experts 1024 in 500 layers"),
    ],
)
def test_a_dry_run_without_weights_refuses_sizes_that_no_model_has(tmp_path, name, changes, message):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(variants.VARIANTS[name] | changes))
    asked = conversion.Conversion(source=str(source), out=tmp_path / "out", scheme=PRESETS["bf16"])
    with pytest.raises(InputError, match=message):
        conversion.plan(asked, dry_run=True)


def test_a_dry_run_still_finds_what_is_wrong(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    shards = sorted(source.glob("*.safetensors"))
    asked = conversion.Conversion(source=str(source), out=tmp_path / "out", scheme=PRESETS["w8a8"])
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    with pytest.raises(InputError, match="00001-of-00002.safetensors: truncated"):
        conversion.plan(asked, dry_run=True)
    shards[0].unlink()
    tensors = load_file(shards[1])
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: tensors[name][:-1].copy()}, shards[1])
    with pytest.raises(InputError, match=f"{name}.*has shape"):
        conversion.plan(asked, dry_run=True)
    shards[1].unlink()
    index = json.loads((source / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"'model.norm.weight' is missing"):
        conversion.plan(asked, dry_run=True)
