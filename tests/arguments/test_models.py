"""Malformed models, and paths to read and write them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given

import fqjax
from fqjax.inference.serve import serve
from fqjax.models.llama import Llama, LlamaConfig
from tests.arguments.values import HEADS, SIZES, few, no_module, no_path, refused, short


@few
@given(value=no_module)
@pytest.mark.parametrize(
    "call",
    [
        lambda model: fqjax.quantize(model, "w8a8", [np.ones((2, 4))]),
        lambda model: fqjax.integer_scales(model),
        lambda model: fqjax.generate(model, [1]),
        lambda model: fqjax.perplexity(model, [1] * 20, 4),
        lambda model: fqjax.calibrate(model, [np.ones((2, 4))], ["layers.0"]),
        lambda model: fqjax.save("there-is-none", model),
        lambda model: fqjax.save_compressed_tensors("there-is-none", model),
        lambda model: fqjax.report_of(model),
        lambda model: serve(model, []),
    ],
    ids="quantize integer_scales generate perplexity calibrate save save_compressed_tensors report_of serve".split(),
)
def test_models(call, value):
    refused("model", call, value)


CALLS_OF_MODELS = {
    "quantize": lambda model, path: fqjax.quantize(model, "w8a8", [np.full((2, 8), 5)]),
    "generate": lambda model, path: fqjax.generate(model, [5], 2),
    "serve": lambda model, path: serve(model, []),
    "perplexity": lambda model, path: fqjax.perplexity(model, [5] * 20, 4),
    "calibrate": lambda model, path: fqjax.calibrate(model, [np.full((2, 8), 5)], ["layers.0.mlp.down_proj"]),
    "integer_scales": lambda model, path: fqjax.integer_scales(model),
    "save": lambda model, path: fqjax.save(path / "out", model),
    "save_compressed_tensors": lambda model, path: fqjax.save_compressed_tensors(path / "out", model),
}


@pytest.mark.parametrize("name", CALLS_OF_MODELS)
def test_models_without_values(name, tmp_path):
    abstract = nnx.eval_shape(lambda: Llama(LlamaConfig(**SIZES, **HEADS), rngs=nnx.Rngs(0)))
    refused("is a shape without values, as of nnx.eval_shape", CALLS_OF_MODELS[name], abstract, tmp_path)
    deleted = Llama(LlamaConfig(**SIZES, **HEADS), rngs=nnx.Rngs(0))
    deleted.lm_head.kernel.get_value().delete()
    refused("model: lm_head.kernel has been deleted", CALLS_OF_MODELS[name], deleted, tmp_path)
    assert not list(tmp_path.iterdir())


class Giving(nnx.Module):
    """Gives something made of its logits."""

    def __init__(self, model, change):
        self.model, self.change, self.config = model, change, model.config

    def __call__(self, tokens):
        return self.change(self.model(tokens))

    def make_cache(self, batch, capacity):
        return self.model.make_cache(batch, capacity)

    def extend(self, tokens, cache, counts):
        logits, cache = self.model.extend(tokens, cache, counts)
        changed = self.change(logits)
        return changed if isinstance(changed, tuple) else (changed, cache)


def failing(logits):
    raise TypeError("no\nlogits")


NO_LOGITS = {
    "one value a token": lambda logits: logits[..., 0],
    "an axis more": lambda logits: logits[None],
    "whole numbers": lambda logits: jnp.argsort(logits),
    "complex numbers": lambda logits: logits * 1j,
    "a tuple": lambda logits: (logits, logits, logits),
    "another cache": lambda logits: (logits, logits),
    "a dictionary": lambda logits: {"logits": logits},
    "nothing": lambda logits: None,
    "an error": failing,
}


@pytest.mark.parametrize("name", NO_LOGITS)
def test_models_that_give_no_logits(llama, name):
    model = Giving(llama, NO_LOGITS[name])
    refused("model: ", fqjax.perplexity, model, [5] * 20, 4)
    refused("model: ", fqjax.generate, model, [5], 2)
    refused("model: ", serve, model, [])


def test_as_many_windows_at_once_as_there_are(llama):
    few = fqjax.perplexity(llama, [5] * 50, 8, batch_size=7)
    assert fqjax.perplexity(llama, [5] * 50, 8, batch_size=2**31 - 1) == few


def test_logits_larger_than_the_memory_are_refused(llama, monkeypatch):
    monkeypatch.setattr("fqjax.evaluation.perplexity.memory_bytes", lambda: 10_000)
    refused("batch_size 6: the logits take", fqjax.perplexity, llama, [5] * 54, 10, batch_size=10**6)


@pytest.mark.parametrize("call", [lambda m: fqjax.generate(m, [1]), lambda m: serve(m, [])], ids=["generate", "serve"])
def test_a_module_that_cannot_generate(mlp, call):
    refused("has no method 'extend'", call, mlp)


@few
@given(value=no_path)
@pytest.mark.parametrize("function", [fqjax.load, fqjax.load_hf, fqjax.load_tokenizer], ids=lambda f: f.__name__)
def test_paths_to_read(function, value):
    refused("path" if function is not fqjax.load_tokenizer else "directory", function, value)


@few
@given(value=no_path)
def test_paths_to_write(mlp, value):
    refused("path", fqjax.save, value, mlp)
    refused("path", fqjax.save_compressed_tensors, value, mlp)


@pytest.mark.parametrize("value", [5, "x", [], {}, object(), np.ones(2)], ids=short)
def test_what_is_saved_beside_a_model(mlp, value, tmp_path):
    refused("report ", fqjax.save, tmp_path / "out", mlp, report=value)
    refused("tokenizer ", fqjax.save, tmp_path / "out", mlp, tokenizer=value)
    refused("tokenizer ", fqjax.save_compressed_tensors, tmp_path / "out", mlp, tokenizer=value)
    refused("sharding ", fqjax.load, tmp_path, mlp, sharding=value)
    assert not list(tmp_path.iterdir())
