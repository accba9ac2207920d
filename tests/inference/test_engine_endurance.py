"""An engine after very many requests."""

import gc
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.checkpoint.hugging_face import load_hf
from fqjax.inference import slots as programs
from fqjax.inference.engine import Engine
from fqjax.inference.requests import Request
from fqjax.runtime.errors import InputError
from tests.models import variants

KINDS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 5, "temperature": 1.0},
    {"repetition_penalty": 1.2},
    {"logprobs": 3},
    {"min_p": 0.1, "temperature": 1.0, "logprobs": 1},
    {"deadline": 0.002},
    {"deadline": 3600.0},
)


def held():
    """Compiled programs, arrays on the device, and bytes of the process."""
    gc.collect()
    compiled = sum(f._cache_size() for f in vars(programs).values() if hasattr(f, "_cache_size"))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return compiled, len(jax.live_arrays()), pages * os.sysconf("SC_PAGE_SIZE")


def serve(engine, rng, count):
    """Requests of any length and kind, one in ten cancelled, one in twenty malformed; how many were answered."""
    answered = sent = 0
    while sent < count or engine.busy:
        while sent < count and engine.free:
            kind = KINDS[rng.integers(len(KINDS))]
            prompt = rng.integers(3, 64, rng.integers(1, 24)).tolist()
            ticket = engine.submit(
                Request(prompt=prompt, max_new_tokens=int(rng.integers(1, 8)), seed=int(rng.integers(9)), **kind)
            )
            sent += 1
            if sent % 10 == 0:
                engine.cancel(ticket)
            if sent % 20 == 0:
                with pytest.raises(InputError):
                    engine.submit(Request(prompt=[64], max_new_tokens=1))
        for output in engine.step():
            if output.finished is not None:
                assert output.finished.reason in ("length", "cancelled", "deadline", "eos")
                answered += 1
    return answered


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the memory of a process is read from /proc")
def test_ten_thousand_requests_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("fqjax.inference.memory.PAGE", 4)
    model, _ = load_hf(variants.write_checkpoint(tmp_path / "model", variants.VARIANTS["llama-grouped"]), jnp.float32)
    engine, rng = Engine(model, slots=6, capacity=32, tokens=120, chunk=16), np.random.default_rng(0)
    engine.warm_up()
    assert serve(engine, rng, 2000) == 2000
    before = held()
    assert serve(engine, rng, 10_000) == 10_000
    after = held()
    assert after[0] == before[0] and after[1] <= before[1] + 8 and after[2] - before[2] < 10e6, (before, after)
    assert engine.tokens_held == 0 and len(engine._deadlines) < 100
