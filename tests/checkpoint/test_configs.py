"""Configurations and tokenizers that are wrong: one line that names the entry, before anything large is made."""

import json
import time

import pytest

from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.checkpoint.tokenizer import check_vocabulary, load_tokenizer
from fqjax.runtime.errors import InputError
from tests.models import variants

HUGE = 10**15
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ABSENT = object()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return variants.write_checkpoint(tmp_path_factory.mktemp("llama"), variants.VARIANTS["llama"])


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return variants.write_checkpoint(tmp_path_factory.mktemp("opt"), variants.VARIANTS["opt"])


def refused(directory, capsys, *parts, **changes):
    config = variants.VARIANTS[directory.name.rstrip("0123456789")] | changes
    content = {key: value for key, value in config.items() if value is not ABSENT}
    (directory / "config.json").write_text(json.dumps(content))
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        load_hf(directory)
    assert time.process_time() - start < 20
    message = str(caught.value)
    assert "\n" not in message and "config.json" in message
    assert all(part in message for part in parts), message
    assert not capsys.readouterr().err


@pytest.mark.parametrize("value", ["48", -1, 0, 48.0, [48], {}, True, HUGE, 10**400, float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_a_size_that_is_none(llama, capsys, name, value):
    refused(llama, capsys, f"{name} ", "expected", **{name: value})


@pytest.mark.parametrize("name", ["vocab_size", "ffn_dim", "word_embed_proj_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", ["64", 0, HUGE])
def test_a_size_of_another_family_that_is_none(opt, capsys, name, value):
    refused(opt, capsys, f"{name} ", "expected", **{name: value})


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_size_that_is_missing(llama, capsys, name):
    refused(llama, capsys, f"no entry '{name}'; expected a whole number above 0", **{name: ABSENT})


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", ["1e-5", 0.0, -1.0, float("nan"), float("inf"), [1e-5], 10**400])
def test_a_constant_that_is_none(llama, capsys, name, value):
    refused(llama, capsys, name, "expected", **{name: value})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings 'false'", "true or false"]),
        ({"attention_bias": 1}, ["attention_bias 1", "true or false"]),
        ({"bos_token_id": "<s>"}, ["bos_token_id '<s>'"]),
        ({"bos_token_id": 2**40}, ["bos_token_id 1099511627776"]),
        ({"eos_token_id": [2, "a"]}, ["eos_token_id"]),
        ({"eos_token_id": 2**40}, ["eos_token_id"]),
        ({"num_labels": HUGE}, ["num_labels", "10000 at most"]),
        ({"text_config": {"num_hidden_layers": HUGE}}, ["num_hidden_layers", "10000 at most"]),
        ({"num_hidden_layers": 9999}, ["num_hidden_layers 9999: expected fewer, as the checkpoint has 21 arrays"]),
        ({"vocab_size": 2**24}, ["embed_tokens.weight", "config.json implies (16777216, 48)"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["is not supported"]),
        ({"architectures": {"a": 1}}, ["is not supported"]),
        ({"architectures": "MambaForCausalLM"}, ["MambaForCausalLM is not supported"]),
        ({"model_type": "opt"}, ["LlamaForCausalLM"]),
        ({"model_type": "nothing"}, ["nothing"]),
        ({"model_type": ["llama"]}, ["config.json"]),
        ({"model_type": ABSENT}, ["model_type"]),
        ({"model_type": "nothing", "auto_map": {"AutoConfig": "evil.Config"}}, ["nothing"]),
        ({"rope_scaling": 3}, ["rope"]),
        ({"rope_parameters": [1]}, ["rope"]),
    ],
)
def test_an_entry_that_is_wrong(llama, capsys, changes, parts):
    refused(llama, capsys, *parts, **changes)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not a JSON configuration"),
        (b"[]", "expected an object, got list"),
        (b"3", "expected an object, got int"),
        (b"\xff{}", "utf-8"),
        (b"[" * 100_000, "too deeply"),
        (b'{"a": 1, "a": 2}', "entry 'a' is there twice"),
        (b'{"vocab_size": %s}' % (b"9" * 5000), "not a JSON configuration"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, part):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json: ") as caught:
        read_architecture(tmp_path)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_too_large_to_be_a_configuration(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="larger than 256 MiB"):
        read_architecture(tmp_path)


def test_a_directory_or_a_link_in_place_of_a_configuration(tmp_path):
    (tmp_path / "model" / "config.json").mkdir(parents=True)
    with pytest.raises(InputError, match="config.json: a directory; expected a file"):
        read_architecture(tmp_path / "model")
    (tmp_path / "model" / "config.json").rmdir()
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "model" / "config.json").symlink_to("../others.json")
    with pytest.raises(InputError, match="config.json: a link to ../others.json, which is not there"):
        read_architecture(tmp_path / "model")


def test_a_token_beyond_the_embedding(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    check_vocabulary(tokenizer, 2048, "here")
    with pytest.raises(InputError, match=r"here: its tokenizer has token 2047 \('.*'\), beyond .* vocabulary of 2047"):
        check_vocabulary(tokenizer, 2047, "here")
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == 2048
    check_vocabulary(tokenizer, 2048, "here")  # No text is encoded to it.
    with pytest.raises(InputError, match="beyond the model's vocabulary of 2047"):
        check_vocabulary(tokenizer, 2047, "here")
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(InputError, match="token 2049 \\('<extra>'\\), beyond the model's vocabulary of 2048"):
        check_vocabulary(tokenizer, 2048, "here")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a", "b"]]}}'),
        ("tokenizer_config.json", b"["),
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}',
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(checkpoint, capsys, file, content):
    (checkpoint / file).write_bytes(content)
    with pytest.raises(InputError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(checkpoint)
    assert "\n" not in str(caught.value) and not capsys.readouterr().err


def test_a_link_in_place_of_a_tokenizer(checkpoint, tmp_path):
    """It is followed in a directory of another program's, and not in a checkpoint of fqjax."""
    (checkpoint / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (checkpoint / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert load_tokenizer(checkpoint) is not None
    (tmp_path / "own").mkdir()
    checkpoint.rename(tmp_path / "own" / "tokenizer")
    with pytest.raises(InputError, match="tokenizer.json: a link to .* outside its directory"):
        load_tokenizer(tmp_path / "own")
