"""Standard streams that are closed or full, and directories that are closed to the user."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fqjax.cli import app
from fqjax.cli import main as cli
from fqjax.report.report import LayerReport, Report

RUN = "import sys; from fqjax.cli.main import run; run()"


def ended(*arguments, redirected="", **streams):
    words = " ".join(f"'{word}'" for word in (sys.executable, "-c", RUN, *arguments))
    return subprocess.run(["sh", "-c", f"exec {words} {redirected}"], capture_output=True, text=True, **streams)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_standard_output():
    done = ended("schemes", redirected="> /dev/full")
    assert done.returncode == 2
    assert done.stderr == "fqjax: error: standard output: cannot be written (No space left on device)\n"


def test_a_closed_standard_error_leaves_standard_output_alone(tmp_path):
    done = ended("convert", "none", str(tmp_path), redirected="2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_reader_that_has_gone():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", RUN, "schemes"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("closed", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("command", [["inspect"], ["eval", "--text", "text"], ["convert", "out"]])
def test_a_directory_that_is_closed(capsys, checkpoint, text, tmp_path, monkeypatch, command, closed):
    monkeypatch.chdir(tmp_path)
    text.rename("text")
    original = Path.lstat

    def lstat(path):
        if path.name == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    if command == ["inspect"] and closed == "tokenizer.json":
        pytest.skip("inspect reads no tokenizer")
    assert cli.main([command[0], str(checkpoint), *command[1:]]) == 2
    err = capsys.readouterr().err
    assert err == f"fqjax: error: {checkpoint / closed}: cannot be looked at (Permission denied)\n"
    assert not Path("out.partial").exists()


def test_an_error_that_nothing_expected_is_one_line(capsys, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "some/file")

    monkeypatch.setattr("fqjax.data.text.read_text", fail)
    assert cli.main(["eval", "model", "--text", "text"]) == 2
    assert capsys.readouterr().err == "fqjax: error: some/file: Input/output error\n"


def test_warnings_are_one_line_whatever_others_make_of_the_log():
    code = (
        "import logging; from fqjax.cli.terminal import show_warnings\n"
        "logging.basicConfig(); show_warnings(); logging.getLogger('fqjax.convert').warning('%s is\\nleft', 'out')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "fqjax: out is left\n")


@pytest.mark.parametrize("width", [40, 60, 80, None])
def test_numbers_are_cut_nowhere(monkeypatch, capsys, width):
    """In a terminal names are folded; in a file, and where numbers leave no room for them, nothing is."""
    shown = io.StringIO()
    if width is not None:
        terminal = Console(file=shown, force_terminal=True, color_system=None, width=width)
        monkeypatch.setattr(app, "console", terminal)
    figures = {"bits": 4, "expansion": 1.125, "relative_error": 0.0123, "bytes": 123456, "bytes_bf16": 234567}
    layer = LayerReport(name="layers.10.mlp.experts.100.gate_up_proj", macs=1, accumulator_bound=10**6, **figures)
    app.show(Report(scheme="mine", layers=(layer,), skipped={}, model_bytes=10**6).table())
    out = shown.getvalue() or capsys.readouterr().out
    cells = ("bits", "K'/K", "error", "of bf16", "margin", "1.125", "1.23%", "123 kB", "53%", "11.1")
    assert all(cell in out for cell in cells) and "\N{HORIZONTAL ELLIPSIS}" not in out
    assert (layer.name in out) == (width != 80)
