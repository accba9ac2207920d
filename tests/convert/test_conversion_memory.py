"""The peak memory of conversions, measured in processes of their own.

It takes minutes and a machine that does nothing else, and packages that users need not have count too: transformers imports
torch where it is installed.  So it is measured where FQJAX_MEASURE_MEMORY=yes asks for it, as 'make memory' does.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.measure_conversion_memory import CONFIG, convert, make_checkpoint, peak_memory_of

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        os.environ.get("FQJAX_MEASURE_MEMORY") != "yes",
        reason="takes minutes of an idle machine; FQJAX_MEASURE_MEMORY=yes measures",
    ),
]
OPTIONS = ("--samples", "2", "--window", "32", "--set", "sample_rows=64")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # How other tests are compiled, and threads that those of GPU kernels ask for, each with memory of its own.
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def measured(folder, config, blocks, scheme):
    """Bytes of a checkpoint, and of the memory that its conversion takes."""
    source, out = folder / "source", folder / "out"
    size = make_checkpoint(source, config, blocks)
    peak, _ = convert(source, out, "--scheme", scheme, *OPTIONS)
    for path in [*source.rglob("*"), *out.rglob("*")]:
        if path.is_file():
            path.unlink()  # Else pytest keeps several GB.
    return size, peak


def test_what_is_measured_is_the_program_alone():
    """Not the process that measures it, whose own peak is above that of the program here."""
    held = np.ones(2**26)
    peak = peak_memory_of([sys.executable, "-c", "print('x'); held = b'1' * 100_000_000"])
    assert 1e8 < peak < 2e8 < held.nbytes


@pytest.mark.parametrize(("scheme", "blocks", "least"), [("flattenquant-w8a8", 24, 4e9), ("flattenquant", 1, 0)])
def test_a_checkpoint_of_4_gb_takes_no_more_than_2_gb(tmp_path, scheme, blocks, least):
    """With GPTQ, which needs the most, one block of it is converted: how many there are does not matter, see below."""
    size, peak = measured(tmp_path, CONFIG, blocks, scheme)
    assert size >= least and peak <= 2e9, f"{peak / 1e9:.2f} GB"


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    """Of 20 further blocks, 500 MB, at most a fifth; a model held in memory as a whole would take all of it."""
    config = CONFIG | {
        "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }  # fmt: skip
    found = []
    for blocks in (4, 24):
        (folder := tmp_path / str(blocks)).mkdir()
        found.append(measured(folder, config, blocks, "flattenquant-w8a8"))
    (small, less), (large, more) = found
    assert large - small > 4.5e8
    assert more - less < (large - small) / 5, f"{less / 1e6:.0f} MB, {more / 1e6:.0f} MB"
