"""Checkpoints as people have them, rebuilt from public reports, where the scripts that make them are at hand.

Each is held to the perplexity that transformers gives it in float32.
"""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

import fqjax
from fqjax.checkpoint.source import Source
from fqjax.cli import main as cli
from fqjax.data.text import decode_new, encode, encode_prompt, read_text

pytestmark = pytest.mark.thorough

WINDOWS = 4


@pytest.fixture(scope="module")
def make(shared, tmp_path_factory):
    """Makes a case's input in a temporary folder that lies as its script expects."""
    folder = tmp_path_factory.mktemp("shared")
    for name in ("models", "text"):
        (folder / name).symlink_to(shared / name)

    def made(name):
        if not (shared / "cases" / name).is_dir():
            pytest.skip(f"no case {name} beside the real checkpoints")
        case = folder / "cases" / name
        if not case.exists():
            shutil.copytree(shared / "cases" / name, case)
            case.chmod(0o755)
            subprocess.run([sys.executable, "make.py"], cwd=case, check=True, capture_output=True, timeout=120)
        return case / "input"

    return made


def perplexity(shared, model, tokenizer, window):
    ids = encode(tokenizer, read_text(shared / "text" / "novels-eval.txt"))
    return fqjax.perplexity(model, ids, window, windows=WINDOWS)


@pytest.mark.parametrize(
    ("name", "window", "expected"),
    [
        ("architectures-absent", 64, 32.68),
        ("bos-of-the-tokenizer", 64, 32.68),
        ("index-and-single-file", 64, 32.68),
        ("linked-shards", 64, 32.68),
        ("mixtral-of-llm-compressor", 64, 12646),
        ("names-without-prefix", 64, 32.68),
        ("original-length-at-top-level", 128, 87.03),
        ("pad-token-beyond-vocabulary", 64, 32.68),
        ("tied-but-another-head", 64, 38.85),
    ],
)
def test_perplexity_is_that_of_transformers(shared, make, name, window, expected):
    model, tokenizer = fqjax.load_hf(make(name), jnp.float32)
    assert perplexity(shared, model, tokenizer, window) == pytest.approx(expected, rel=0.002)


def test_a_float_head_that_is_not_listed_is_read(shared, make):
    """The expected value is that of the codes in float; the model's activations are in INT8 besides."""
    model, tokenizer = fqjax.load_hf(make("head-in-float-not-ignored"))
    assert perplexity(shared, model, tokenizer, 64) == pytest.approx(32.51, rel=0.015)


def test_a_text_ends_where_a_chat_model_ends_its_turn(make, tmp_path, capsys):
    source, text = make("several-end-tokens"), "Once upon a time, there was a little girl named Lily."
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--scheme", "bf16"]) == 0
    for model in (source, tmp_path / "out"):
        capsys.readouterr()
        assert cli.main(["generate", str(model), "--prompt", "Once upon a time", "--max-new-tokens", "40"]) == 0
        assert capsys.readouterr().out == f"{text}\n"


def test_a_text_begins_with_the_tokenizers_token(make):
    opened = Source(str(make("bos-of-the-tokenizer")))
    tokenizer = opened.tokenizer()
    model = opened.model()
    tokens = encode_prompt(tokenizer, model.config, "Once upon a time")
    new = fqjax.generate(model, tokens, 16)
    assert decode_new(tokenizer, model.config, tokens, new) == ", there was a little girl named Lily. She loved to play"


def test_a_name_beyond_the_vocabulary_is_refused_where_it_is_used(make, capsys):
    assert cli.main(["generate", str(make("pad-token-beyond-vocabulary")), "--prompt", "a [PAD] b"]) == 2
    assert "512" in capsys.readouterr().err


def test_a_model_without_bos_is_converted_and_evaluated(shared, make, tmp_path):
    source, out, texts = make("no-bos-token"), tmp_path / "out", shared / "text"
    options = ["--calibration", str(texts / "novels-calibration.txt"), "--samples", "4", "--window", "64"]
    assert cli.main(["convert", str(source), str(out), "--scheme", "w8a8", *options]) == 0
    models = [fqjax.load_hf(source)[0], fqjax.load(out)]
    values = [perplexity(shared, model, fqjax.load_tokenizer(source), 64) for model in models]
    assert values[1] == pytest.approx(values[0], rel=0.01)


def test_what_is_exported_is_read(shared, make, tmp_path):
    source, own, exported = make("export-cannot-be-read"), tmp_path / "own", tmp_path / "exported"
    options = ["--calibration", str(shared / "text" / "novels-calibration.txt"), "--samples", "4", "--window", "64"]
    assert cli.main(["convert", str(source), str(own), "--scheme", "w4a16", *options]) == 0
    assert cli.main(["export", str(own), str(exported)]) == 0
    (read, tokenizer), kept = fqjax.load_hf(exported), fqjax.load(own)
    assert perplexity(shared, read, tokenizer, 64) == perplexity(shared, kept, tokenizer, 64)


def test_sentencepiece_alone_is_read_or_asked_for(make, capsys):
    pytest.importorskip("sentencepiece", reason="the package that reads tokenizer.model is not installed")
    prompt = ["--prompt", "Once upon a time", "--max-new-tokens", "8"]
    assert cli.main(["generate", str(make("sentencepiece-only")), *prompt]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")
