"""tie_word_embeddings against the files: what these hold is the head."""

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
