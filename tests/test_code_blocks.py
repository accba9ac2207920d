"""The code blocks of README and of the documentation run as they stand there."""

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import fqjax
from fqjax import registry
from fqjax.cli.main import main
from tests.conftest import make_checkpoint
from tests.documented_package import FILE, install, make_phi3
from tests.tiers import thorough_but

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
"""Those with code; what scripts write about benchmarks has none."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)

NOT_RUN = {
    ("README", "pip install"): "installs packages",
    ("README", "import openai"): "needs a server; tests/server has one",
    ("getting_started", "make demo"): "installs packages; tests/test_demo.py runs the demo",
    ("getting_started", "pip install"): "installs packages",
    ("adding_a_model", "# fqjax/"): "is a part of that file, as the test below sees to",
    ("serving", "pip install"): "installs packages, and serves; tests/server does",
    ("serving", "import openai"): "needs a server; tests/server has one",
    ("testing", ".venv/bin/python"): "runs tests",
}
"""Blocks, by page and how they begin, that are not run here, each with the reason."""

NOT_RUN_COMMANDS = {
    "fqjax serve": "runs until it is stopped; tests/server runs it",
    "fqjax bench": "takes minutes, or a GPU; tests/bench runs it",
    "fqjax convert org/model-quantized": "needs the network",
}

FAST_PAGES = ("kernels",)
PACKAGES = {"adding_a_model": "phi3", "extending": "powers"}
"""Pages that show a package, which is installed before their other blocks run."""


def blocks():
    """Python code and commands: page -> [(kind, text)], in their order."""
    found = defaultdict(list)
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text()):
            commands = language in ("", "sh") and re.match(r"(fqjax|make|pip|\.venv\S*) ", text)
            if (language == "python" or commands) and not FILE.match(f"```python\n{text}```"):
                found[page.stem].append(("python" if language == "python" else "commands", text))
    return {page: [(kind, text) for kind, text in some if not reason(page, text)] for page, some in found.items()}


def reason(page, text):
    """Why a block is not run, if it is not."""
    return next((why for (where, start), why in NOT_RUN.items() if where == page and text.startswith(start)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the files that the pages speak of."""
    directory = tmp_path_factory.mktemp("reader")
    for name in ("path/or/hub-id", "path/to/llama", "path/to/model"):
        make_checkpoint(directory / name, "llama-grouped")
    make_phi3(directory / "path/to/phi3")
    words = np.random.default_rng(0).choice(["return", "class", "the", "list", "of", "value", "error"], 1500)
    for name in ("text.txt", "test.txt"):
        (directory / name).write_text(" ".join(words))
    model, tokenizer = fqjax.load_hf(directory / "path/to/llama")
    batches = [np.random.default_rng(0).integers(3, 64, (2, 32)).astype(np.int32)]
    quantized, _ = fqjax.quantize(model, "w8a8", batches)
    fqjax.save(directory / "out", quantized, tokenizer=tokenizer)
    return directory


@pytest.fixture
def installed(page, tmp_path, monkeypatch):
    """The package that a page shows, until the test ends."""
    if page in PACKAGES:
        before = set(sys.modules)
        monkeypatch.syspath_prepend(str(install(page, PACKAGES[page], tmp_path / "site-packages")))
        names = {group: dict(some) for group, some in registry._registered.items()}
        monkeypatch.setattr(registry, "_registered", names)
        monkeypatch.setattr(registry, "_broken", {})
        yield
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").is_relative_to(tmp_path):
                del sys.modules[name]
    else:
        yield


def run_python(text, names):
    if "to_qwix" in text and importlib.util.find_spec("qwix") is None:
        return  # It is no dependency; tests/interop has more of it.
    exec(compile(text, "<documentation>", "exec"), names)


def run_commands(text, capsys):
    for line in text.splitlines():
        if any(line.startswith(start) for start in NOT_RUN_COMMANDS):
            continue
        name, *arguments = shlex.split(line, comments=True)
        assert name == "fqjax", line
        if "--plot" in arguments:
            pytest.importorskip("matplotlib")
        assert main(arguments) == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize("page", thorough_but(FAST_PAGES, (page for page, some in blocks().items() if some)))
def test_a_page_s_code_runs(page, place, installed, tmp_path, monkeypatch, capsys):
    for name in ("path", "text.txt", "test.txt"):
        (tmp_path / name).symlink_to(place / name)
    kinds = [kind for kind, _ in blocks()[page]]
    if "commands" not in kinds and page != "own_models":
        (tmp_path / "out").symlink_to(place / "out")  # What an earlier page has written.
    monkeypatch.chdir(tmp_path)
    names = {}
    for kind, text in blocks()[page]:
        if kind == "commands":
            run_commands(text, capsys)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                run_python(text, names)


def test_parts_of_files_are_in_them():
    page = (ROOT / "docs" / "adding_a_model.md").read_text()
    parts = re.findall(r"^```python\n# (fqjax/\S+)\n(.*?)^```", page, re.S | re.M)
    assert [name for name, text in parts if text not in (ROOT / name).read_text()] == [] != parts


def test_every_reason_belongs_to_a_block():
    pages = {page.stem: page.read_text() for page in PAGES}
    for page, start in NOT_RUN:
        assert any(text.startswith(start) for _, text in BLOCK.findall(pages[page])), (page, start)
    for command in NOT_RUN_COMMANDS:
        assert any(command in text for text in pages.values()), command
