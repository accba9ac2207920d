"""Conversions that are interrupted, repeated, or started twice."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.checkpoint.tree import named_leaves
from fqjax.convert import run as conversion
from fqjax.convert.preview import estimated_bytes, peak_memory, plan_table
from fqjax.convert.staging import claimed
from fqjax.drivers.calibrate import Calibrate
from fqjax.drivers.rounding import RoundCompensated, RoundNearest
from fqjax.drivers.store import DirectoryStore
from fqjax.drivers.trial import Trial
from fqjax.presets import PRESETS
from fqjax.runtime.errors import InputError
from tests.conftest import edit_tensor, make_checkpoint
from tests.models import variants


@pytest.fixture
def asked(checkpoint, text, tmp_path):
    return conversion.Conversion(
        source=str(checkpoint),
        out=tmp_path / "out",
        scheme=PRESETS["flattenquant"],
        calibration=text,
        samples=4,
        window=64,
    )


def state_of(directory):
    return named_leaves(nnx.state(fqjax.load(directory)))


def assert_same(first, second):
    a, b = state_of(first), state_of(second)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_the_directory_is_complete_and_nothing_else_is_left(asked, tmp_path):
    report = conversion.convert(conversion.plan(asked))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "calibration.txt", "out"}
    assert fqjax.report_of(fqjax.load(asked.out)).layers == report.layers
    assert report.seconds > 0 and report.int4_mac_share >= 0.4829


@pytest.mark.sample(1)
@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "smoothquant", "flattenquant-w8a8", "flattenquant-hopper-int4"])
def test_every_scheme_converts(asked, scheme):
    report = conversion.convert(conversion.plan(replace(asked, scheme=PRESETS[scheme])))
    assert report.scheme == ("none" if scheme == "bf16" else scheme)
    tokens = np.arange(3, 20)[None].astype(np.int32)
    assert np.isfinite(variants.logits(fqjax.load(asked.out), tokens)).all()


STEPS = {
    "options": 3,
    "outlines": 5,
    "statistics": 1,
    "span": 8,
    "sensitivities": 1,
    "chosen": 1,
    "costs": 1,
    "finished": 4,
    "activations": 2,
}
"""Kinds of what a conversion finds out; how many of them are kept before it is interrupted."""


@pytest.mark.sample(2)
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_conversion_resumes_to_the_same_bits(asked, monkeypatch, tmp_path, step):
    whole = replace(asked, out=tmp_path / "whole")
    conversion.convert(conversion.plan(whole))
    method = "_carry" if step == "activations" else "__setitem__"
    original, calls = getattr(DirectoryStore, method), []

    def stop_after(self, key, value):
        result = original(self, key, value)
        if step == ("activations" if isinstance(key, Path) else key[0]):
            calls.append(key)
        if len(calls) == STEPS[step]:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, method, stop_after)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.plan(asked))
    assert not asked.out.exists()
    with pytest.raises(InputError, match="pass --resume"):
        conversion.convert(conversion.plan(asked))
    conversion.convert(conversion.plan(asked), resume=True)
    assert_same(asked.out, whole.out)
    assert not conversion.staging_directory(asked.out).exists()


def test_what_was_remembered_is_not_computed_again(asked, monkeypatch):
    monkeypatch.setattr("fqjax.convert.run.Writer", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(conversion.plan(asked))
    monkeypatch.undo()
    for one in (Calibrate, Trial, RoundNearest, RoundCompensated):
        monkeypatch.setattr(one, "block", _interrupt)
    conversion.convert(conversion.plan(asked), resume=True)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.thorough
def test_a_killed_conversion_leaves_no_directory_that_looks_complete(asked, tmp_path):
    command = [sys.executable, "-m", "fqjax.cli", "convert", asked.source, str(asked.out)]
    command += ["--calibration", str(asked.calibration), "--samples", "4", "--window", "64"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    staging = conversion.staging_directory(asked.out)
    deadline = time.time() + 120
    while not list(staging.glob("options.*.safetensors")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(staging.glob("options.*.safetensors")) and not asked.out.exists()
    assert subprocess.run([*command, "--resume"], stdout=subprocess.DEVNULL).returncode == 0
    assert not staging.exists() and fqjax.load(asked.out)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("change", "named"),
    [({"samples": 5}, "samples"), ({"ignore": ("layers.0",)}, "ignore"), ({"scheme": PRESETS["w8a8"]}, "scheme")],
)
def test_resuming_with_other_settings_is_refused(asked, monkeypatch, change, named):
    with monkeypatch.context() as patch:
        patch.setattr("fqjax.convert.run.Writer", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.plan(asked))
    with pytest.raises(InputError, match=f"begun with other {named}"):
        conversion.convert(conversion.plan(replace(asked, **change)), resume=True)


def test_resuming_with_another_version_is_refused(asked, monkeypatch):
    made = conversion.plan(asked)
    with claimed(asked.out, made.fingerprint, resume=False):
        pass
    monkeypatch.setattr("fqjax.convert.plan.__version__", "9.9")
    with pytest.raises(InputError, match=r"begun with fqjax \d.*, and this is 9\.9; remove it, or go on with"):
        conversion.convert(conversion.plan(asked), resume=True)


def test_resuming_after_the_text_or_a_shard_changed_is_refused(asked, monkeypatch, checkpoint):
    with monkeypatch.context() as patch:
        patch.setattr("fqjax.convert.run.Writer", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.plan(asked))
    text = asked.calibration.read_text()
    asked.calibration.write_text(text + " more")
    with pytest.raises(InputError, match="begun with other text"):
        conversion.convert(conversion.plan(asked), resume=True)
    asked.calibration.write_text(text)
    edit_tensor(checkpoint, "model.norm.weight", lambda t: 2 * t)
    with pytest.raises(InputError, match="begun with other files"):
        conversion.convert(conversion.plan(asked), resume=True)


def test_two_conversions_into_one_directory(asked):
    staging = conversion.staging_directory(asked.out)
    staging.mkdir()
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another conversion"):
            conversion.convert(conversion.plan(asked), resume=True)


def test_bad_weights_leave_nothing_behind(asked, checkpoint, tmp_path):
    edit_tensor(checkpoint, "model.layers.1.mlp.up_proj.weight", lambda t: t * np.nan)
    with pytest.raises(InputError, match="not finite"):
        conversion.convert(conversion.plan(asked))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "calibration.txt"}


def test_a_directory_that_cannot_be_written(asked, text):
    with pytest.raises(InputError, match="cannot be written"):
        conversion.convert(conversion.plan(replace(asked, out=text / "out")))


def test_planning_reads_no_weights(asked, monkeypatch, checkpoint):
    monkeypatch.setattr("fqjax.checkpoint.safetensors.TensorFiles.read", _interrupt)
    made = conversion.plan(asked)
    assert len(made.selection.linears) == 8 and sum(map(len, made.batches)) == 4


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("variant", "scheme", "settings"),
    [
        ("llama-grouped", "w8a8", []),
        ("opt", "smoothquant", []),
        (
            "llama-grouped",
            "flattenquant-hopper-int4",
            [r"int8_layers=layers\.0", "max_expansion=1", "rounding=nearest"],
        ),
        ("opt", "w4a8", [r"int8_layers=layers\.0"]),
        ("llama-grouped", "w4a8-integer-scale", [r"int8_layers=layers\.0", "group_size=64"]),
        ("opt", "w4a8-integer-scale-folded", []),
        ("llama-grouped", "w4a16", []),
    ],
)
def test_a_plan_knows_the_bytes_of_layers_that_are_not_flattened(asked, tmp_path, variant, scheme, settings):
    source = make_checkpoint(tmp_path / "planned", variant)
    made = conversion.plan(replace(asked, source=str(source), scheme=PRESETS[scheme].override(settings)))
    report = conversion.convert(made)
    assert estimated_bytes(made) == {layer.name: layer.bytes for layer in report.layers}


def test_calibration_without_a_file_uses_the_documentation_of_python(asked, monkeypatch):
    made = conversion.plan(replace(asked, calibration=None))
    assert sum(map(len, made.batches)) == 4


def test_an_fqjax_checkpoint_is_no_source(asked):
    conversion.convert(conversion.plan(asked))
    with pytest.raises(InputError, match="already an fqjax checkpoint"):
        conversion.plan(replace(asked, source=str(asked.out), out=asked.out.with_name("again")))


def test_the_manifest_names_scheme_and_architecture(asked):
    conversion.convert(conversion.plan(asked))
    manifest = json.loads((asked.out / "fqjax.json").read_text())
    assert manifest["recipes"][0]["name"] == "flattenquant"
    assert manifest["architecture"]["name"] == "LlamaForCausalLM"
    assert manifest["format_version"] == 2 and len(manifest["layers"]) == 8


def test_the_estimate_of_the_memory_knows_the_window_and_the_samples(asked):
    """Scores of attention and their softmax in float32, for every head and sequence of a batch."""
    short, long = (conversion.plan(replace(asked, window=window, samples=2), dry_run=True) for window in (16, 64))
    wide = replace(long, conversion=replace(long.conversion, window=8192))
    one = replace(wide, conversion=replace(wide.conversion, samples=1))
    heads = long.architecture[1].num_attention_heads
    assert peak_memory(short) <= peak_memory(long) < peak_memory(one) < peak_memory(wide)
    assert peak_memory(wide) - peak_memory(one) == 2 * 4 * heads * 8192**2


@pytest.mark.parametrize(("scheme", "words"), [("flattenquant", "before flattening."), ("w4a8-gptq", " after.")])
def test_a_plan_speaks_of_flattening_where_there_is_some(asked, scheme, words):
    made = conversion.plan(replace(asked, scheme=PRESETS[scheme]), dry_run=True)
    assert str(plan_table(made).caption).splitlines()[0].endswith(words)


def test_samples_beyond_what_the_text_has_are_said(asked):
    made = conversion.plan(replace(asked, samples=10**6), dry_run=True)
    windows = sum(len(batch) for batch in made.batches)
    assert f"{windows} windows of" in (caption := str(plan_table(made).caption)) and "asked for: 1000000" in caption
