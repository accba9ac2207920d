"""Checkpoints in the compressed-tensors format, written and read without that package."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import fqjax
from fqjax import cli
from fqjax.checkpoint.compressed import write
from fqjax.checkpoint.compressed.config import LayerScheme, parse_quantization, write_quantization
from fqjax.checkpoint.compressed.packing import pack_int32, unpack_int32
from fqjax.errors import InputError
from fqjax.models import FAMILIES
from fqjax.models.head import with_int8_head
from fqjax.models.to_hf import config_to_hf
from fqjax.report import quantized_layers
from tests.conftest import make_checkpoint
from tests.models import variants

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def group(weights=W8, inputs=TOKEN, targets=("Linear",), **more):
    return {"targets": list(targets), "weights": weights, "input_activations": inputs} | more


def entry(*groups, kind="int-quantized", ignore=("lm_head",), **more):
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": named, "ignore": list(ignore)} | more


@pytest.fixture(scope="module")
def models():
    """Quantized models by variant, scheme and dtype, made once."""
    made = {}

    def make(variant, scheme, folder, dtype=jnp.float32):
        key = variant, scheme, jnp.dtype(dtype).name
        if key not in made:
            source = variants.write_checkpoint(folder / f"{variant}-{scheme}", variants.VARIANTS[variant])
            made[key] = fqjax.quantize(fqjax.load_hf(source, dtype)[0], scheme, [variants.tokens()])[0]
        return made[key]

    return make


def logits(model):
    return np.asarray(model(variants.tokens()), np.float32)


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_packing_is_undone(bits, n, k, seed):
    codes = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k)).astype(np.int8)
    words = pack_int32(codes, bits)
    assert words.dtype == np.int32 and words.shape == (n, -(-k * bits // 32))
    np.testing.assert_array_equal(unpack_int32(words, bits, k), codes)


def test_the_first_code_is_in_the_lowest_bits():
    assert pack_int32(np.array([[-8, 7, 0, 0, 0, 0, 0, 0]], np.int8), 4)[0, 0] == np.int32(
        np.uint32(0x888888F0).view(np.int32)
    )


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_configuration_survives(name, tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS[name])
    model, _ = fqjax.load_hf(directory, jnp.float32)
    architecture = variants.VARIANTS[name]["architectures"][0]
    (directory / "config.json").write_text(json.dumps(config_to_hf(architecture, model.config, jnp.float32)))
    again, _ = fqjax.load_hf(directory, jnp.float32)
    assert again.config == model.config and type(again) is FAMILIES[architecture].model


@pytest.mark.parametrize(
    ("variant", "scheme", "most"),
    [
        ("llama-grouped", "w8a8", 0),
        ("llama-attention-bias", "w4a8", 1e-5),
        ("qwen2", "w4a8-integer-scale", 1e-5),
        ("mistral-window", "w4a8-integer-scale-folded", 1e-5),
        ("qwen3-window", "w4a16", 0),
        ("opt-350m", "w8a8", 0),
        ("llama", "smoothquant", 1e-5),
        ("llama-mlp-bias", "w4a16-awq", 1e-5),
        ("mixtral", "w8a8", 0),
        ("mixtral-window", "w4a8-integer-scale", 1e-5),
        ("qwen3-moe", "w4a16", 0),
        ("opt", "smoothquant", 1e-5),
        ("opt", "w4a8-awq", 1e-5),
    ],
)
def test_what_is_written_is_read_again(models, variant, scheme, most, tmp_path):
    model = models(variant, scheme, tmp_path)
    fqjax.save_compressed_tensors(tmp_path / "out", model)
    again, tokenizer = fqjax.load_hf(tmp_path / "out", jnp.float32)
    assert tokenizer is None and again.config == model.config
    difference = np.abs(logits(again) - logits(model))
    # A value within rounding of a half may get the other code, which shows in the positions behind it.
    assert np.quantile(difference, 0.9) <= most and difference.max() <= 1000 * most
    one, two = quantized_layers(model), quantized_layers(again)
    assert list(one) == list(two)
    for name, layer in one.items():
        k = layer.input.get_value().multiplier.shape[0]
        before, after = layer.weight.get_value(), two[name].weight.get_value()
        np.testing.assert_array_equal(before.unpacked()[:, :k], after.unpacked()[:, :k])
        if most == 0:
            np.testing.assert_array_equal(before.dequantize(), after.dequantize())


def test_smoothing_folded_into_norms_in_bfloat16_costs_a_rounding(models, tmp_path):
    model = models("llama", "smoothquant", tmp_path, jnp.bfloat16)
    fqjax.save_compressed_tensors(tmp_path / "out", model)
    folded = logits(fqjax.load_hf(tmp_path / "out")[0])
    exact = logits(models("llama", "smoothquant", tmp_path))
    rounding = np.square(logits(model) - exact).mean()
    assert np.square(folded - exact).mean() < 2 * rounding


def test_layers_may_differ(tmp_path):
    """Different bits, and some in floating point: groups of targets, in a mixed format."""
    source = variants.write_checkpoint(tmp_path / "source", variants.VARIANTS["llama-grouped"])
    scheme = fqjax.PRESETS["w4a8"].override(["int8_layers=down_proj"])
    model, _ = fqjax.quantize(fqjax.load_hf(source, jnp.float32)[0], scheme, [variants.tokens()], ignore=[r"1.*qkv"])
    fqjax.save_compressed_tensors(tmp_path / "out", model)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(written["config_groups"]) == 2 and "model.layers.1.self_attn.v_proj" in written["ignore"]
    np.testing.assert_allclose(
        logits(fqjax.load_hf(tmp_path / "out", jnp.float32)[0]), logits(model), rtol=0, atol=1e-5
    )


def test_smoothing_is_folded_into_layers_in_floating_point(tmp_path):
    source = variants.write_checkpoint(tmp_path / "source", variants.VARIANTS["llama-attention-bias"])
    model, _ = fqjax.load_hf(source, jnp.float32)
    chosen = [r"qkv_proj", r"o_proj"]
    refused("share a value head", fqjax.save_compressed_tensors, tmp_path / "out", smoothed(model, chosen[:1]))
    quantized = smoothed(model, [*chosen, "gate_up"])
    fqjax.save_compressed_tensors(tmp_path / "out", quantized)
    again = logits(fqjax.load_hf(tmp_path / "out", jnp.float32)[0])
    np.testing.assert_allclose(again, logits(quantized), rtol=0, atol=1e-4)


def smoothed(model, ignore):
    return fqjax.quantize(model, "smoothquant", [variants.tokens()], ignore=ignore)[0]


def test_large_models_are_written_in_shards(models, tmp_path, monkeypatch):
    model = models("llama-grouped", "w8a8", tmp_path)
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    fqjax.save_compressed_tensors(tmp_path / "out", model)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    np.testing.assert_array_equal(logits(fqjax.load_hf(tmp_path / "out", jnp.float32)[0]), logits(model))


@pytest.mark.parametrize(
    ("variant", "scheme", "message"),
    [
        ("llama-grouped", "flattenquant-w4a4", "(flattened channels|4-bit activations) cannot be expressed"),
        ("llama-grouped", "smoothquant", r"layers.0.self_attn.o_proj: its smoothing differs .* share a value head"),
        ("opt-350m", "smoothquant", r"layers.0.\w+: its smoothing cannot be folded"),
    ],
)
def test_what_cannot_be_written(models, variant, scheme, message, tmp_path):
    model = models(variant, scheme, tmp_path)
    refused(message, fqjax.save_compressed_tensors, tmp_path / "out", model)
    assert not list(tmp_path.glob("*out*"))


def test_a_head_in_int8_is_not_written(models, tmp_path):
    model = with_int8_head(models("llama-grouped", "w8a8", tmp_path))
    refused("the output head is in INT8", fqjax.save_compressed_tensors, tmp_path / "out", model)


def test_a_float_model_is_not_written(tmp_path):
    model, _ = fqjax.load_hf(variants.write_checkpoint(tmp_path / "source", variants.VARIANTS["llama"]))
    refused("no quantized layer", fqjax.save_compressed_tensors, tmp_path / "out", model)
    refused("exists already", fqjax.save_compressed_tensors, tmp_path / "source", model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(models, tmp_path):
    model = models("llama-grouped", "w8a8", tmp_path)
    (tmp_path / "closed").mkdir(mode=0o500)
    refused("cannot be written", fqjax.save_compressed_tensors, tmp_path / "closed" / "out", model)


def refused(message, call, *args):
    with pytest.raises(InputError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([], "quantization_config: expected an object"),
        (entry(group(), quant_method="gptq"), "quant_method 'gptq' is not supported; expected 'compressed-tensors'"),
        (entry(group(), kind="dense"), "format 'dense' cannot be expressed"),
        (entry(group(), kind="float-quantized"), "format 'float-quantized'"),
        (entry(), "at least one group"),
        (entry(group(W8 | {"symmetric": False})), r"weights: asymmetric codes \(zero points\)"),
        (entry(group(W8 | {"type": "float"})), r"type 'float' \(such as fp8\)"),
        (entry(group(W8 | {"num_bits": 3})), "num_bits 3: expected 4 or 8"),
        (entry(group(W8 | {"strategy": "block"})), "strategy 'block'"),
        (entry(group(W4 | {"actorder": "group"})), "actorder 'group'"),
        (entry(group(W4 | {"group_size": 24})), "group_size 24: expected a multiple of 16"),
        (entry(group(W4 | {"group_size": None})), "group_size None"),
        (entry(group(W8, None)), "8-bit weights with activations in floating point"),
        (entry(group(W8, TOKEN | {"num_bits": 4})), "input_activations: num_bits 4: expected 8"),
        (entry(group(W8, STATIC | {"dynamic": True})), "strategy 'tensor' with dynamic True"),
        (entry(group(W8, STATIC | {"dynamic": "local"})), "dynamic 'local'"),
        (entry(group(W8, STATIC | {"symmetric": False})), "input_activations: asymmetric"),
        (entry(group(output_activations=TOKEN)), "output_activations .quantized outputs."),
        (entry(group(targets=["Embedding"])), "target .'Embedding'. cannot be expressed"),
        (entry(group(targets=["re:("])), "not a regular expression"),
        (entry(group(targets=[3])), "expected a list of targets"),
        (entry(["Linear"]), "preset is not supported"),
        (entry(group(), kv_cache_scheme=STATIC), "kv_cache_scheme"),
        (entry(group(), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .*sparse weights"),
        (entry(group(), transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (entry(group(), moe_sparsity_config={"method": "prune"}), "moe_sparsity_config"),
    ],
)
def test_what_cannot_be_read(changed, message, tmp_path):
    refused(message, parse_quantization, changed, "config.json")
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"] | {"quantization_config": changed})
    refused(message, fqjax.load_hf, directory)


def test_targets_are_ranked():
    """A module's name counts before a regular expression, and that before its class; what is ignored before all."""
    names = ["re:.*up_proj", "Linear", "a.up_proj", "re:.*"]
    groups = [group(W4 | {"group_size": 16 * (i + 1)}, targets=[name]) for i, name in enumerate(names)]
    read = parse_quantization(entry(*groups, ignore=["re:.*head", "b"]), "config.json")
    sizes = {name: read.scheme_of(name) for name in ("a.up_proj", "b.up_proj", "b", "lm_head")}
    assert [scheme and scheme.group_size for scheme in sizes.values()] == [48, 64, None, None]


def test_presets_and_early_spellings_are_read():
    named = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"W4A16": ["Linear"]}}
    expected = LayerScheme(bits=4, strategy="group", group_size=128)
    assert parse_quantization(named, "").scheme_of("x") == expected
    nested = {"quantization_config": named, "sparsity_config": {"format": "dense"}}
    assert parse_quantization(nested, "").scheme_of("x") == expected
    written = write_quantization(
        {"a": expected, "b": LayerScheme(bits=8, strategy="tensor", activations="static")}, ["c"]
    )
    again = parse_quantization(written, "")
    assert again.scheme_of("a") == expected and again.scheme_of("c") is None


def stored(tmp_path, weights=W8, inputs=TOKEN, edit=lambda tensors: None, ignore=("lm_head",)):
    """A checkpoint with random codes and scales that differ from module to module."""
    config = variants.VARIANTS["llama-grouped"]
    tensors = variants.weights(variants.tensor_shapes(config))
    rng = np.random.default_rng(0)
    high = 2 ** (weights["num_bits"] - 1)
    for module in [name.removesuffix(".weight") for name in tensors if name.split(".")[-2] in LINEARS]:
        n, k = tensors[f"{module}.weight"].shape
        codes = rng.integers(-high, high, (n, k)).astype(np.int8)
        tensors[f"{module}.weight"] = codes
        shape = {"tensor": (1,), "channel": (n, 1), "group": (n, -(-k // weights.get("group_size", k)))}[
            weights["strategy"]
        ]
        tensors[f"{module}.weight_scale"] = rng.uniform(0.5, 1.0, shape).astype(np.float32) / (4 * high)
        if inputs and not inputs.get("dynamic"):
            tensors[f"{module}.input_scale"] = np.array([0.03], np.float32)
    edit(tensors)
    tmp_path.mkdir(parents=True, exist_ok=True)
    quantization = entry(group(weights, inputs), ignore=ignore)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        (W8, TOKEN),
        (W8 | {"strategy": "tensor"}, STATIC),
        (W4, TOKEN),
        (W4 | {"group_size": 48}, TOKEN),
        (W4 | {"group_size": 128}, None),
        (W4 | {"strategy": "channel", "group_size": -1}, None),
        (W4 | {"strategy": "tensor", "group_size": None}, STATIC),
        (W8 | {"strategy": "group", "group_size": 16}, STATIC),
    ],
)
def test_codes_times_scales_are_kept(weights, inputs, tmp_path):
    """Of every module, with codes down to -128 and -8, and scales that differ among the parts of a layer."""
    if weights["group_size" if "group_size" in weights else "num_bits"] is None:
        weights = {key: value for key, value in weights.items() if value is not None}
    directory = stored(tmp_path, weights, inputs)
    tensors = load_file(directory / "model.safetensors")
    model, _ = fqjax.load_hf(directory, jnp.float32)
    layer = model.layers[1].self_attn.qkv_proj
    rows = []
    for part in ("q_proj", "k_proj", "v_proj"):
        module = f"model.layers.1.self_attn.{part}"
        codes, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
        if weights["strategy"] == "group":
            scale = np.repeat(scale, weights["group_size"], axis=1)[:, : codes.shape[1]]
        rows.append(codes.astype(np.float32) * scale)
    np.testing.assert_array_equal(layer.weight.get_value().dequantize()[:, :48], np.concatenate(rows))
    assert np.isfinite(logits(model)).all()
    fqjax.save(tmp_path / "own", model)
    np.testing.assert_array_equal(logits(fqjax.load(tmp_path / "own")), logits(model))
    fqjax.save_compressed_tensors(tmp_path / "again", model)
    again, _ = fqjax.load_hf(tmp_path / "again", jnp.float32)
    np.testing.assert_allclose(logits(again), logits(model), rtol=0, atol=1e-5)


def test_scales_that_were_read_become_integers(tmp_path):
    model, _ = fqjax.load_hf(stored(tmp_path, W4), jnp.float32)
    changed, report = fqjax.integer_scales(model)
    assert all(row.scales == "group of 16, integer" for row in report.layers)
    before, after = logits(model), logits(changed)
    assert np.square(after - before).mean() < 1e-3 * np.square(before).mean()


Q = "model.layers.0.self_attn.q_proj"


def changed(name, values):
    return lambda tensors: tensors.update({name: values}) if values is not None else tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (changed(f"{Q}.weight_scale", None), "q_proj.weight_scale' is missing"),
        (changed(f"{Q}.input_scale", None), "q_proj.input_scale' is missing"),
        (changed(f"{Q}.weight_scale", np.ones((3, 1), np.float32)), r"weight_scale' is F32 \(3, 1\); expected .*\(48, 1\)"),
        (changed(f"{Q}.weight_scale", np.zeros((48, 1), np.float32)), "weight_scale' holds a scale that is not above 0"),
        (changed(f"{Q}.weight_scale", np.full((48, 1), np.nan, np.float32)), "not finite"),
        (changed(f"{Q}.weight", np.ones((48, 48), np.float32)), r"q_proj.weight' is F32 .*expected I8 \(out, 48\)"),
        (changed(f"{Q}.weight", np.ones((40, 48), np.int8)), "88 output channels, config.json implies 96"),
        (changed(f"{Q}.input_scale", np.array([0.05], np.float32)), "input_scale differs .q_proj 0.05, k_proj 0.03"),
        (changed(f"{Q}.weight_zero_point", np.ones((48, 1), np.int8)), "weight_zero_point' is not 0"),
        (changed(f"{Q}.weight_g_idx", np.arange(48, dtype=np.int32)), "weight_g_idx' orders channels by activation"),
        (changed(f"{Q}.weight_global_scale", np.ones(1, np.float32)), "weight_global_scale' is not part of the arch"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(edit, message, tmp_path):
    refused(message, fqjax.load_hf, stored(tmp_path, W8, STATIC, edit))


def test_zero_points_of_zero_and_plain_orders_are_passed_over(tmp_path):
    def edit(tensors):
        tensors[f"{Q}.weight_zero_point"] = np.zeros((48, 1), np.int8)
        tensors[f"{Q}.weight_g_idx"] = np.zeros(48, np.int32)

    fqjax.load_hf(stored(tmp_path, edit=edit))


def test_codes_beyond_four_bits(tmp_path):
    edit = changed(f"{Q}.weight", np.full((48, 48), 8, np.int8))
    refused("codes beyond -8 and 7", fqjax.load_hf, stored(tmp_path, W4, edit=edit))


def test_one_layer_is_quantized_as_a_whole(tmp_path):
    refused("some are quantized and some are not", fqjax.load_hf, stored(tmp_path, ignore=("lm_head", Q)))
    refused("lm_head: is quantized; expected it under ignore", fqjax.load_hf, stored(tmp_path, ignore=()))


@pytest.fixture
def quantized(tmp_path):
    """A checkpoint of fqjax with a tokenizer, in integers that can be exported."""
    source = make_checkpoint(tmp_path / "source")
    (tmp_path / "text.txt").write_text("return the list of values that the class holds " * 100)
    options = ["--scheme", "w4a8", "--calibration", str(tmp_path / "text.txt"), "--samples", "2", "--window", "32"]
    assert cli.main(["convert", str(source), str(tmp_path / "own"), *options]) == 0
    return tmp_path


def test_the_commands_take_the_format(quantized, capsys):
    out = quantized / "out"
    assert cli.main(["export", str(quantized / "own"), str(out)]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    results = []
    for model in ("own", "out"):
        arguments = ["--text", str(quantized / "text.txt"), "--window", "32", "--json", str(quantized / "x.json")]
        assert cli.main(["eval", str(quantized / model), *arguments]) == 0
        results.append(json.loads((quantized / "x.json").read_text())["perplexity"])
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    assert cli.main(["generate", str(out), "--prompt", "return", "--max-new-tokens", "2"]) == 0
    assert cli.main(["inspect", str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["convert", str(out), str(quantized / "again"), "--dry-run"]) == 0
    assert "INT4" in capsys.readouterr().out
    assert cli.main(["convert", str(out), str(quantized / "again")]) == 0
    np.testing.assert_array_equal(logits(fqjax.load(quantized / "again")), logits(fqjax.load_hf(out)[0]))
    capsys.readouterr()
    for extra in (["--scheme", "w4a8"], ["--set", "alpha=none"], ["--ignore", "down"]):
        assert cli.main(["convert", str(out), str(quantized / "other"), *extra]) == 2
        err = capsys.readouterr().err
        assert "quantized already" in err and err.count("\n") == 1
    for arguments in (
        ["export", str(quantized / "own"), str(out)],
        ["export", str(quantized / "source"), str(quantized / "x")],
    ):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
