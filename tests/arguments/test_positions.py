"""Every way into a model with rotary positions refuses more tokens than it has positions, before it runs."""

import dataclasses

import numpy as np
import pytest

import fqjax
from fqjax.cli.main import main
from fqjax.data.text import encode_prompt
from fqjax.inference.engine import Engine
from fqjax.inference.requests import Request
from fqjax.server.run import Limits, api_of
from tests.arguments.values import refused
from tests.conftest import make_checkpoint

LONG = np.full((1, 65), 5)

CALLS = {
    "generate": lambda llama: fqjax.generate(llama, [5] * 60, 5),
    "stream": lambda llama: fqjax.stream(llama, [5] * 60, 5),
    "Engine": lambda llama: Engine(llama, slots=1, capacity=80).submit(Request(prompt=[5] * 60, max_new_tokens=5)),
    "server": lambda llama: api_of(llama, None, "name", Limits(slots=1, capacity=65)),
    "perplexity": lambda llama: fqjax.perplexity(llama, [5] * 200, 65),
    "calibration_batches": lambda llama: fqjax.calibration_batches([5] * 200, llama.config, samples=1, window=65),
    "quantize": lambda llama: fqjax.quantize(llama, "w8a8", [LONG]),
    "calibrate": lambda llama: fqjax.calibrate(llama, [LONG], ["layers.0.mlp.down_proj"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions(llama, name):
    refused("positions", CALLS[name], llama)


def test_serve_refuses_the_request_alone(llama):
    requests = [Request(prompt=[5] * 60, max_new_tokens=5), Request(prompt=[5], max_new_tokens=1)]
    first, second = fqjax.serve(llama, requests, slots=1, capacity=80)
    assert first.reason == "refused" and "64 positions" in first.error and second.reason == "length"


COMMANDS = {
    "generate": "generate M --prompt a --max-new-tokens 200",
    "generate a long prompt": "generate M --prompt LONG --max-new-tokens 1",
    "eval": "eval M --text F --window 129",
    "eval over an INT8 cache": "eval M --text F --window 129 --kv-cache int8",
    "convert": "convert M OUT --scheme w8a8 --calibration F --window 129",
    "a dry run": "convert M OUT --scheme w8a8 --calibration F --window 129 --dry-run",
    "serve": "serve M --port 0 --slots 1 --capacity 129",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("positions")
    text = "return the list of values that the class holds " * 100
    (folder / "text").write_text(text)
    files = {"M": make_checkpoint(folder / "model"), "OUT": folder / "out", "F": folder / "text"}
    return {name: str(path) for name, path in files.items()} | {"LONG": text[:1500]}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(words, capsys, name):
    if name == "serve":
        pytest.importorskip("uvicorn")
    assert main([words.get(word, word) for word in COMMANDS[name].split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "128" in shown.err and "positions" in shown.err, shown.err


def test_a_stretched_model_has_the_positions_that_its_scaling_gives(llama):
    scaling = {"rope_type": "linear", "factor": 2.0}
    stretched = dataclasses.replace(llama.config, rope_scaling=tuple(sorted(scaling.items())))

    class Letters:
        def __call__(self, text, **settings):
            return type("Encoding", (), {"input_ids": [5] * len(text)})

    assert len(encode_prompt(Letters(), stretched, "a" * 127)) == 128 == stretched.max_length
    refused("129 tokens; expected 128 at most", encode_prompt, Letters(), stretched, "a" * 128)
    refused("65 tokens; expected 64 at most", encode_prompt, Letters(), llama.config, "a" * 64)
