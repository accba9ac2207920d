"""The output head in INT8, for tied and untied embeddings, through quantization and checkpoints."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.layers.head import Int8Table, with_int8_head
from fqjax.runtime.errors import InputError
from tests.models import variants

NAMES = ["llama-grouped", "llama-tied", "opt", "opt-350m", "opt-untied"]


def model_of(name, tmp_path, dtype=jnp.float32):
    return load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS[name]), dtype)[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_lookups_are_those_of_rounded_tables(name, tmp_path):
    model = model_of(name, tmp_path)
    changed = with_int8_head(model)
    head = getattr(changed, changed.head_name)
    assert isinstance(head, Int8Table) and not isinstance(getattr(model, model.head_name), Int8Table)
    tied = changed.config.tie_word_embeddings
    assert changed.head_name == ("embed_tokens" if tied else "lm_head")
    table = model.embed_tokens.embedding[...] if tied else model.lm_head.kernel[...].T
    rows = np.asarray(head(jnp.arange(64)))
    assert (np.abs(rows - table).max(axis=1) <= np.abs(table).max(axis=1) / 254 * 1.001).all()
    hidden = np.random.default_rng(0).normal(size=(3, 5, table.shape[1])).astype(np.float32)
    limit = np.abs(hidden).max(axis=-1, keepdims=True)
    rounded = np.round(hidden / limit * 127) * limit / 127
    np.testing.assert_allclose(head.logits(jnp.asarray(hidden)), rounded @ rows.T, rtol=1e-4, atol=1e-4)
    plain, found = variants.logits(model), variants.logits(changed)
    assert found.dtype == jnp.float32 and 0 < np.abs(found - plain).mean() < 0.05 * np.abs(plain).mean()


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "scheme"), [("llama-grouped", "flattenquant-w8a8"), ("opt-350m", "bf16")])
def test_it_survives_saving(name, scheme, tmp_path):
    model = model_of(name, tmp_path / "source", jnp.bfloat16)
    batch = np.random.default_rng(0).integers(3, 64, (4, 32)).astype(np.int32)
    chosen = fqjax.PRESETS[scheme].override(["int8_head=true"])
    quantized, report = fqjax.quantize(model, chosen, [batch])
    plain, before = fqjax.quantize(model, scheme, [batch])
    assert report.layers == before.layers or scheme != "bf16"
    fqjax.save(tmp_path / "out", quantized)
    loaded = fqjax.load(tmp_path / "out")
    found = variants.logits(quantized)
    np.testing.assert_array_equal(variants.logits(loaded), found)
    assert fqjax.generate(loaded, [5, 6], 4).tolist() == fqjax.generate(quantized, [5, 6], 4).tolist()
    assert np.abs(found - variants.logits(plain)).max() > 0
    fqjax.save(tmp_path / "plain", plain)
    assert "int8_head" not in json.loads((tmp_path / "plain" / "fqjax.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "embed_tokens"}, "no output head 'embed_tokens'"),
        ({"out_features": 65}, "expected \\(64, 48\\)"),
        ({"width": 256}, "width 256"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"more": 1}, "unknown entry 'more'"),
    ],
)
def test_a_wrong_entry_is_named(change, message, tmp_path):
    fqjax.save(tmp_path / "out", with_int8_head(model_of("llama-grouped", tmp_path)))
    file = tmp_path / "out" / "fqjax.json"
    manifest = json.loads(file.read_text())
    manifest.pop("checksums")
    manifest["int8_head"] |= change
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        fqjax.load(tmp_path / "out")


def test_a_model_that_does_not_name_its_head_is_refused():
    class Plain(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x)

    scheme = fqjax.PRESETS["flattenquant-w8a8"].override(["int8_head=true"])
    with pytest.raises(InputError, match="int8_head: the model does not say"):
        fqjax.quantize(Plain(), scheme, [np.ones((2, 8), np.float32)])


def test_the_command_line_sets_it():
    assert fqjax.PRESETS["w8a8"].override(["int8_head=true"]).head == "int8"
