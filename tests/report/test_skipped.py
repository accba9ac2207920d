"""What a report names as left in floating point, with the reason."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import fqjax

X = np.ones((2, 4, 8), np.float32)


class Mixed(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, 3, rngs=rngs)
        self.general = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.einsum = nnx.Einsum("bth,hk->btk", (8, 8), rngs=rngs)
        self.adapted = nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs)
        self.first, self.second = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x + self.attention(x))
        x = self.einsum(self.general(self.conv(x)).reshape(x.shape))
        return self.head(self.second(self.first(self.adapted(x))))


def alone(kind):
    return f"of kind {kind}; nnx.Linear is quantized alone"


FOUND = {
    "embed": "an embedding",
    **{f"attention.{part}": alone("LinearGeneral") for part in ("query", "key", "value", "out")},
    "conv": alone("Conv"),
    "general": alone("LinearGeneral"),
    "einsum": alone("Einsum"),
    "adapted": "LoRALinear computes something else than nnx.Linear",
    "adapted.lora": alone("LoRA"),
    "head": "an output head or router",
}


@pytest.fixture(scope="module")
def model():
    return Mixed(nnx.Rngs(0))


def test_everything_left_in_float_is_named_with_the_reason(model, tmp_path):
    quantized, report = fqjax.quantize(model, "w8a8", [X], ignore=["^second$"])
    assert report.skipped == FOUND | {"second": "ignored by '^second$'"}
    assert [row.name for row in report.layers if row.bits == 8] == ["first"]
    text = str(report)
    for name in report.skipped:
        assert sum(line.split()[:1] == [name] for line in text.split("\n")) == 1, name
    assert report.to_json()["skipped"] == report.skipped
    # Each of its matrices belongs to a layer that is quantized, or that is named.
    for path, leaf in nnx.to_flat_state(nnx.state(quantized, nnx.Param)):
        if all(np.ndim(part) > 1 for part in jax.tree.leaves(leaf)):
            assert ".".join(map(str, path[:-1])) in report.skipped
    fqjax.save(tmp_path / "out", quantized)
    again = fqjax.report_of(fqjax.load(tmp_path / "out", Mixed(nnx.Rngs(1))))
    assert again.skipped == FOUND | {"second": "left out when the model was quantized"}


def test_of_a_model_in_float_the_linear_layers_are_none_that_were_left(model):
    report = fqjax.report_of(model)
    assert report.skipped == FOUND and [row.name for row in report.layers] == ["first", "second"]


def test_rules_are_named(model):
    scheme = dataclasses.replace(fqjax.PRESETS["w8a8"], rules=(fqjax.Rule("^first$", "float"),))
    assert fqjax.quantize(model, scheme, [X])[1].skipped["first"] == "left in float by a rule"
