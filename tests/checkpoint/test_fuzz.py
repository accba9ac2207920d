"""Checkpoints with bytes and JSON values changed at random: the command says in one line what is wrong, or works.

Never a traceback, never a second line, never a file that was not asked for, and nothing that looks like a result and is none.
"""

import contextlib
import io
import json
import math
import shutil
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fqjax
from fqjax.checkpoint.safetensors import INDEX_FILE
from fqjax.cli import main as cli
from tests.conftest import make_checkpoint

SHARD = "model-00001-of-00002.safetensors"

bounded = settings(
    derandomize=True, database=None, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)

numbers = st.sampled_from([0, 1, -1, 2, 3, 7, 48, 64, 2**31, 2**63, 10**30, 0.5, 1e308, math.nan, math.inf, -math.inf])
words = st.sampled_from(
    ["", "a", "../x", "/etc/passwd", "model.norm.weight", SHARD, "float32", "llama", "\ud800", "\0", "\n"]
)
scalars = st.none() | st.booleans() | numbers | words
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(words, scalars, max_size=3)
changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.none() | values), min_size=1, max_size=3)
"""Which entry of a JSON file, as a fraction of all there are, and what to put there; None takes it out."""

flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)
"""Which byte, as a fraction of those in question, and what to put there."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sharded checkpoint with a tokenizer, in ``source``, and a quantized one, in ``quantized``."""
    folder = tmp_path_factory.mktemp("fuzz")
    source = make_checkpoint(folder / "source")
    model, tokenizer = fqjax.load_hf(source)
    batches = [np.random.default_rng(0).integers(3, 2048, (2, 16)).astype(np.int32)]
    fqjax.save(folder / "quantized", fqjax.quantize(model, "w8a8", batches)[0], tokenizer=tokenizer)
    (folder / "text.txt").write_text("return the list of values that the class holds " * 30)
    return folder


def paths(tree, prefix=()):
    """Every entry of a JSON file, as the keys that lead to it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in ((*prefix, key), *paths(value, (*prefix, key)))]


def with_changes(text, edits):
    tree = json.loads(text)
    for fraction, value in edits:
        entries = paths(tree)
        if not entries:
            break
        *above, key = entries[int(fraction * len(entries))]
        node = tree
        for step in above:
            node = node[step]
        if value is None:
            del node[key]
        else:
            node[key] = value
    return json.dumps(tree).encode()


def with_flips(content, edits, first, last):
    changed = bytearray(content)
    for fraction, value in edits:
        changed[first + int(fraction * (last - first))] = value
    return bytes(changed)


@contextlib.contextmanager
def replaced(path, content):
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def state_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def run(folder, *arguments):
    """Runs a command, checks what it says, and returns its exit code."""
    out, err, start = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    assert time.perf_counter() - start < 30
    if code == 0:
        assert not err.getvalue() and out.getvalue()
    else:
        assert code == 2 and not out.getvalue()
        assert err.getvalue().startswith("fqjax: error: ") and err.getvalue().count("\n") == 1
    return code


def plans(folder):
    """Makes a plan, which reads everything but the weights and writes nothing."""
    before = state_of(folder)
    options = ("--calibration", folder / "text.txt", "--samples", 2, "--window", 16, "--dry-run")
    code = run(folder, "convert", folder / "source", folder / "out", *options)
    assert state_of(folder) == before
    return code


def test_what_is_whole_passes(folder):
    assert plans(folder) == 0 and run(folder, "inspect", folder / "quantized") == 0


@bounded
@given(edits=changes)
def test_config_json(folder, edits):
    path = folder / "source" / "config.json"
    with replaced(path, with_changes(path.read_text(), edits)):
        plans(folder)


@bounded
@given(edits=changes)
def test_the_index(folder, edits):
    path = folder / "source" / INDEX_FILE
    with replaced(path, with_changes(path.read_text(), edits)):
        plans(folder)


@bounded
@given(edits=changes)
def test_a_header_of_safetensors_as_json(folder, edits):
    path = folder / "source" / SHARD
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = with_changes(content[8:end].decode(), edits)
    with replaced(path, len(header).to_bytes(8, "little") + header + content[end:]):
        plans(folder)


@bounded
@given(edits=flips)
def test_a_header_of_safetensors_as_bytes(folder, edits):
    path = folder / "source" / SHARD
    content = path.read_bytes()
    with replaced(path, with_flips(content, edits, 0, 8 + int.from_bytes(content[:8], "little"))):
        plans(folder)


@bounded
@given(edits=changes)
def test_fqjax_json(folder, edits):
    path, before = folder / "quantized" / "fqjax.json", state_of(folder)
    changed = with_changes(path.read_text(), edits)
    same = changed == with_changes(path.read_text(), [])
    with replaced(path, changed):
        code = run(folder, "inspect", folder / "quantized")
    assert code == (0 if same else 2) or "checksums" not in json.loads(changed)
    assert state_of(folder).keys() == before.keys()


@bounded
@given(edits=changes)
def test_fqjax_json_without_checksums(folder, edits):
    path = folder / "quantized" / "fqjax.json"
    manifest = json.loads(path.read_text())
    del manifest["checksums"]
    with replaced(path, with_changes(json.dumps(manifest), edits)):
        run(folder, "inspect", folder / "quantized")


@pytest.mark.thorough
@settings(bounded, max_examples=15)
@given(edits=flips)
def test_a_conversion_leaves_a_whole_checkpoint_or_nothing(folder, edits):
    path, out, before = folder / "source" / SHARD, folder / "out", state_of(folder).keys()
    content = path.read_bytes()
    with replaced(path, with_flips(content, edits, 8 + int.from_bytes(content[:8], "little"), len(content))):
        if run(folder, "convert", folder / "source", out, "--scheme", "bf16") == 0:
            fqjax.load(out)
            shutil.rmtree(out)
    assert state_of(folder).keys() == before
