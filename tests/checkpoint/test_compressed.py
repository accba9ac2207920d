"""Checkpoints written in the compressed-tensors format without that package, and read again."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fqjax
from fqjax.checkpoint.compressed import write
from fqjax.checkpoint.compressed.packing import pack_int32, unpack_int32
from fqjax.layers.head import with_int8_head
from fqjax.layers.stacked import quantized_layers
from fqjax.models import FAMILIES
from fqjax.models.to_hf import config_to_hf
from tests.conftest import refused
from tests.models import variants


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
    return np.asarray(variants.logits(model), np.float32)


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


@pytest.mark.sample(1)
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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
