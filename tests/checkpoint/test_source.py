"""What the commands refuse before they read a weight, and files of theirs that were damaged."""

import shutil

import numpy as np
import pytest

import fqjax
from fqjax.checkpoint.calibration_record import CalibrationRecord, read_calibration_record
from fqjax.cli import main as cli
from fqjax.convert import run as conversion
from fqjax.data.text import encode
from fqjax.demo.run import CHECKPOINT
from fqjax.drivers.store import DirectoryStore
from fqjax.presets import PRESETS
from fqjax.runtime.errors import InputError
from tests.models import variants


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory):
    """A model of 64 tokens with a tokenizer of 2048: as Hugging Face has it, and as fqjax does; and a text."""
    folder = tmp_path_factory.mktemp("mismatched")
    variants.write_checkpoint(folder / "source", variants.VARIANTS["llama"])
    model, _ = fqjax.load_hf(folder / "source")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / file, folder / "source" / file)
    fqjax.save(folder / "own", model, tokenizer=fqjax.load_tokenizer(folder / "source"))
    (folder / "text.txt").write_text("return the list of values " * 300)
    return folder


@pytest.mark.parametrize("model", ["source", "own"])
@pytest.mark.parametrize("command", ["convert", "eval", "generate"])
def test_a_tokenizer_that_does_not_fit_is_refused_before_weights_are_read(
    mismatched, monkeypatch, capsys, command, model
):
    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr("fqjax.checkpoint.safetensors.TensorFiles.read", read)
    monkeypatch.setattr("fqjax.checkpoint.orbax.read.ocp.load", read)
    text = str(mismatched / "text.txt")
    rest = {
        "convert": [str(mismatched / "out"), "--calibration", text],
        "eval": ["--text", text],
        "generate": ["--prompt", "return"],
    }
    code, err = cli.main([command, str(mismatched / model), *rest[command]]), capsys.readouterr().err
    expected = "has token 2047 ("
    if (command, model) == ("convert", "own"):
        expected = "already an fqjax checkpoint"
    assert code == 2 and expected in err and err.count("\n") == 1
    assert not list(mismatched.glob("out*"))


def test_a_text_that_the_tokenizer_cannot_encode():
    def tokenizer(text, **_):
        raise Exception("WordLevel error: Missing [UNK] token from the vocabulary")

    with pytest.raises(InputError, match="cannot encode the text .WordLevel error: Missing"):
        encode(tokenizer, "text")


DAMAGES = {
    "cut": lambda content: content[:-30],
    "empty": lambda _: b"",
    "other": lambda _: b"PK nothing",
    "structure": lambda content: content.replace(b"fields", b"fielda"),
    "kind": lambda content: content.replace(b"Statistics", b"Statistica"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_a_conversion_remembers_may_be_damaged(tmp_path, damage):
    store = DirectoryStore(tmp_path)
    statistics = fqjax.drivers.statistics.Statistics(np.ones(4, np.float32), np.ones((2, 4), np.float32), 2, 2)
    store["statistics", "layers.0"] = statistics
    path = tmp_path / "statistics.layers.0.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        InputError, match=rf"layers.0.safetensors: damaged \(.*remove {tmp_path}, and begin anew"
    ) as caught:
        store["statistics", "layers.0"]
    assert "\n" not in str(caught.value)


def test_the_record_of_a_conversion_may_be_damaged(checkpoint, tmp_path):
    asked = conversion.Conversion(source=str(checkpoint), out=tmp_path / "out", scheme=PRESETS["bf16"])
    staging = conversion.staging_directory(asked.out)
    staging.mkdir()
    (staging / "plan.json").write_text("{")
    with pytest.raises(InputError, match="plan.json: not a JSON record of a conversion"):
        conversion.convert(conversion.plan(asked), resume=True)
    assert not asked.out.exists()


@pytest.mark.parametrize(
    ("activations", "costs", "part"),
    [
        ({"b": np.ones(4)}, {}, "'b' is not the activations"),
        ({"a": np.ones(5)}, {}, "'a' is not the activations"),
        ({}, {"b": {8: 1.0}}, "the costs of 'b'"),
        ({}, {"a": {4: 1.0}}, "the costs of 'a'"),
        ({}, {"a": {8: None}}, "cannot be read"),
        ({}, {"a": 3}, "cannot be read"),
        ({}, ["a"], "cannot be read"),
    ],
)
def test_findings_about_something_else(tmp_path, activations, costs, part):
    CalibrationRecord({"a": np.ones(4, np.float32)} | activations, costs).write(tmp_path)
    with pytest.raises(InputError, match=f"calibration.safetensors: .*{part}"):
        read_calibration_record(tmp_path, {"a": (4, 8)})
