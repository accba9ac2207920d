"""The bundled checkpoint and the demonstration."""

import io

import jax
import pytest
from flax import nnx
from rich.console import Console

import fqjax
from fqjax.data.python_docs import held_out_text, training_text
from fqjax.demo.run import CHECKPOINT, ROWS, run_demo


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
    cells = [line.split() for line in text.splitlines()]
    return {line[0]: line[1:] for line in cells if len(line) > 6 and line[0] in ROWS and line[1][0].isdigit()}


@pytest.mark.thorough
def test_the_demo_shows_what_it_says(shown):
    table = {name: [float(cell.rstrip("%")) for cell in cells[:4]] for name, cells in rows(shown[1]).items()}
    assert set(table) == set(ROWS)
    ratio = {name: cells[1] for name, cells in table.items()}
    assert ratio["bf16"] == 1 and ratio["w8a8"] > 1.1
    assert ratio["flattenquant-w8a8"] <= 1.01 and ratio["flattenquant"] <= 1.05
    assert table["flattenquant"][2] >= 48.29


@pytest.mark.thorough
def test_the_demo_fits_a_terminal_and_writes_text(shown):
    assert all(len(line) <= 80 for line in shown[1].splitlines() if str(shown[0]) not in line)
    assert "bf16 writes: Return a list of the" in shown[1] and "flattenquant writes: " in shown[1]


@pytest.mark.thorough
def test_the_demo_leaves_a_checkpoint_behind(shown):
    model = fqjax.load(shown[0])
    assert fqjax.report_of(model).scheme == "flattenquant" and fqjax.load_tokenizer(shown[0]) is not None
