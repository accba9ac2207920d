"""The bundled checkpoint and the demonstration."""

import io
import sys
from pathlib import Path

import httpx2 as httpx
import jax
import pytest
from flax import nnx
from rich.console import Console

import fqjax
from fqjax.data.python_docs import held_out_text, training_text
from fqjax.demo.run import CHECKPOINT, NAME_WIDTH, PROMPT, ROWS, SAVED, how_to_go_on, run_demo
from fqjax.presets import PRESETS
from fqjax.runtime.errors import InputError
from tests.server.serving import command


def test_the_bundled_checkpoint_is_small_and_loads():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 6_000_000
    model, tokenizer = fqjax.load_hf(CHECKPOINT)
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert 2e6 <= size <= 3e6
    ids = tokenizer("Return the list.", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "Return the list."


def test_the_held_out_part_is_held_out():
    train, held_out = training_text(), held_out_text()
    assert len(train) > 1_000_000 and len(held_out) > 30_000
    assert not set(train.split("\n\n")) & set(held_out.split("\n\n"))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(width=80, file=io.StringIO())
    run_demo(out, console)
    return out, console.file.getvalue()


def rows(text):
    """Perplexity, ratio, INT4 share and K'/K of every row, by its name."""
    lines = [line for line in text.splitlines() if line[:NAME_WIDTH].strip() in ROWS and line[0] != " "]
    lines = [line for line in lines if line[-1:].isdigit()]
    return {
        line[:NAME_WIDTH].strip(): [float(cell.rstrip("%")) for cell in line[NAME_WIDTH:].split()[:4]] for line in lines
    }


def test_every_row_can_be_made():
    for row in ROWS.values():
        PRESETS[row.scheme].override(row.settings)
    assert SAVED in ROWS and all(len(name) < NAME_WIDTH for name in ROWS)


@pytest.mark.thorough
def test_the_demo_shows_what_it_says(shown):
    table = rows(shown[1])
    assert list(table) == list(ROWS)
    ratio = {name: cells[1] for name, cells in table.items()}
    assert ratio["bf16"] == 1 and ratio["w8a8"] > 1.1
    assert ratio["w8a8"] > ratio["smoothquant"] > ratio["smoothquant+equalize"]  # "do the most"
    for flattened, uncut in (("flattenquant-w8a8", "smoothquant+equalize"), ("flattenquant", "flattenquant, uncut")):
        assert abs(ratio[flattened] - ratio[uncut]) < 0.005  # "can't be told from chance"
    assert ratio["flattenquant-w8a8"] <= 1.01 and ratio["flattenquant"] <= 1.05 and ratio["w4a8-awq"] <= 1.05
    assert table["flattenquant"][2] >= 48.29 and table["flattenquant, uncut"][3] == 1 < table["flattenquant"][3]


@pytest.mark.thorough
def test_the_demo_fits_a_terminal_and_writes_text(shown):
    assert all(len(line) <= 80 for line in shown[1].splitlines() if str(shown[0]) not in line)
    assert "bf16 writes: Return a list of the" in shown[1] and "flattenquant writes: " in shown[1]
    assert "With a model of your own" in shown[1]


def test_rows_are_shown_as_they_are_ready_without_a_terminal(tmp_path, monkeypatch):
    seen = []

    def quantize(model, scheme, batches):
        seen.append(console.file.getvalue())
        if len(seen) == 3:
            raise InputError("that is enough")
        return model, fqjax.report_of(model)

    monkeypatch.setattr("fqjax.demo.run.quantize", quantize)
    monkeypatch.setattr("fqjax.demo.run.perplexity", lambda *a, **k: 10.0)
    console = Console(width=80, file=io.StringIO())
    with pytest.raises(InputError, match="enough"):
        run_demo(tmp_path / "out", console)
    assert not console.is_terminal
    assert [list(rows(text)) for text in seen] == [[], ["bf16"], ["bf16", "w8a8"]]


@pytest.mark.thorough
def test_the_demo_leaves_a_checkpoint_behind(shown):
    model = fqjax.load(shown[0])
    assert fqjax.report_of(model).scheme == "flattenquant" and fqjax.load_tokenizer(shown[0]) is not None


@pytest.mark.thorough
def test_what_the_demo_has_made_can_be_served(shown):
    assert f" serve {shown[0]}\n" in shown[1]
    with command(shown[0], "--slots", "2", "--capacity", "64") as running:
        body = {"prompt": PROMPT, "max_tokens": 4}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize("lacking", [True, False])
def test_how_to_go_on_is_said_as_it_works_from_here(monkeypatch, tmp_path, lacking):
    monkeypatch.setattr("fqjax.demo.run.lacking_packages", lambda: ["uvicorn"] if lacking else [])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [".venv/bin/fqjax", "demo"])
    assert "\n  .venv/bin/fqjax serve 'my demo'\n" in how_to_go_on(Path("my demo"))
    program = tmp_path / "fqjax"
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    text = how_to_go_on(Path("out"))
    assert "\n  fqjax serve out\n" in text and all(
        len(line) <= 80 for line in text.splitlines() if "-m pip" not in line
    )
    assert ("-m pip install 'fqjax[serve]'\n" in text) == lacking
