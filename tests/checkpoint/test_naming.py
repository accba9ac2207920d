"""Names of tensors as programs spell them: each is found by what the files hold."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import fqjax
from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.hugging_face import abstract_model, load_hf
from fqjax.checkpoint.naming import found, written
from fqjax.checkpoint.tree import named_leaves
from fqjax.models import FAMILIES
from tests.conftest import refused
from tests.models import variants

ZOO = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3-moe", "opt-untied"]


def bare(name):
    return name.removeprefix("model.").removeprefix("decoder.")


def wrapped(outer):
    return lambda name: f"{outer}{name}"


def inside_the_model(name):
    return name if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}"


PREFIXES = {
    "none": bare,
    "language_model.": wrapped("language_model."),
    "model.language_model.": inside_the_model,
    "base_model.model.": wrapped("base_model.model."),
    "module.": wrapped("module."),
    "_orig_mod.": wrapped("_orig_mod."),
}


@pytest.fixture(scope="module", params=ZOO)
def family(request, tmp_path_factory):
    """A family, the paths of a model's parameters, and the names that transformers gives their tensors."""
    config = variants.VARIANTS[request.param]
    directory = variants.write_checkpoint(tmp_path_factory.mktemp(request.param), config)
    name, read = read_architecture(directory)
    paths = list(dict(nnx.to_flat_state(nnx.state(abstract_model(name, read, jnp.float32)))))
    return FAMILIES[name], paths, set(variants.tensor_shapes(config))


def names_of(naming, paths):
    return {tensor for path in paths for tensor in naming.source(path).tensors}


def test_the_names_that_are_written_are_those_of_transformers(family):
    family, paths, names = family
    assert names_of(written(family), paths) == names
    assert names_of(found([], family), paths) == names


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
def test_a_prefix_is_found(family, rename):
    family, paths, names = family
    renamed = {rename(name) for name in names}
    assert names_of(found(renamed, family), paths) == renamed


@pytest.mark.parametrize(
    ("moe", "gate", "up", "down"),
    [
        ("block_sparse_moe", "gate_proj", "up_proj", "down_proj"),
        ("mlp", "gate_proj", "up_proj", "down_proj"),
        ("mlp", "w1", "w3", "w2"),
    ],
)
def test_experts_of_mixtral_in_other_words(tmp_path, moe, gate, up, down):
    """As llm-compressor and versions of transformers write them."""
    first = variants.write_checkpoint(tmp_path / "one", variants.VARIANTS["mixtral"])
    second = variants.write_checkpoint(tmp_path / "two", variants.VARIANTS["mixtral"])
    words = {"w1": gate, "w3": up, "w2": down}
    tensors = load_file(first / "model.safetensors")
    renamed = {
        re.sub(r"\.(w\d)\.", lambda m: f".{words[m[1]]}.", name).replace("block_sparse_moe", moe): values
        for name, values in tensors.items()
    }
    save_file(renamed, second / "model.safetensors")
    assert same(first, second)


def same(first, second):
    leaves = [named_leaves(nnx.state(load_hf(directory, jnp.float32)[0])) for directory in (first, second)]
    return leaves[0].keys() == leaves[1].keys() and all(np.array_equal(leaves[0][n], leaves[1][n]) for n in leaves[0])


def test_a_trunk_alone_is_read(tmp_path):
    """What AutoModel saved: no prefix, and the trunk's own class."""
    config = variants.VARIANTS["llama-tied"]
    first = variants.write_checkpoint(tmp_path / "one", config)
    second = variants.write_checkpoint(tmp_path / "two", config | {"architectures": ["LlamaModel"]})
    save_file({bare(n): t for n, t in load_file(first / "model.safetensors").items()}, second / "model.safetensors")
    assert same(first, second)


def test_two_prefixes_in_one_checkpoint_are_refused(tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"])
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"norm.weight": tensors["model.norm.weight"].copy()}, directory / "model.safetensors")
    refused("tensor 'norm.weight' is not part of the architecture", fqjax.load_hf, directory)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"architectures": None}, "LlamaForCausalLM"),
        ({"architectures": []}, "LlamaForCausalLM"),
        ({"architectures": ["LLaMAForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "LlamaForCausalLM"),
        ({"architectures": ["LlamaModel"]}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mistral"}, "MistralForCausalLM"),
    ],
)
def test_an_architecture_by_another_name(tmp_path, changes, name):
    assert read_architecture(variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"] | changes))[0] == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "architectures says LlamaForCausalLM and model_type 'mistral', which is another"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures says Qwen2ForCausalLM and model_type 'llama'"),
        ({"architectures": [], "model_type": "mamba"}, "of model_type 'mamba' is not supported"),
        ({"architectures": [None]}, "architecture None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not supported"),
    ],
)
def test_an_architecture_that_is_none_or_two(tmp_path, changes, message):
    refused(message, read_architecture, variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"] | changes))


def test_an_architecture_that_is_not_named(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": null, "vocab_size": 64}')
    refused("architecture not named; expected an entry 'architectures' or 'model_type'", read_architecture, tmp_path)
