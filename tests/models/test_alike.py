"""A model of shapes whose blocks and experts are copies is what it would be if each were made."""

import contextlib
import json
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.checkpoint import hugging_face
from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.hugging_face import FAMILIES, abstract_model
from fqjax.cli import main as cli
from fqjax.models import decoder, experts
from fqjax.models.alike import each, shapes_alone
from tests.models import variants


def architecture(directory, name, **changes):
    (directory / "config.json").write_text(json.dumps(variants.VARIANTS[name] | changes))
    return read_architecture(directory)


MIXED = ["llama", "qwen2-window", "qwen3-window", "mixtral", "qwen3-moe-step", "qwen3-moe-mlp-only", "opt-350m"]


@pytest.mark.parametrize("name", MIXED)
def test_copies_are_what_would_be_made(tmp_path, name):
    family, config = architecture(tmp_path, name)
    made = nnx.eval_shape(lambda: FAMILIES[family].model(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    (structure, expected), (copied, found) = nnx.split(made), nnx.split(abstract_model(family, config, jnp.bfloat16))
    assert copied == structure and described(found) == described(expected)


def described(state):
    return [(path, type(leaf), leaf.get_value(), leaf.get_metadata()) for path, leaf in nnx.to_flat_state(state)]


def test_each_kind_is_made_once(tmp_path, monkeypatch):
    counts = Counter()
    for module, cls in ((decoder, decoder.Layer), (experts, experts.Expert)):
        kind = type(cls.__name__, (cls,), {"__init__": counting(cls, counts)})
        monkeypatch.setattr(module, cls.__name__, kind)
    model = abstract_model(*architecture(tmp_path, "qwen3-moe-step", num_hidden_layers=40), jnp.bfloat16)
    assert counts == {"Layer": 2, "Expert": 1} and len(model.layers) == 40 and len(model.layers[39].mlp.experts) == 6


def counting(cls, counts):
    def made(self, *arguments, **settings):
        counts[cls.__name__] += 1
        cls.__init__(self, *arguments, **settings)

    return made


def test_copies_share_nothing_and_values_are_drawn_for_each():
    def make(rngs):
        return each(lambda _: nnx.Linear(3, 3, rngs=rngs), [None] * 2)

    first, second = make(nnx.Rngs(0))
    assert not np.array_equal(first.kernel, second.kernel)
    with shapes_alone():
        first, second = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    first.bias = None
    assert second.bias is not None and first.kernel is not second.kernel
    first, second = make(nnx.Rngs(0))
    assert not np.array_equal(first.kernel, second.kernel)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-step"])
def test_a_plan_is_the_same(tmp_path, capsys, monkeypatch, name):
    """With layers chosen by name among those that are alike."""
    architecture(tmp_path, name, num_hidden_layers=4)
    options = [
        "--set",
        "int4_share=0.1",
        "--set",
        r"int8_layers=layers\.1\.self|experts\.2\.",
        "--ignore",
        r"layers\.3\..*down_proj",
        "--all-layers",
    ]
    shown = []
    for _ in range(2):
        assert cli.main(["convert", str(tmp_path), str(tmp_path / "out"), "--dry-run", *options]) == 0
        shown.append(capsys.readouterr().out)
        monkeypatch.setattr(hugging_face, "shapes_alone", contextlib.nullcontext)
    assert shown[0] == shown[1] and "INT8" in shown[0] and "layers.3.self_attn.o_proj" in shown[0]
