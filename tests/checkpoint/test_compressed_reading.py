"""Checkpoints in the compressed-tensors format that others wrote: what is read of them, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import fqjax
from fqjax.checkpoint.compressed.config import LayerScheme, parse_quantization, read_quantization, write_quantization
from fqjax.checkpoint.tree import named_leaves
from fqjax.cli import main as cli
from tests.conftest import make_checkpoint, refused
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


def logits(model):
    return np.asarray(variants.logits(model), np.float32)


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
        (entry(group(W8 | {"num_bits": 8.0})), "num_bits 8.0: expected 4 or 8"),
        (entry(group(W8, TOKEN | {"num_bits": 8.0})), "num_bits 8.0: expected 8"),
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
        (
            entry(group(targets=["re:a{99999999999999}"])),
            "not a regular expression .the repetition number is too large",
        ),
        (entry(group(targets=[3])), "expected a list of targets"),
        (entry(group(), group(inputs=STATIC)), "group_1: target .'Linear'. is in another group, with another scheme"),
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


def test_the_entry_under_both_of_its_names(tmp_path):
    early = {"quantization_config": None, "compression_config": entry(group())}
    for more in ({}, {"quantization_config": entry(group())}):
        (tmp_path / "config.json").write_text(json.dumps(early | more))
        assert read_quantization(tmp_path) == parse_quantization(entry(group()), "")
    (tmp_path / "config.json").write_text(json.dumps(early | {"quantization_config": {}}))
    refused("quantization_config and compression_config differ", read_quantization, tmp_path)


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


@pytest.mark.sample(1)
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

    leaves = [
        named_leaves(nnx.state(fqjax.load_hf(stored(tmp_path / name, edit=change))[0]))
        for name, change in (("plain", lambda tensors: None), ("edited", edit))
    ]
    assert leaves[0].keys() == leaves[1].keys()
    assert all(np.array_equal(leaf, leaves[1][name]) for name, leaf in leaves[0].items())


def test_codes_beyond_four_bits(tmp_path):
    edit = changed(f"{Q}.weight", np.full((48, 48), 8, np.int8))
    refused("codes beyond -8 and 7", fqjax.load_hf, stored(tmp_path, W4, edit=edit))


def test_one_layer_is_quantized_as_a_whole(tmp_path):
    refused("some are quantized and some are not", fqjax.load_hf, stored(tmp_path, ignore=("lm_head", Q)))


def test_what_files_hold_in_float_is_in_float(tmp_path, caplog):
    """Writers leave a head out without saying so; where it is quantized, it is refused."""
    listed, unlisted = (fqjax.load_hf(stored(tmp_path / str(i), ignore=i * ["lm_head"]))[0] for i in (1, 0))
    leaves = [named_leaves(nnx.state(model)) for model in (listed, unlisted)]
    assert leaves[0].keys() == leaves[1].keys() and not caplog.text
    assert all(np.array_equal(leaf, leaves[1][name]) for name, leaf in leaves[0].items())

    def quantize_head(tensors):
        tensors["lm_head.weight"] = np.ones((64, 48), np.int8)
        tensors["lm_head.weight_scale"] = np.ones((64, 1), np.float32)

    refused(
        "lm_head: is quantized; expected it under ignore",
        fqjax.load_hf,
        stored(tmp_path, edit=quantize_head, ignore=()),
    )
    message = "lm_head is quantized in the files, but not in the quantization_config"
    refused(message, fqjax.load_hf, stored(tmp_path, edit=lambda t: packed_head(t), ignore=["lm_head"]))


def packed_head(tensors):
    del tensors["lm_head.weight"]
    tensors["lm_head.weight_packed"] = np.ones((64, 6), np.int32)


def test_a_layer_in_float_that_is_to_be_quantized_is_said(tmp_path, caplog):
    name = "model.layers.0.mlp.down_proj"

    def keep(tensors):
        tensors[f"{name}.weight"] = np.ones(tensors[f"{name}.weight"].shape, np.float32)
        del tensors[f"{name}.weight_scale"]

    model, _ = fqjax.load_hf(stored(tmp_path, edit=keep))
    assert isinstance(model.layers[0].mlp.down_proj, nnx.Linear)
    assert f"{name}: in floating point in the files" in caplog.text


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_groups_that_were_cut_to_divide_a_layer_are_joined(size, tmp_path):
    """The scales of 48 channels in groups of 128 are one column, however small the groups they were written as."""

    def cut(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = np.repeat(tensors[name][:, :1], tensors[name].shape[1], axis=1)

    model, _ = fqjax.load_hf(stored(tmp_path / "same", W4 | {"group_size": size}, edit=cut))
    assert model.layers[0].mlp.down_proj.weight.get_value().format.group_size == 128
    weights = W4 | {"group_size": size}
    model, _ = fqjax.load_hf(stored(tmp_path / "other", weights))
    weight = model.layers[0].mlp.down_proj.weight.get_value()
    assert weight.format.group_size == size
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    scales = np.repeat(tensors["model.layers.0.mlp.down_proj.weight_scale"], size, axis=1)
    np.testing.assert_array_equal(weight.steps()[:, : scales.shape[1]], scales)


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
