"""Programs that the tests compiled are found by the next run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compilation_cache

COMPLAINT = "Error reading persistent compilation cache"
PROGRAM = """
import collections
import jax
import jax.numpy as jnp
from tests import compilation_cache

compilation_cache.LEAST_SECONDS = 0.0
compilation_cache.use()
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((16, 16))).block_until_ready()
print(events["cache_hits"], events["cache_misses"])
"""


def run(folder: Path) -> tuple[tuple[int, int], str]:
    """Hits and misses of a process of its own, and what it complains of."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"FQJAX_TEST_CACHE": str(folder), "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    hits, misses = map(int, done.stdout.split())
    return (hits, misses), done.stderr


def test_a_second_process_finds_what_the_first_compiled_and_is_whole(tmp_path):
    (hits, misses), _ = run(tmp_path)
    assert hits == 0 < misses and list(tmp_path.glob("*/*-cache"))
    (again, compiled), complaints = run(tmp_path)
    if again == 0 and COMPLAINT in complaints:
        pytest.skip("XLA rejects on this machine what it compiled on it, and compiles it again")
    assert (again, compiled) == (misses, 0) and COMPLAINT not in complaints
    for path in tmp_path.glob("*/*-cache"):
        path.write_bytes(path.read_bytes()[:-20])
    (hits, _), complaints = run(tmp_path)
    assert hits == 0 and COMPLAINT in complaints


def test_other_flags_have_another_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("FQJAX_TEST_CACHE", str(tmp_path))
    usual = compilation_cache.directory()
    assert usual is not None and usual.parent == tmp_path
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert compilation_cache.directory() != usual
    monkeypatch.setenv("FQJAX_TEST_CACHE", "off")
    assert compilation_cache.directory() is None
