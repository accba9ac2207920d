import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fqjax
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.checkpoint.safetensors import TensorFiles
from fqjax.checkpoint.source import Source
from fqjax.runtime.errors import InputError
from tests.conftest import edit_config, edit_tensor, make_checkpoint
from tests.models import variants


def test_shards_and_a_single_file_give_the_same_model(tmp_path):
    config = variants.VARIANTS["llama-grouped"] | {"vocab_size": 2048, "max_position_embeddings": 128}
    single = variants.write_checkpoint(tmp_path / "single", config)
    sharded = make_checkpoint(tmp_path / "sharded")
    tokens = variants.tokens()
    np.testing.assert_array_equal(load_hf(single)[0](tokens), load_hf(sharded)[0](tokens))


@pytest.mark.parametrize("stored", [np.float16, jnp.bfloat16, np.float64])
def test_stored_dtypes_are_cast_to_the_one_asked_for(tmp_path, stored):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"])
    tensors = load_file(directory / "model.safetensors")
    save_file({name: t.astype(stored) for name, t in tensors.items()}, directory / "model.safetensors")
    model, _ = load_hf(directory, jnp.float32)
    kernel = model.layers[0].mlp.down_proj.kernel[...]
    assert kernel.dtype == jnp.float32
    expected = tensors["model.layers.0.mlp.down_proj.weight"].astype(stored).astype(np.float32).T
    np.testing.assert_array_equal(kernel, expected)


def test_the_default_dtype_is_bfloat16(checkpoint):
    model, tokenizer = fqjax.load_hf(checkpoint)
    assert model.embed_tokens.embedding[...].dtype == jnp.bfloat16
    assert tokenizer("print", add_special_tokens=False).input_ids


def test_a_directory_without_tokenizer_gives_none(tmp_path):
    assert load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"]))[1] is None


def test_both_spellings_of_rope_are_read(tmp_path):
    old = variants.write_checkpoint(tmp_path / "old", variants.VARIANTS["llama-theta"])
    new = variants.write_checkpoint(tmp_path / "new", variants.VARIANTS["llama-theta"])
    edit_config(new, rope_theta=None, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    first, second = (load_hf(directory)[0].config for directory in (old, new))
    assert first == second and first.rope_theta == 500.0


def test_opt_without_the_outer_prefix_is_read(tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["opt"])
    tensors = load_file(directory / "model.safetensors")
    expected = load_hf(directory)[0](variants.tokens())
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, directory / "model.safetensors")
    np.testing.assert_array_equal(load_hf(directory)[0](variants.tokens()), expected)


def test_a_copy_of_a_tied_head_is_passed_over(tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["llama-tied"])
    tensors = load_file(directory / "model.safetensors")
    expected = load_hf(directory)[0](variants.tokens())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, directory / "model.safetensors")
    np.testing.assert_array_equal(load_hf(directory)[0](variants.tokens()), expected)


def test_torch_is_not_needed(monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, "torch", None)
    model, tokenizer = load_hf(checkpoint)
    weight = TensorFiles(checkpoint).read("model.norm.weight", jnp.bfloat16)
    np.testing.assert_array_equal(model.norm.scale[...], weight)
    assert tokenizer is not None


def fails(directory, message):
    with pytest.raises(InputError, match=message) as caught:
        load_hf(directory)
    assert "\n" not in str(caught.value)


def test_no_such_directory(tmp_path):
    fails(tmp_path / "absent", "absent: no such directory")
    fails("./no/where/at-all", "no such directory")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to the hub\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    fails("nobody/nothing", r"nobody/nothing: no such directory.*hub \(no route to the hub\)")


def test_a_hub_id_is_downloaded(monkeypatch, checkpoint):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(checkpoint))
    assert load_hf("some/model")[0].config.vocab_size == 2048


def test_a_file_is_no_directory(checkpoint):
    fails(checkpoint / "config.json", "a file; expected")


def test_not_a_model(tmp_path):
    fails(tmp_path, "no config.json")


@pytest.mark.parametrize("content", ["{", "[1, 2]", "{}"])
def test_a_configuration_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    fails(tmp_path, "config.json: (not a JSON|architecture)")


def test_an_architecture_that_is_not_supported(checkpoint):
    edit_config(checkpoint, architectures=["BertModel"])
    fails(
        checkpoint, "BertModel is not supported; supported are LlamaForCausalLM, MistralForCausalLM, .*OPTForCausalLM"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"intermediate_size": 96}, r"down_proj.weight' has shape \(48, 80\), config.json implies \(48, 96\)"),
        ({"num_key_value_heads": 4}, r"implies \(144, 48\) \(q_proj \+ k_proj \+ v_proj together\)"),
        ({"vocab_size": 100}, "embed_tokens.weight.*implies .100, 48"),
    ],
)
def test_a_configuration_that_does_not_fit(checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    fails(checkpoint, message)


def test_no_weights(checkpoint):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    fails(checkpoint, "no model.safetensors")
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    fails(checkpoint, "pytorch_model.bin is a pickle")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.gguf",
            "GGUF, the format of llama.cpp, which fqjax does not read; expected a directory with config.json",
        ),
        ("model.PTH", "a pickle, which fqjax does not read; expected a directory with config.json and safetensors"),
        ("pytorch_model.bin", "a pickle, which"),
        ("model.safetensors", "a file; expected the directory that it is in, /"),
        ("config.json", "a file; expected the directory that it is in, /"),
        ("notes.txt", "a file; expected a model's directory"),
    ],
)
def test_a_file_in_place_of_a_directory(tmp_path, name, message, monkeypatch):
    path = tmp_path / name
    path.touch()
    for load in (fqjax.load_hf, fqjax.load, fqjax.load_tokenizer, lambda path: Source(str(path))):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            load(path)
    if "directory with" in message:  # One that is not there is no name of the hub's.
        monkeypatch.chdir(tmp_path)
        fails(Path("models") / name, f"{name}: {message}")
        for load in (fqjax.load_hf, lambda path: Source(str(path))):
            with pytest.raises(InputError, match=f"no config.json; {name} is|in it; {name} is"):
                load(tmp_path)


@pytest.mark.parametrize("dtype", [None, 5, "x", "int8", "float64", jnp.int32, jnp.complex64, {}, []], ids=str)
def test_a_dtype_that_no_model_has(tmp_path, dtype):
    with pytest.raises(InputError, match="^dtype "):
        fqjax.load_hf(tmp_path, dtype)


def test_a_missing_shard(checkpoint):
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    fails(checkpoint, "model-00002-of-00002.safetensors: missing shard")


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_a_truncated_shard(checkpoint, keep):
    shard = checkpoint / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    fails(checkpoint, "model-00001-of-00002.safetensors: truncated")


def test_a_missing_tensor(checkpoint):
    edit_tensor(checkpoint, "model.layers.1.self_attn.k_proj.weight", lambda _: None)
    fails(checkpoint, "tensor 'model.layers.1.self_attn.k_proj.weight' is missing")


def test_a_tensor_that_the_index_only_promises(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(names))
    fails(checkpoint, "the index says it holds tensor 'model.extra'")


def test_a_tensor_of_the_wrong_shape(checkpoint):
    edit_tensor(checkpoint, "model.layers.0.mlp.down_proj.weight", lambda t: t[:, :-1].copy())
    fails(checkpoint, r"down_proj.weight' has shape \(48, 79\), config.json implies \(48, 80\)")


def test_a_tensor_of_another_architecture(tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"])
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(12, np.float32)
    save_file(tensors, directory / "model.safetensors")
    fails(directory, "q_norm.weight' is not part of the architecture")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite(checkpoint, value):
    def spoil(tensor):
        tensor[1, 2] = value
        return tensor

    edit_tensor(checkpoint, "model.layers.1.mlp.up_proj.weight", spoil)
    fails(checkpoint, "up_proj.weight' holds a value that is not finite")


def test_integers_are_no_weights(checkpoint):
    edit_tensor(checkpoint, "model.norm.weight", lambda t: t.astype(np.int32))
    fails(checkpoint, "model.norm.weight' has dtype I32")


@pytest.mark.parametrize("content", ["{", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(checkpoint, content):
    (checkpoint / "model.safetensors.index.json").write_text(content)
    fails(checkpoint, "index.json: ")


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/hostname", "sub/x.safetensors"])
def test_an_index_may_not_point_elsewhere(checkpoint, file):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    fails(checkpoint, "is not a file name in this directory")


def test_a_tokenizer_that_cannot_be_loaded(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{")
    fails(checkpoint, "its tokenizer cannot be loaded")
