"""Tokenizers at which the tokenizers package panics, and one that needs a package that is not there: one line each."""

import importlib.util
import json
import os

import numpy as np
import pytest

from fqjax.checkpoint import tokenizer as tokenizers
from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.text_tokens import with_text_tokens
from fqjax.checkpoint.tokenizer import load_tokenizer
from fqjax.cli import main as cli
from fqjax.data.text import decode_new, encode
from fqjax.runtime.panics import Panicked, panics_as_errors
from tests.conftest import refused
from tests.models import variants


class PanicException(BaseException):
    """As pyo3 has it."""


def panic(*args, **settings):
    os.write(2, b"thread '<unnamed>' panicked at src/lib.rs:1:2\n")
    raise PanicException("index out of bounds:\n the len is 1")


def broken(directory, sequence="B", token=None):
    """A tokenizer whose template names a second text that there is not, or a token that there is not."""
    path = directory / "tokenizer.json"
    single = [{"Sequence": {"id": sequence, "type_id": 0}}]
    single += [] if token is None else [{"SpecialToken": {"id": token, "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))


def test_a_panic_is_an_error_and_its_print_is_dropped(capfd):
    with pytest.raises(Panicked, match="index out of bounds: the len is 1"), panics_as_errors():
        panic()
    assert capfd.readouterr().err == ""


def test_what_else_is_printed_or_raised_is_passed_on(capfd):
    with panics_as_errors():
        os.write(2, b"a warning\n")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        os.write(2, b"stopped\n")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="plain"), panics_as_errors():
        raise ValueError("plain")
    assert capfd.readouterr().err == "a warning\nstopped\n"


@pytest.mark.parametrize("of", [{"sequence": "B"}, {"sequence": "A", "token": "<none>"}])
def test_a_template_that_makes_encoding_panic(checkpoint, text, capfd, of):
    broken(checkpoint, **of)
    for command in (
        ["generate", str(checkpoint), "--prompt", "the list", "--max-new-tokens", "2"],
        ["eval", str(checkpoint), "--text", str(text)],
        ["convert", str(checkpoint), str(checkpoint.parent / "out"), "--calibration", str(text), "--dry-run"],
    ):
        assert cli.main(command) == 2
        printed = capfd.readouterr()
        assert printed.err.startswith("fqjax: error: ") and printed.err.count("\n") == 1
        assert "the tokenizer cannot encode" in printed.err and not printed.out


def test_a_panic_wherever_the_tokenizer_is_called(checkpoint, monkeypatch, capfd):
    tokenizer, config = load_tokenizer(checkpoint), read_architecture(checkpoint)[1]
    assert tokenizer is not None
    monkeypatch.setattr(type(tokenizer), "decode", panic)
    refused("cannot decode", decode_new, tokenizer, config, [1], np.array([2]))
    monkeypatch.setattr(type(tokenizer), "__call__", panic)
    refused("cannot encode the text \\(index out of bounds: the len is 1\\)", encode, tokenizer, "text")
    refused("cannot encode a text with its special tokens", with_text_tokens, config, checkpoint, tokenizer)
    monkeypatch.setattr(type(tokenizer), "get_vocab", panic)
    refused("here: its tokenizer has no vocabulary", tokenizers.check_vocabulary, tokenizer, 64, "here")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    refused("its tokenizer cannot be loaded \\(index", load_tokenizer, checkpoint)
    assert capfd.readouterr().err == ""


def test_a_tokenizer_of_sentencepiece_names_what_it_needs(tmp_path, monkeypatch):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["llama"])
    (directory / "tokenizer.model").write_bytes(b"\x0a")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else there(name))
    refused("tokenizer.model: needs sentencepiece to be read; pip install sentencepiece", load_tokenizer, directory)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["a directory", "a link that leads nowhere"])
def test_what_is_no_file_beside_a_tokenizer_is_named(checkpoint, name, kind):
    path = checkpoint / name
    path.unlink(missing_ok=True)
    path.mkdir() if kind == "a directory" else path.symlink_to("nowhere")
    refused(f"{name}: no file; expected a file of the tokenizer", load_tokenizer, checkpoint)
