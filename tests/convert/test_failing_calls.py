"""One system call at a time that fails, or at which the process is killed, in conversions and in saves.

The target is then absent or complete, what can be resumed resumes to the same bits, and the message is one line.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

KINDS = ("open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir")
"""Kinds of calls that a conversion makes."""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("calls of all libraries are let fail by one of our own, which needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("library") / "failing_calls.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, HERE / "failing_calls.c", "-ldl"], check=True)
    return path


@pytest.mark.parametrize(
    ("mode", "stride"),
    [
        ("save", 60),
        pytest.param("save", 1, marks=pytest.mark.thorough),
        pytest.param("convert", 1, marks=pytest.mark.thorough),
        pytest.param("kill", 24, marks=pytest.mark.thorough),
    ],
)
def test_a_call_that_fails(library, checkpoint, tmp_path, mode, stride):
    """Every call, or every so many of each kind; of those at which a process is killed, so many."""
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    command = [sys.executable, str(HERE / "fail_calls.py"), mode, str(checkpoint), str(work), str(stride)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    counted = found["counted"]
    assert counted["all"] > 100 if mode == "kill" else all(counted[kind] for kind in KINDS if mode == "convert")
    assert found["failed"] >= (24 if mode == "kill" else sum(counted.values()) / stride)
