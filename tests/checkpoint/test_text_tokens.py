"""Tokens that begin and end a text, by config.json, generation_config.json and the tokenizer together."""

import json

import numpy as np
import pytest

import fqjax
from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.source import Source
from fqjax.checkpoint.text_tokens import GENERATION_FILE, with_text_tokens
from fqjax.checkpoint.tokenizer import load_tokenizer
from fqjax.cli import main as cli
from fqjax.data.text import calibration_batches, decode_new, encode_prompt
from fqjax.evaluation.perplexity import cut_windows, perplexity
from tests.conftest import edit_config, refused

TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
"""Of a tokenizer that puts <s> before texts."""

UNKNOWN, BEGIN, END, PADDING, WORD = 0, 1, 2, 3, 300
"""Tokens of the tokenizer; the last is of ordinary text."""


def edit(path, **changes):
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def settled(directory, config=None, generation=None, tokenizer=None, adds=False):
    """Begin and end tokens after changes to the files."""
    edit_config(directory, **(config or {}))
    if generation is not None:
        edit(directory / GENERATION_FILE, **generation)
    edit(directory / "tokenizer_config.json", **(tokenizer or {}))
    edit(directory / "tokenizer.json", post_processor=TEMPLATE if adds else None)
    read = read_architecture(directory)[1]
    found = with_text_tokens(read, directory, load_tokenizer(directory))
    return found.bos_token_id, found.eos_token_id


NO_BOS, NO_EOS = {"bos_token": None}, {"eos_token": None}
FLAG = {"_from_model_config": True}


@pytest.mark.parametrize(
    ("changes", "bos"),
    [
        ({}, BEGIN),
        ({"adds": True}, BEGIN),
        ({"adds": True, "config": {"bos_token_id": 0}}, BEGIN),
        ({"config": {"bos_token_id": 0}}, BEGIN),
        ({"config": {"bos_token_id": -1}}, BEGIN),
        ({"config": {"bos_token_id": None}}, BEGIN),
        ({"adds": True, "tokenizer": NO_BOS, "config": {"bos_token_id": None}}, BEGIN),
        ({"tokenizer": NO_BOS, "config": {"bos_token_id": None}}, None),
        ({"tokenizer": NO_BOS, "config": {"bos_token_id": PADDING}}, PADDING),
        ({"tokenizer": NO_BOS, "config": {"bos_token_id": UNKNOWN}}, None),
        ({"tokenizer": NO_BOS, "config": {"bos_token_id": WORD}}, None),
        ({"tokenizer": NO_BOS, "config": {"bos_token_id": None}, "generation": {"bos_token_id": PADDING}}, PADDING),
    ],
)
def test_the_token_that_begins_a_text(checkpoint, changes, bos):
    assert settled(checkpoint, **changes)[0] == bos


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, (END,)),
        ({"config": {"eos_token_id": [END, WORD]}}, (END, WORD)),
        ({"generation": {"eos_token_id": [END, WORD]}}, (END, WORD)),
        ({"generation": {"eos_token_id": WORD}}, (WORD, END)),
        ({"generation": {"eos_token_id": [END, WORD, END]}}, (END, WORD)),
        ({"generation": {"do_sample": False}}, (END,)),
        ({"generation": {"eos_token_id": None}}, (END,)),
        ({"config": {"eos_token_id": None}, "generation": {"eos_token_id": [WORD]}, "tokenizer": NO_EOS}, (WORD,)),
        # What another model's configuration says, with or without a generation_config.json made of it.
        ({"config": {"eos_token_id": BEGIN}, "adds": True}, (END,)),
        ({"config": {"eos_token_id": UNKNOWN}}, (END,)),
        ({"config": {"eos_token_id": WORD}}, (END,)),
        ({"config": {"eos_token_id": WORD}, "generation": FLAG | {"eos_token_id": WORD}}, (END,)),
        ({"config": {"eos_token_id": PADDING}}, (PADDING, END)),
        ({"config": {"eos_token_id": None}}, (END,)),
        ({"config": {"eos_token_id": -1}, "tokenizer": NO_EOS}, ()),
        ({"generation": {"eos_token_id": [END, 5000]}}, (END,)),
    ],
)
def test_the_tokens_that_end_a_text(checkpoint, changes, ends):
    assert settled(checkpoint, **changes)[1] == ends


def test_what_is_passed_over_is_said(checkpoint, caplog):
    assert settled(checkpoint, {"bos_token_id": 0, "eos_token_id": 1}, adds=True) == (BEGIN, (END,))
    assert "bos_token_id 0 of config.json is not the tokenizer's: texts begin with token 1" in caplog.text
    assert "eos_token_id 1 of config.json is not the tokenizer's: texts end with 2" in caplog.text


def test_without_a_tokenizer_the_configurations_count(checkpoint):
    edit_config(checkpoint, bos_token_id=0)
    edit(checkpoint / GENERATION_FILE, eos_token_id=[WORD, END])
    found = with_text_tokens(read_architecture(checkpoint)[1], checkpoint, None)
    assert (found.bos_token_id, found.eos_token_id) == (0, (WORD, END))


@pytest.mark.parametrize("value", ["</s>", [2, "a"], [], {}, 2.5, True, 2**40])
def test_end_tokens_that_are_none(checkpoint, value):
    edit(checkpoint / GENERATION_FILE, eos_token_id=value)
    refused(f"{GENERATION_FILE}: eos_token_id", fqjax.load_hf, checkpoint)


@pytest.mark.parametrize("content", ["", "[]", '{"eos_token_id": 1, "eos_token_id": 2}'])
def test_a_generation_configuration_that_is_none(checkpoint, content):
    (checkpoint / GENERATION_FILE).write_text(content)
    refused(f"{GENERATION_FILE}: not a JSON configuration", fqjax.load_hf, checkpoint)


def test_end_tokens_are_kept_by_convert_and_export(checkpoint, tmp_path, text):
    edit(checkpoint / GENERATION_FILE, eos_token_id=[END, WORD])
    assert fqjax.load_hf(checkpoint)[0].config.eos_token_id == (END, WORD)
    own, exported = tmp_path / "own", tmp_path / "exported"
    options = ["--scheme", "w8a8", "--calibration", str(text), "--samples", "2", "--window", "32"]
    assert cli.main(["convert", str(checkpoint), str(own), *options]) == 0
    assert Source(str(own)).config.eos_token_id == (END, WORD)
    assert cli.main(["export", str(own), str(exported)]) == 0
    assert json.loads((exported / GENERATION_FILE).read_text()) == {"bos_token_id": BEGIN, "eos_token_id": [END, WORD]}
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == [END, WORD]


def test_a_model_without_bos_has_windows_of_text_alone(checkpoint):
    edit_config(checkpoint, bos_token_id=None)
    edit(checkpoint / "tokenizer_config.json", bos_token=None)
    model, tokenizer = fqjax.load_hf(checkpoint)
    assert model.config.bos_token_id is None
    ids = np.arange(10, 31)
    (batch,) = calibration_batches(ids, model.config, samples=2, window=10)
    assert batch.tolist() == [list(range(10, 20)), list(range(20, 30))]
    assert cut_windows(ids, 10, None, 1).shape == (1, 10)
    alike = np.r_[10:20, 10, 21:30]  # Both windows begin with the same token, as if it were BOS.
    expected = perplexity(model, np.r_[11:20, 21:30], 10, bos_token_id=10)
    assert perplexity(model, alike, 10) == pytest.approx(expected, rel=1e-6)
    assert encode_prompt(tokenizer, model.config, "the list") == tokenizer("the list").input_ids


def test_an_end_token_that_is_text_is_shown(checkpoint):
    """Chat models may end at a plain token, of which transformers shows the text; the tokenizer's own end is none."""
    edit(checkpoint / GENERATION_FILE, eos_token_id=[END, WORD])
    config = with_text_tokens(read_architecture(checkpoint)[1], checkpoint, tokenizer := load_tokenizer(checkpoint))
    word = tokenizer.decode([WORD])
    assert decode_new(tokenizer, config, [BEGIN, 400], np.array([WORD, 401])) == word
    assert decode_new(tokenizer, config, [BEGIN, 400], np.array([END, 401])) == ""


def test_a_prompt_longer_than_the_model_is_refused_before_it_runs(checkpoint):
    config, tokenizer = read_architecture(checkpoint)[1], load_tokenizer(checkpoint)
    assert len(encode_prompt(tokenizer, config, "value " * 50)) <= 128
    refused("prompt: .* tokens; expected 128 at most", encode_prompt, tokenizer, config, "the value " * 100)
    refused("prompt: 10000000 characters; expected less", encode_prompt, tokenizer, config, "a" * 10**7)
    refused("prompt: empty", encode_prompt, tokenizer, type("None_", (), {"bos_token_id": None}), "")
