"""Tokens as tokenizers give them: for calibration, as prompts and as texts; padding never counts."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.inference.prompts import as_prompts
from fqjax.models.batches import checked_batches
from fqjax.models.encodings import rows_of
from fqjax.models.llama import Llama, LlamaConfig
from fqjax.runtime.errors import InputError

IDS = np.arange(3, 19).reshape(2, 8)
RIGHT, LEFT = np.ones((2, 8), int), np.ones((2, 8), int)
RIGHT[1, 5:] = LEFT[1, :3] = 0


@pytest.fixture(scope="module")
def llama():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Llama(LlamaConfig(**sizes, **heads, bos_token_id=1), dtype=jnp.float32, rngs=nnx.Rngs(0))


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding."""


SAME = {
    "an array": IDS,
    "lists": IDS.tolist(),
    "a tuple": (IDS,),
    "tokens": {"tokens": IDS},
    "input_ids": {"input_ids": IDS.tolist(), "attention_mask": np.ones_like(IDS).tolist()},
    "an encoding": Encoding(input_ids=jnp.asarray(IDS), attention_mask=np.ones((2, 8), bool), token_type_ids=IDS * 0),
    "labels": {"input_ids": IDS, "labels": IDS},
}


@pytest.mark.parametrize("form", SAME)
def test_all_forms_of_a_batch_are_the_same_tokens(llama, form):
    (batch,) = checked_batches(llama, [SAME[form]])
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, IDS)


def test_one_sequence_is_a_batch_of_one(llama):
    for row in (IDS[0], IDS[0].tolist(), {"input_ids": IDS[0].tolist(), "attention_mask": [1] * 8}):
        (batch,) = checked_batches(llama, [row])
        np.testing.assert_array_equal(batch, IDS[:1])


@pytest.mark.parametrize(("mask", "kept"), [(RIGHT, IDS[1, :5]), (LEFT, IDS[1, 3:])], ids=["right", "left"])
def test_padding_is_cut_off(llama, mask, kept):
    batches = list(checked_batches(llama, [{"input_ids": IDS, "attention_mask": mask}]))
    for found, wanted in zip(batches, [IDS[:1], kept[None]], strict=True):
        np.testing.assert_array_equal(found, wanted)
    prompts, single = as_prompts(Encoding(input_ids=IDS, attention_mask=mask))
    assert not single
    for found, wanted in zip(prompts, [IDS[0], kept], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_statistics_are_those_without_padding(llama):
    name = "layers.0.mlp.down_proj"
    padded = {"input_ids": np.where(RIGHT, IDS, 60), "attention_mask": RIGHT}
    found, wanted = (fqjax.calibrate(llama, data, [name])[name] for data in ([padded], [IDS[:1], IDS[1:, :5]]))
    assert found.rows == found.passed == 13
    np.testing.assert_array_equal(found.absmax, wanted.absmax)
    np.testing.assert_array_equal(np.sort(found.samples, axis=0), np.sort(wanted.samples, axis=0))


def test_sequences_of_several_lengths_without_padding(llama):
    rows = [[5, 6], [7, 8, 9, 10], [11, 12]]
    for batch in (rows, {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}):
        found = [tokens.tolist() for tokens in checked_batches(llama, [batch])]
        assert found == [[[5, 6], [11, 12]], [[7, 8, 9, 10]]]


def test_prompts_and_texts_of_a_tokenizer(llama):
    wanted = fqjax.generate(llama, IDS[1, :5], 2)
    one = {"input_ids": IDS[1:], "attention_mask": RIGHT[1:]}
    np.testing.assert_array_equal(fqjax.generate(llama, one, 2), wanted[None])
    np.testing.assert_array_equal(fqjax.generate(llama, {"input_ids": IDS[1, :5].tolist()}, 2), wanted)
    text = np.arange(3, 20)
    encoded = Encoding(input_ids=[[0, 0, 1, *text]], attention_mask=[[0, 0] + [1] * 18])
    assert fqjax.perplexity(llama, encoded, 8) == fqjax.perplexity(llama, text, 8)


HOLE, EMPTY = np.ones((2, 8), int), np.ones((2, 8), int)
HOLE[0, 3] = EMPTY[1] = 0
BAD = {
    "tokens within": ({"input_ids": IDS, "attention_mask": HOLE}, "hides tokens within a sequence"),
    "a whole row": ({"input_ids": IDS, "attention_mask": EMPTY}, "hides all tokens of a sequence"),
    "another shape": ({"input_ids": IDS, "attention_mask": RIGHT[:, :7]}, "another shape than input_ids"),
    "other values": ({"input_ids": IDS, "attention_mask": RIGHT * 2}, "holds 2; expected 1, and 0"),
    "no mask": ({"input_ids": IDS, "attention_mask": "x"}, "attention_mask: expected integers"),
    "no tokens": ({"attention_mask": RIGHT}, "expected tokens under tokens or input_ids"),
    "twice": ({"input_ids": IDS, "tokens": IDS}, "expected tokens under tokens or input_ids"),
    "positions": ({"input_ids": IDS, "position_ids": IDS}, "got input_ids, position_ids"),
    "empty": ({"input_ids": [[]]}, "expected integers"),
    "nothing": ({"input_ids": []}, "expected integers"),
    "numbers": ({"input_ids": [[1.5]]}, "expected integer"),
    "a number": ({"input_ids": np.array(3)}, "expected integers"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_encoding_is_refused_in_one_line(llama, case):
    encoding, told = BAD[case]
    for call, where in (
        (lambda: fqjax.quantize(llama, "w8a8", [encoding]), "calibration: batch 0: "),
        (lambda: fqjax.generate(llama, encoding, 2), "prompt: "),
        (lambda: fqjax.perplexity(llama, encoding, 4), "token_ids: "),
    ):
        with pytest.raises(InputError, match=rf"^{where}.*{told}") as caught:
            call()
        assert "\n" not in str(caught.value)


class Own(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(64, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, input_ids, attention_mask):
        return self.out(self.embed(input_ids) * attention_mask[..., None])


@pytest.mark.parametrize("kind", [np.asarray, np.ndarray.tolist], ids=["arrays", "lists"])
def test_a_model_of_ones_own_is_called_with_names(kind):
    encoding = Encoding(input_ids=kind(IDS), attention_mask=kind(RIGHT))
    _, report = fqjax.quantize(Own(nnx.Rngs(0)), "w8a8", [encoding])
    assert [row.name for row in report.layers] == ["out"]


def test_encodings_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is an optional package")
    encoding = transformers.BatchEncoding({"input_ids": IDS.tolist(), "attention_mask": LEFT.tolist()})
    rows, single = rows_of(encoding, "prompt")
    assert [row.tolist() for row in rows] == [IDS[0].tolist(), IDS[1, 3:].tolist()] and not single
