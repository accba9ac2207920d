"""What must work with every supported set of versions: imports, and the way from a checkpoint to text.

Kernels and checkpoints have tests of their own that are marked ``smoke`` where they stand.
"""

import importlib
import pkgutil

import numpy as np
import pytest

import fqjax
import pallas_kernels
from fqjax.cli import main as cli
from tests.models import variants

pytestmark = pytest.mark.smoke

MODULES = [
    module.name
    for package in (fqjax, pallas_kernels)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith(".__main__")  # Runs the program.
]


def test_every_module_can_be_imported():
    assert len(MODULES) > 50
    for name in MODULES:
        importlib.import_module(name)


def test_a_checkpoint_is_converted_and_a_prompt_continued(checkpoint, text, tmp_path, capsys):
    out, calibration = tmp_path / "out", ("--calibration", str(text), "--samples", "2", "--window", "32")
    assert cli.main(["convert", str(checkpoint), str(out), "--scheme", "smoothquant", *calibration]) == 0
    capsys.readouterr()
    assert cli.main(["generate", str(out), "--prompt", "return the", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("return the")
    reference, tokenizer = fqjax.load_hf(checkpoint)
    tokens = np.asarray(tokenizer(text.read_text()).input_ids[:32], np.int32)[None]
    exact, found = (np.asarray(variants.logits(model, tokens), np.float32) for model in (reference, fqjax.load(out)))
    assert 0 < np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)
