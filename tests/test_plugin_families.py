"""The package of docs/adding_a_model.md, installed as it stands there: an architecture that fqjax does not have."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax import registry
from fqjax.models import FAMILIES, Family, register_family
from fqjax.runtime.errors import InputError
from tests.conftest import make_checkpoint
from tests.documented_package import install, make_phi3

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return install("adding_a_model", "phi3", tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same weights as a checkpoint of Llama and one of Phi-3."""
    directory = tmp_path_factory.mktemp("sources")
    return make_checkpoint(directory / "llama"), make_phi3(directory / "phi3")


def run(*arguments, paths=()):
    """Runs Python in a process that finds these directories and this repository."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def inspect(path, *paths):
    """Runs ``fqjax inspect``."""
    return run("-c", f"import sys; from fqjax.cli.main import main; sys.exit(main(['inspect', '{path}']))", paths=paths)


@pytest.fixture(scope="module")
def family(package):
    """The package's family, registered in this process."""
    sys.path.insert(0, str(package))
    registered = importlib.import_module("phi3").FAMILY
    register_family(registered)
    yield registered
    registry._registered["families"].pop(registered.architecture)
    sys.path.remove(str(package))
    del sys.modules["phi3"]


@pytest.fixture(scope="module")
def written(family, sources, tmp_path_factory):
    """The checkpoint in floating point and quantized, and the directories that the latter was written to."""
    directory = tmp_path_factory.mktemp("written")
    model, _ = fqjax.load_hf(sources[1])
    quantized, _ = fqjax.quantize(model, "w4a8")
    fqjax.save(directory / "out", quantized)
    fqjax.save_compressed_tensors(directory / "exported", quantized)
    return model, quantized, directory


def test_it_computes_what_llama_does_with_the_same_weights(written, sources):
    llama, _ = fqjax.load_hf(sources[0])
    call, tokens = nnx.jit(lambda model, tokens: model(tokens)), np.arange(3, 35, dtype=np.int32)[None]
    np.testing.assert_array_equal(call(written[0], tokens), call(llama, tokens))


def test_it_is_saved_and_exported(written, family):
    _, quantized, directory = written
    for again in (fqjax.load(directory / "out"), fqjax.load_hf(directory / "exported")[0]):
        assert type(again) is family.model and again.config == quantized.config
        weights = (model.layers[0].self_attn.qkv_proj.weight.get_value() for model in (again, quantized))
        np.testing.assert_array_equal(*(weight.dequantize() for weight in weights))


def test_the_command_line_finds_it(written, package, sources):
    done = inspect(written[2] / "exported", package)
    assert done.returncode == 0 and "qkv_proj" in done.stdout, done.stderr


@pytest.mark.parametrize("what", ["source", "out"])
def test_without_the_package_the_architecture_is_named(written, sources, what):
    path = sources[1] if what == "source" else written[2] / "out"
    done = inspect(path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Phi3ForCausalLM" in done.stderr and "LlamaForCausalLM, MistralForCausalLM" in done.stderr


def test_a_package_that_cannot_be_imported_is_named(sources, tmp_path):
    done = inspect(sources[1], install("adding_a_model", "phi3", tmp_path, phi3="import absent_module\n"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "family 'phi3' of phi3 cannot be loaded (ModuleNotFoundError: " in done.stderr


def test_a_name_is_taken_once_and_by_a_family(monkeypatch):
    llama = FAMILIES["LlamaForCausalLM"]
    register_family(llama)
    with pytest.raises(InputError, match="family 'LlamaForCausalLM' is there already"):
        register_family(Family(**vars(llama) | {"prefixes": ("other.",)}))
    with pytest.raises(InputError, match=r"family: expected a fqjax.models.Family, got dict"):
        register_family({})
    with pytest.raises(InputError, match="dict: families are objects; expected a call of register_family with one"):
        fqjax.register("families")(type("dict", (), {"kind": "LlamaForCausalLM"}))
    assert "AbsentForCausalLM" not in FAMILIES and len(FAMILIES) == len(list(FAMILIES))
