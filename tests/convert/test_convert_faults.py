"""Conversions that are killed, run out of disk, are shut out, or have their source changed under them."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fqjax
from fqjax.checkpoint.orbax.write import Writer
from fqjax.cli import main as cli
from fqjax.convert import run as conversion
from fqjax.drivers.rounding import RoundNearest
from fqjax.presets import PRESETS
from fqjax.runtime import files
from fqjax.runtime.errors import InputError
from tests.conftest import edit_tensor

KILLS = 12

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from fqjax.cli.main import run
run()
"""


@pytest.fixture
def asked(checkpoint, text, tmp_path):
    return conversion.Conversion(
        source=str(checkpoint),
        out=tmp_path / "out",
        scheme=PRESETS["smoothquant"],
        calibration=text,
        samples=4,
        window=32,
    )


def command(asked, *options):
    arguments = ["convert", asked.source, asked.out, "--calibration", asked.calibration, "--scheme", asked.scheme.name]
    return [str(a) for a in (*arguments, "--samples", 4, "--window", 32, *options)]


def complains(capsys, asked, *parts, options=()):
    assert cli.main(command(asked, *options)) == 2
    err = capsys.readouterr().err
    assert err.startswith("fqjax: error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.thorough
def test_conversions_killed_at_random_points_resume_to_the_same_bits(checkpoint, text, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    script = Path(__file__).with_name("kill_conversion.py")
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint), str(text), str(work), str(KILLS)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["kills"]) == KILLS and found["total"] > 100 and found["chains"] > 1
    # Once the result is about to get its name, and only then, it may be there.
    assert all(kill["published"] or not kill["existed"] for kill in found["kills"])
    whole = work / "whole"
    for i in range(found["chains"]):
        out = work / f"killed-{i}"
        assert not conversion.staging_directory(out).exists()
        assert (out / "fqjax.json").read_text() == (whole / "fqjax.json").read_text()  # It has all arrays' checksums,
        fqjax.load(out)  # with which they are compared here.
        for file in ("calibration.safetensors", "tokenizer/tokenizer.json"):
            assert (out / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("step", ["fqjax.convert.run.remove", "pathlib.Path.rmdir"])
def test_a_conversion_that_only_had_to_be_cleaned_up_after(asked, monkeypatch, capsys, step):
    """Of its staging directory everything is left, or the directory alone."""
    with monkeypatch.context() as patch:
        patch.setattr(step, _interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.plan(asked))
    staging = conversion.staging_directory(asked.out)
    assert asked.out.is_dir() and any(staging.iterdir()) == (step == "fqjax.convert.run.remove")
    if any(staging.iterdir()):
        complains(capsys, asked, "out.partial: an unfinished conversion; pass --resume")
    report, loaded = conversion.convert(conversion.plan(asked), resume=True), fqjax.report_of(fqjax.load(asked.out))
    assert not staging.exists()
    assert report.layers == loaded.layers and report.model_bytes == loaded.model_bytes
    complains(capsys, asked, "out: exists already", options=["--resume"])


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.fixture
def plain(asked):
    """A conversion that compiles next to nothing."""
    return replace(asked, scheme=PRESETS["bf16"])


@pytest.mark.parametrize("step", ["convert.run.remove", "convert.staging._removed", "rmdir", "convert.run.finish"])
def test_what_only_has_to_be_cleaned_up_after_is_not_taken_for_another_conversion(plain, monkeypatch, capsys, step):
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rmdir" if step == "rmdir" else f"fqjax.{step}", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.plan(plain))
    assert plain.out.is_dir()
    before = (plain.out / "fqjax.json").read_bytes()
    complains(capsys, replace(plain, scheme=PRESETS["w8a8"]), "begun with other scheme", options=["--resume"])
    assert (plain.out / "fqjax.json").read_bytes() == before
    assert cli.main(command(plain, "--resume")) == 0
    assert {path.name for path in plain.out.parent.iterdir()} == {"source", "calibration.txt", "out"}


@pytest.mark.parametrize("call", ["unlink", "rmdir"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EDQUOT])
def test_what_cannot_be_removed_when_all_is_done(plain, monkeypatch, caplog, call, code):
    original = getattr(os, call)

    def fail(path, *args, **kwargs):
        if "out.partial" in str(path) and plain.out.is_dir():
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert cli.main(command(plain)) == 0
    (told,) = (record.getMessage() for record in caplog.records if record.name.startswith("fqjax"))
    assert told.count("\n") == 0 and f"out is complete, but {plain.out}.partial" in told
    assert f"cannot be removed ({os.strerror(code)})" in told and fqjax.load(plain.out)
    assert cli.main(command(plain, "--resume")) == 0
    assert {path.name for path in plain.out.parent.iterdir()} == {"source", "calibration.txt", "out"}


REWRITTEN = {
    (".json", "confi"): lambda content: content.replace(b"1e-05", b"1e-06"),
    (".json", "token"): lambda content: (
        content.replace(b":1000,", b":####,").replace(b":1001,", b":1000,").replace(b":####,", b":1001,")
    ),
    (".safetensors", "model"): lambda content: content[:-2] + b"\0\1",
}
"""Changes of a source's files that leave them valid, and as long as they were."""


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_source_that_is_rewritten_with_the_same_size_and_time(plain, checkpoint, monkeypatch, capsys, file):
    with monkeypatch.context() as patch:
        patch.setattr("fqjax.convert.run.publish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.plan(plain))
    path = checkpoint / file
    content, times = path.read_bytes(), path.stat()
    changed = REWRITTEN[path.suffix, file[:5]](content)
    assert len(changed) == len(content) and changed != content
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    part = "has changed since the conversion began" if path.suffix == ".safetensors" else f"other files ({file})"
    complains(capsys, plain, file, part, options=["--resume"])
    assert not plain.out.exists()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cli.main(command(plain, "--resume")) == 0 and fqjax.load(plain.out)


@pytest.mark.parametrize("out", ["gs://bucket/out", "s3://bucket/out", "file:///tmp/out", "a\\b", "a[b]", "a\udcff"])
def test_a_target_that_is_no_path(plain, monkeypatch, capsys, tmp_path, out):
    monkeypatch.chdir(tmp_path)
    complains(capsys, replace(plain, out=out), "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "calibration.txt"}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_full_disk(asked, monkeypatch, capsys, share):
    whole = replace(asked, out=asked.out.with_name("whole"))
    written = []
    original = os.fsync

    def fsync(descriptor):
        written.append(descriptor)
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        conversion.convert(conversion.plan(whole))
    left = int(share * len(written))

    def full(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        complains(capsys, asked, "out.partial/", "cannot be written (No space left on device)", "--resume")
    assert not asked.out.exists()
    assert cli.main(command(asked, "--resume")) == 0
    assert (asked.out / "fqjax.json").read_text() == (whole.out / "fqjax.json").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("limit", [100, 20_000, 60_000])
def test_a_disk_that_is_full_for_everyone(asked, limit):
    """Files may not become longer than some bytes, neither those of Python nor those of TensorStore."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command(asked)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("fqjax: ") == 1, done.stderr
    assert "out.partial" in done.stderr and "cannot be written" in done.stderr
    assert ("--resume" in done.stderr) == (limit > 1000)  # With less there is nothing yet that could be taken up.
    assert not asked.out.exists()
    assert cli.main(command(asked, "--resume")) == 0 and fqjax.load(asked.out)


def test_a_result_that_cannot_be_written(asked, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file")

    monkeypatch.setattr("fqjax.checkpoint.orbax.write.ocp.partial.save", fail)
    complains(capsys, asked, "out.partial/checkpoint: cannot be written (RESOURCE_EXHAUSTED", "--resume")


def test_a_target_that_is_read_only(asked, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", fail)
    complains(capsys, asked, "out.partial: cannot be written (Read-only file system)")


def test_two_conversions_at_once(asked, capsys):
    fcntl = pytest.importorskip("fcntl")
    staging = conversion.staging_directory(asked.out)
    staging.mkdir()
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for options in ([], ["--resume"]):
            complains(capsys, asked, "out.partial: another conversion is writing to it", options=options)
    assert cli.main(command(asked)) == 0


def test_a_directory_of_something_else_is_left_alone(asked, capsys):
    staging = conversion.staging_directory(asked.out)
    staging.mkdir()
    (staging / "thesis.tex").write_text("years of work")
    for options in ([], ["--resume"]):
        complains(capsys, asked, "out.partial: holds 'thesis.tex' and no plan.json", options=options)
    assert (staging / "thesis.tex").is_file()


@pytest.mark.parametrize("what", ["file", "link", "link to nothing"])
def test_what_is_no_directory_is_left_alone(asked, capsys, tmp_path, what):
    staging, elsewhere = conversion.staging_directory(asked.out), tmp_path / "elsewhere"
    if what == "link":
        elsewhere.mkdir()
    staging.write_text("work") if what == "file" else staging.symlink_to(elsewhere)
    complains(capsys, asked, "out.partial: no directory of its own; expected an unfinished conversion, or nothing")
    assert staging.is_file() or (staging.is_symlink() and not list(tmp_path.glob("elsewhere/*")))


@pytest.mark.parametrize("how", ["truncated", "changed", "gone"])
def test_a_shard_that_changes_between_runs(asked, checkpoint, monkeypatch, capsys, how):
    with monkeypatch.context() as patch:
        patch.setattr("fqjax.convert.run.Writer", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.plan(asked))
    shard = checkpoint / "model-00001-of-00002.safetensors"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-50])
    elif how == "gone":
        shard.unlink()
    else:
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        inside = next(name for name, file in index["weight_map"].items() if file == shard.name)
        edit_tensor(checkpoint, inside, lambda t: -t)
    named = {"truncated": f"{shard}: truncated", "changed": "begun with other files", "gone": f"{shard}: missing shard"}
    complains(capsys, asked, named[how], options=["--resume"])
    assert conversion.staging_directory(asked.out).is_dir()


@pytest.mark.parametrize(("kind", "method", "path"), [(RoundNearest, "block", "layers.0"), (Writer, "add", "norm")])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_shard_that_changes_during_a_run(asked, checkpoint, monkeypatch, how, kind, method, path):
    """In the middle, or when everything has been read."""
    shard = checkpoint / "model-00001-of-00002.safetensors"
    original = getattr(kind, method)

    def spoil(self, *args):
        if path in (args[0], getattr(args[0], "path", "")):
            shard.unlink() if how == "gone" else os.utime(shard, (1, 1))
        return original(self, *args)

    monkeypatch.setattr(kind, method, spoil)
    with pytest.raises(InputError, match="00001-of-00002.safetensors: (has changed|cannot be read)"):
        conversion.convert(conversion.plan(asked))
    assert not asked.out.exists() and not conversion.staging_directory(asked.out).exists()


def test_activations_are_never_taken_up_in_part(asked, monkeypatch):
    """Removal that is interrupted leaves nothing from which a pass would go on with some of its batches."""
    with monkeypatch.context() as patch:
        patch.setattr("fqjax.convert.run.Writer", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.plan(asked))
    staging = conversion.staging_directory(asked.out)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversion.remove(staging)
    assert not (staging / "activations").exists() and (staging / "plan.json").is_file()
    conversion.convert(conversion.plan(asked), resume=True)
    assert fqjax.load(asked.out)
