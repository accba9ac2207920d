"""The Hopper kernels with experts: in interpret mode, lowered for CUDA, compiled ahead of time, and on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Weight, device, pack_int4
from pallas_kernels.matmul import experts
from pallas_kernels.matmul.hopper import decode, gemm, launch, tuning
from pallas_kernels.matmul.hopper import ragged as hopper_experts
from pallas_kernels.matmul.hopper.decode import DecodeConfig
from pallas_kernels.matmul.hopper.gemm import GemmConfig
from pallas_kernels.matmul.kind import Matmul, Operands
from pallas_kernels.mosaic import compat
from tests.kernels import ahead_of_time
from tests.kernels.matmul.test_hopper import (
    FLOAT,
    FOLDED,
    KINDS,
    SHORT,
    WEIGHT_ONLY,
    interpreted,
    needs_hopper,
    problem,
    same,
)


def operands(p, sizes, seed=0):
    """x, weight codes, rows of each expert, x_scale, w_scale, scales of groups or None; all codes occur."""
    rng, floats = np.random.default_rng(seed), p.decoder.x_dtype == jnp.bfloat16
    low, high = (-128, 128) if p.decoder.bits == 8 else (-8, 8)
    weight = jnp.asarray(rng.integers(low, high, (p.experts, p.n, p.k)).astype(np.int8))
    groups = None
    if p.decoder.operands:
        groups = jnp.asarray(rng.integers(1, 16, (p.experts, p.k // 128, p.n)), p.decoder.scale_dtype)
        groups = groups * 0.37 if p.decoder.total_dtype == jnp.float32 else groups
        groups = (
            jnp.exp2(jnp.round(groups)) if (p.decoder.x_dtype == jnp.bfloat16) else groups
        )  # Codes times scales are exact in bfloat16.
    return (
        jnp.asarray(rng.integers(-127, 128, (p.m, p.k)), p.decoder.x_dtype),
        weight if p.decoder.bits == 8 else jax.vmap(jax.jit(pack_int4))(weight),
        jnp.asarray(sizes, jnp.int32),
        jnp.float32(1) if floats else jnp.asarray(rng.uniform(0.5, 2, p.m if p.per_token else ()), jnp.float32),
        jnp.asarray(rng.uniform(0.5, 2, (p.experts, p.n)), jnp.float32),
        groups,
    )


def expected(p, arguments):
    x, codes, sizes, x_scale, scale, groups = arguments
    kind = Matmul(decoder=p.decoder, out_dtype=p.out_dtype)
    return experts._xla(kind, Operands(x, codes, x_scale, scale, groups), sizes)


@pytest.mark.smoke
@pytest.mark.sample(1)
@interpreted
@pytest.mark.parametrize(
    ("p", "config", "sizes"),
    [
        (problem(160, 192, 512, 8, experts=3, per_token=True), GemmConfig(tokens=64), [72, 0, 24]),
        (problem(160, 192, 512, 4, experts=3), GemmConfig(tokens=64, warpgroups=1), [0, 40, 120]),
        (
            problem(160, 192, 512, 4, experts=3, out_dtype=jnp.dtype("bfloat16"), **SHORT),
            GemmConfig(tokens=128, warpgroups=1),
            [136, 8, 16],
        ),
        (
            problem(160, 192, 512, 4, experts=3, per_token=True, **FOLDED),
            GemmConfig(tokens=64, cluster=2),
            [0, 40, 112],
        ),
        (problem(96, 128, 512, 4, experts=2, **FLOAT), GemmConfig(tokens=64, warpgroups=1), [80, 16]),
        (problem(96, 128, 512, 4, experts=2, **WEIGHT_ONLY), GemmConfig(tokens=64, warpgroups=1), [8, 80]),
        (problem(96, 128, 512, 8, experts=2), GemmConfig(tokens=64), [0, 0]),
    ],
)
def test_gemm_in_interpret_mode(monkeypatch, p, config, sizes):
    build = gemm.build
    settings = {"multiprocessors": 4, "interpret": compat.interpret_params()}
    monkeypatch.setattr(gemm, "build", lambda p, config: build(p, config, **settings))
    device.clear_caches()
    arguments, rows = operands(p, sizes), sum(sizes)
    result = launch.expert_matmul(p, config, *arguments)
    device.clear_caches()
    assert same(p, result[:rows], expected(p, arguments)[:rows])


@interpreted
def test_rows_of_no_expert_are_not_written(monkeypatch):
    build = gemm.build
    settings = {"multiprocessors": 4, "interpret": compat.interpret_params()}
    monkeypatch.setattr(gemm, "build", lambda p, config: build(p, config, **settings))
    device.clear_caches()
    p, config = problem(128, 64, 256, 8, experts=2), GemmConfig(tokens=128, warpgroups=1)
    result, all_rows = (launch.expert_matmul(p, config, *operands(p, sizes)) for sizes in ([24, 16], [24, 104]))
    device.clear_caches()
    assert jnp.array_equal(result[:40], all_rows[:40])
    assert (result[40:] != all_rows[40:]).mean() > 0.99


@pytest.mark.sample(1)
@interpreted
@pytest.mark.parametrize(
    ("p", "config", "sizes"),
    [
        (problem(40, 192, 768, 8, experts=4), DecodeConfig(splits=1, ctas=2, warpgroups=2), [8, 0, 16, 8]),
        (problem(40, 192, 768, 4, experts=4), DecodeConfig(splits=1, ctas=3, warpgroups=3), [40, 0, 0, 0]),
        (problem(24, 128, 768, 4, experts=4, **SHORT), DecodeConfig(splits=1, ctas=2), [0, 8, 0, 8]),
        (problem(24, 128, 768, 4, experts=4, **FOLDED), DecodeConfig(splits=1, ctas=2, fold=True), [8, 8, 8, 0]),
    ],
)
def test_partial_sums_of_decode_in_interpret_mode(p, config, sizes):
    x, weight, counts, _, _, groups = operands(p, sizes)
    tile = decode.token_tile(p.rows_at_once)
    kernel = decode.build(p, config, interpret=compat.interpret_params())
    rest = () if groups is None else (groups.reshape(-1, p.n),)
    visits = hopper_experts.visits(p, counts, tile)
    (partial,) = np.asarray(
        kernel(weight.reshape(-1, weight.shape[2]), x, jnp.ones(p.experts * p.n), jnp.ones(1), *rest, visits)
    )
    raw = dataclasses.replace(p, per_token=False, out_dtype=jnp.dtype("float32"))
    one = jnp.ones((p.experts, p.n))
    wanted = np.asarray(expected(raw, (x, weight, counts, jnp.float32(1), one, groups)))
    channels = 64 * config.warpgroups
    room = -(-p.n // channels) * channels
    factor = 2 ** (p.decoder if config.fold else p.decoder.without_folding()).shift
    begin, place = 0, 0
    for size in sizes:
        for first in range(0, size, tile):
            rows = min(tile, size - first)
            found = partial[place * room : place * room + p.n, :rows].T / factor
            np.testing.assert_array_equal(found, wanted[begin + first : begin + first + rows])
            place += 1
        begin += size


@pytest.mark.parametrize("size", [8, 64, 256])
@pytest.mark.parametrize("sizes", [[8, 0, 16, 200], [0, 0, 0, 0], [0, 256, 0, 0], [64, 64, 64, 64]])
def test_tiles_cover_the_rows_of_every_expert(sizes, size):
    p = problem(256, 64, 256, 8, experts=4)
    count, *rest = np.asarray(hopper_experts.visits(p, jnp.asarray(sizes, jnp.int32), size))
    most = hopper_experts.most_tiles(p, size)
    owners, begins, ends = np.asarray(rest).reshape(3, most)
    assert count <= most
    found = []
    for owner, begin, end in zip(owners[:count], begins[:count] * 8, ends[:count], strict=True):
        found += [(row, owner) for row in range(begin, min(begin + size, end))]
    assert found == list(enumerate(np.repeat(np.arange(4), sizes)))


@pytest.mark.smoke
@pytest.mark.sample(7)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [88, 184, 4152])
def test_kernels_lower_for_cuda(kind, m):
    bits, scales = KINDS[kind]
    p = problem(m, 448, 2048, bits, experts=4, out_dtype=jnp.dtype("bfloat16"), **scales)
    f = jax.jit(lambda *a: launch.expert_matmul(p, tuning.rule(p), *a))
    text = f.trace(*operands(p, [8, 0, 40, 40])).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1


@pytest.mark.thorough
@pytest.mark.skipif(not ahead_of_time.HAS_PLUGIN, reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [88, 184, 16440])
def test_kernels_of_a_large_model_compile(kind, m):
    bits, scales = KINDS[kind]
    for n, k in ((28672, 4096), (4096, 14336)):
        p = problem(m, n, k, bits, experts=8, out_dtype=jnp.dtype("bfloat16"), **scales)
        shapes = [((m, k), p.decoder.x_dtype), ((8, n, k * bits // 8), jnp.int8), ((8,), jnp.int32), ((), jnp.float32)]
        shapes += [((8, n), jnp.float32)] + [((8, k // 128, n), p.decoder.scale_dtype)] * p.decoder.operands

        def f(x, weight, sizes, x_scale, weight_scale, groups=None, p=p):
            return launch.expert_matmul(p, tuning.rule(p), x, weight, sizes, x_scale, weight_scale, groups)

        ahead_of_time.compile_for_h200(f, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))


def test_what_the_kernels_cannot_take_is_said():
    assert launch.cannot_use(problem(16, 128, 256, 4, experts=4)) is None
    assert "12 rows are not a multiple of 8" in launch.cannot_use(problem(12, 128, 256, 4, experts=4))
    assert "no biases" in launch.cannot_use(problem(16, 128, 256, 4, experts=4, bias=True))
    assert not tuning.fits(problem(16, 128, 1024, 4, experts=4), DecodeConfig(splits=2))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[8, 0, 16, 8], [16, 96, 0, 8], [0, 0, 2048, 0], [264, 1000, 512, 72]])
def test_every_configuration_on_the_gpu(kind, sizes):
    bits, scales = KINDS[kind]
    rows, per_token = sum(sizes), kind != "weight_only"
    p = problem(rows + 16, 1472, 2560, bits, experts=4, out_dtype=jnp.dtype("bfloat16"), per_token=per_token, **scales)
    arguments = operands(p, sizes)
    wanted = expected(p, arguments)[:rows]
    for config in tuning.candidates(p):
        f = jax.jit(lambda *a, config=config: launch.expert_matmul(p, config, *a)[:rows])
        assert all(same(p, f(*arguments), wanted) for _ in range(5)), config


@pytest.mark.gpu
@needs_hopper
def test_the_dispatcher_takes_the_kernel():
    p = problem(64, 1472, 2560, 4, experts=4, out_dtype=jnp.dtype("bfloat16"))
    arguments = operands(p, [8, 32, 0, 24])
    x, codes, sizes, x_scale, scale, _ = arguments
    weight = Weight(p.decoder, codes, scale)
    found = [
        experts.expert_matmul(x, weight, sizes, x_scale, alignment=8, implementation=i) for i in ("mosaic", "xla", None)
    ]
    assert all(bool(jnp.array_equal(found[0], other)) for other in found[1:])
