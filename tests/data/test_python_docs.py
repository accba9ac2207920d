"""Python's documentation, which comes with the package."""

import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import fqjax
from fqjax.data import python_docs

CHECKSUMS = {"reference_text": 0x9C19759F, "held_out_text": 0x8D79934C, "training_text": 0xB4417785}
"""CRC-32 of each text in UTF-8: a conversion without ``--calibration`` and the documents' figures depend on them."""


@pytest.mark.smoke
@pytest.mark.parametrize("name", CHECKSUMS)
def test_the_text_is_the_same_under_every_python(name):
    assert zlib.crc32(getattr(python_docs, name)().encode()) == CHECKSUMS[name]


def test_the_text_is_small_and_has_its_licence():
    files = {path.name: path for path in python_docs.FOLDER.iterdir()}
    assert set(files) == {f"{name}.txt.xz" for name in python_docs.PARTS} | {"LICENSE.txt"}
    assert sum(path.stat().st_size for path in files.values()) <= 1_000_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in files["LICENSE.txt"].read_text()


@pytest.mark.thorough
def test_the_script_records_the_docs_of_the_python_that_runs_it(tmp_path, monkeypatch):
    script = Path(fqjax.__file__).parents[1] / "scripts" / "record_python_docs.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    monkeypatch.setattr(python_docs, "FOLDER", tmp_path)
    assert '"if" statement' in python_docs.reference_text()
    assert len(python_docs.training_text()) > 1_000_000 and len(python_docs.held_out_text()) > 30_000
