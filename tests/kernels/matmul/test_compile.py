"""Every kernel that would be taken for the shapes of the benchmark, compiled to machine code for an H200."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.matmul.hopper import launch, tuning
from pallas_kernels.matmul.hopper.problem import Gate
from pallas_kernels.shapes import ROWS, SHAPES
from tests.kernels import ahead_of_time
from tests.kernels.matmul.test_hopper import KINDS, problem

MOST_SPILLED, MOST_SPILLED_WITH_GATE = 32, 64
"""Bytes.  For 64 rows one kernel spills 28 (4 warpgroups), and was measured to be the fastest nevertheless; so do those that
have totals of groups and a warpgroup for a gate besides, 60, which save more than that costs."""

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not ahead_of_time.HAS_PLUGIN, reason="needs the package jax-cuda13-plugin"),
]


def abstract_operands(p):
    """As :func:`tests.kernels.matmul.test_hopper.operands` makes them, by shape and dtype alone."""
    shapes = {
        "x": ((p.m, p.k), p.decoder.x_dtype),
        "weight": ((p.n, p.k * p.decoder.bits // 8), jnp.int8),
        "x_scale": ((), jnp.float32),
        "weight_scale": ((p.n,), jnp.float32),
    }
    if p.decoder.operands:
        shapes["groups"] = ((p.k // 128, p.n), p.decoder.scale_dtype)
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes.values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", ROWS)
def test_registers_suffice(kind, m, capfd, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    bits, scales = KINDS[kind]
    for n, k in SHAPES["Llama-3-8B"].values():
        p = problem(m, n, k, bits, out_dtype=jnp.dtype("bfloat16"), **scales)
        config = tuning.choose(p, "NVIDIA H200") or tuning.rule(p)

        def f(x, weight, x_scale, weight_scale, groups=None, p=p, config=config):
            return launch.matmul(p, config, x, weight, x_scale, weight_scale, groups, None)

        ahead_of_time.compile_for_h200(f, *abstract_operands(p))
        spilled = ahead_of_time.spilled_bytes(capfd.readouterr().out)
        assert spilled and max(map(max, spilled)) <= MOST_SPILLED, config


@pytest.mark.parametrize(
    "gate", [Gate(activation="silu", qmax=127, extra=768), Gate(activation="silu", qmax=7, per_token=True)]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "weight_only"])
@pytest.mark.parametrize("m", [16, 64])
def test_registers_suffice_for_a_gate(kind, m, gate, capfd, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    bits, scales = KINDS[kind]
    n, k = SHAPES["Llama-3-8B"]["gate_up"]
    p = problem(m, n, k, bits, out_dtype=jnp.dtype("bfloat16"), gate=gate, **scales)
    config = tuning.choose(p, "NVIDIA H200")
    recipe = [jax.ShapeDtypeStruct((n // 2,), jnp.float32), *[jax.ShapeDtypeStruct((gate.extra,), jnp.int32)] * 2]

    def f(x, weight, x_scale, weight_scale, recipe, groups=None):
        return launch.gated_matmul(p, config, x, weight, x_scale, weight_scale, groups, None, recipe)

    x, weight, x_scale, weight_scale, *groups = abstract_operands(p)
    given = tuple(recipe if gate.extra else recipe[:1])
    ahead_of_time.compile_for_h200(f, x, weight, x_scale, weight_scale, given, *groups)
    spilled = ahead_of_time.spilled_bytes(capfd.readouterr().out)
    assert spilled and max(map(max, spilled)) <= (MOST_SPILLED_WITH_GATE if p.decoder.flushed else MOST_SPILLED)
