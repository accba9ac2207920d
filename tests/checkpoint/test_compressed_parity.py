"""Checkpoints exchanged with the compressed-tensors package and transformers' torch models.

Where activations are quantized the torch models only simulate it, in floating point: with codes down to -128, and with
scales for every token that are 127.5th parts of the largest value.  Logits are compared where that makes no difference.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import fqjax
from fqjax.layers.stacked import quantized_layers
from tests.models import variants

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]

W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.fixture(scope="module", autouse=True)
def packages():
    pytest.importorskip("torch", reason="needs torch, which only the 'parity' extra installs")
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors, which only the 'parity' extra installs")


def load_torch(directory, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def weights_of(model):
    """The weights of the quantized modules, which a first call has decompressed, by module."""
    from compressed_tensors.quantization.utils import is_module_quantized

    return {name: m.weight.detach().float().numpy() for name, m in model.named_modules() if is_module_quantized(m)}


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(variants.tokens(), dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize(
    ("variant", "scheme"),
    [
        ("llama-grouped", "w8a8"),
        ("llama-attention-bias", "w4a8"),
        ("qwen2", "w4a8-integer-scale"),
        ("qwen3-window", "w4a16"),
        ("llama", "smoothquant"),
        ("opt", "w4a8-awq"),
    ],
)
def test_the_package_reads_what_fqjax_writes(variant, scheme, tmp_path):
    source = variants.write_checkpoint(tmp_path / "source", variants.VARIANTS[variant])
    model, _ = fqjax.quantize(fqjax.load_hf(source, jnp.float32)[0], scheme, [variants.tokens()])
    fqjax.save_compressed_tensors(tmp_path / "out", model)
    again, _ = fqjax.load_hf(tmp_path / "out", jnp.float32)
    theirs = load_torch(tmp_path / "out")
    logits = logits_of(theirs)
    assert_same_weights(again, theirs)
    if scheme in ("w8a8", "smoothquant", "w4a16"):
        ours = np.asarray(variants.logits(model))
        assert relative(logits, ours) < (1e-10 if scheme == "w4a16" else 1e-4)


def assert_same_weights(model, theirs):
    """Of all quantized modules, bit for bit, once ours are rounded to the dtype of theirs."""
    weights = weights_of(theirs)
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    prefix = "model.decoder." if theirs.config.model_type == "opt" else "model."
    for name, layer in quantized_layers(model).items():
        stem, _, last = name.rpartition(".")
        parts = [weights.pop(f"{prefix}{stem}.{part}") for part in fused.get(last, (last,))]
        k = layer.input.get_value().multiplier.shape[0]
        ours = layer.weight.get_value().dequantize()[:, :k].astype(model.dtype).astype(jnp.float32)
        np.testing.assert_array_equal(np.concatenate(parts), ours)
    assert not weights


def relative(one, two):
    return np.square(one - two).mean() / np.square(two).mean()


@pytest.mark.parametrize("variant", ["llama-grouped", "opt"])
@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        (W8, TOKEN),
        (W8 | {"strategy": "tensor"}, STATIC),
        (W4, None),
        (W4, TOKEN),
        (W4 | {"strategy": "channel", "group_size": -1}, None),
    ],
)
def test_fqjax_reads_what_the_package_writes(variant, weights, inputs, tmp_path):
    directory = compress(tmp_path, variant, weights, inputs)
    ours, _ = fqjax.load_hf(directory, jnp.float32)
    theirs = load_torch(directory)
    difference = relative(logits_of(theirs), np.asarray(ours(variants.tokens())))
    assert difference < (1e-10 if inputs is None else 2e-3)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(("weights", "inputs"), [(W8, TOKEN), (W4, None)])
def test_scales_in_bfloat16_are_read(weights, inputs, tmp_path):
    directory = compress(tmp_path, "qwen2", weights, inputs, "bfloat16")
    ours, _ = fqjax.load_hf(directory)
    theirs = load_torch(directory, "bfloat16")
    logits_of(theirs)
    assert_same_weights(ours, theirs)


def compress(folder, variant, weights, inputs, dtype="float32"):
    """A random torch model, quantized, compressed and saved by the package and transformers."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized

    model = load_torch(variants.write_checkpoint(folder / "source", variants.VARIANTS[variant]), dtype)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if not is_module_quantized(module):
            continue
        args, weight = module.quantization_scheme.weights, module.weight.data
        shaped = weight.reshape(1, -1) if args.strategy == "tensor" else weight
        if args.strategy == "group":
            shaped = weight.reshape(len(weight), -1, args.group_size)
        scale, zero = calculate_qparams(shaped.amin(-1), shaped.amax(-1), args)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
        if inputs and not inputs.get("dynamic"):
            module.input_scale.data.copy_(torch.tensor([0.04]))
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "out")
    compressor.update_config(str(folder / "out"))
    assert json.loads((folder / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    return folder / "out"
