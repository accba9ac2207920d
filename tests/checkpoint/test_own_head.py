"""tie_word_embeddings against the files: what these hold is the head."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fqjax
from fqjax.cli import main as cli
from tests.conftest import refused
from tests.models import variants


def with_head(directory, change, dtype=np.float32):
    """A tied checkpoint that holds a head all the same, a changed embedding."""
    variants.write_checkpoint(directory, variants.VARIANTS["llama-tied"])
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"].copy()).astype(dtype)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_head_of_its_own_is_used(tmp_path, caplog):
    model, _ = fqjax.load_hf(with_head(tmp_path, lambda head: head + 1), np.float32)
    assert not model.config.tie_word_embeddings and "but lm_head.weight is not the embedding" in caplog.text
    stored = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(model.lm_head.kernel[...], stored.T)


def test_a_head_of_its_own_is_kept_by_convert(tmp_path):
    source = with_head(tmp_path / "source", lambda head: 2 * head)
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--scheme", "bf16"]) == 0
    model = fqjax.load(tmp_path / "out")
    np.testing.assert_array_equal(model.lm_head.kernel[...].T, 2 * model.embed_tokens.embedding[...])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_copy_of_the_embedding_stays_tied(tmp_path, dtype, caplog):
    model, _ = fqjax.load_hf(with_head(tmp_path, lambda head: head, dtype))
    assert model.config.tie_word_embeddings and not caplog.text


def test_a_head_of_another_shape_is_no_copy(tmp_path):
    refused("'lm_head.weight' has shape \\(63, 48\\)", fqjax.load_hf, with_head(tmp_path, lambda head: head[1:]))


def test_a_head_that_is_missing_is_refused(tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"])
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    refused(
        "tensor 'lm_head.weight' is missing; tie_word_embeddings is not true in config.json", fqjax.load_hf, directory
    )


def in_shards(directory, *, unlisted=()):
    """A checkpoint of one file with an index of it, which leaves some tensors out."""
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = set(load_file(directory / "model-00001-of-00001.safetensors")) - set(unlisted)
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def told(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_head_that_the_index_does_not_list_is_used(tmp_path, caplog):
    directory = in_shards(with_head(tmp_path, lambda head: head + 1), unlisted=["lm_head.weight"])
    model, _ = fqjax.load_hf(directory, np.float32)
    assert not model.config.tie_word_embeddings
    (line,) = told(caplog)
    assert "lm_head.weight is not the embedding" in line


def test_tensors_that_the_index_does_not_list_are_used_and_said(tmp_path, caplog):
    variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"])
    fqjax.load_hf(in_shards(tmp_path, unlisted=["lm_head.weight", "model.norm.weight"]))
    (line,) = told(caplog)
    assert line.endswith(
        "lm_head.weight, model.norm.weight: in a shard, though not listed in the index; read from there"
    )


def test_a_tensor_that_neither_the_index_nor_the_architecture_knows_is_said(tmp_path, caplog):
    variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"])
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"vision.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    fqjax.load_hf(in_shards(tmp_path, unlisted=["vision.weight"]))
    (line,) = told(caplog)
    assert "'vision.weight' is not part of the architecture in config.json, nor listed in the index" in line
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    refused("'vision.weight' is not part of the architecture in config.json$", fqjax.load_hf, tmp_path)


def with_two_thetas(directory):
    config = json.loads((directory / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 500000.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("fault", ["head", "norm", "tokenizer"])
@pytest.mark.parametrize("command", ["convert", "export"])
def test_what_there_is_to_say_before_a_refusal_is_not_said(tmp_path, capsys, caplog, fault, command):
    """One line says what is wrong, with a head and positions that there would be something to say of."""
    source = with_two_thetas(with_head(tmp_path / "source", lambda head: head[1:] if fault == "head" else head + 1))
    if fault == "norm":
        tensors = load_file(source / "model.safetensors")
        save_file({key: tensors[key] for key in tensors if key != "model.norm.weight"}, source / "model.safetensors")
    if fault == "tokenizer":
        (source / "tokenizer.json").write_text("{")
    assert (
        cli.main([command, str(source), str(tmp_path / "out"), *(["--scheme", "bf16"] * (command == "convert"))]) == 2
    )
    assert not told(caplog)
    (line,) = capsys.readouterr().err.splitlines()
    named = {"head": "lm_head.weight' has shape", "norm": "model.norm.weight' is missing", "tokenizer": "tokenizer"}
    assert line.startswith("fqjax: error: ") and named[fault] in line
