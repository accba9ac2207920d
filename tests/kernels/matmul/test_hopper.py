"""The Hopper kernels without a GPU: what they compute, in interpret mode, and that they lower for CUDA.

With a GPU, every tile shape is compared with the reference, many times over.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, pack_int4
from pallas_kernels.device import hopper_device
from pallas_kernels.matmul.hopper import decode, gemm, launch, tiles, tuning
from pallas_kernels.matmul.hopper.decode import DecodeConfig
from pallas_kernels.matmul.hopper.decoders import decoder_for, reorder
from pallas_kernels.matmul.hopper.gemm import GemmConfig
from pallas_kernels.matmul.hopper.problem import DECODE_ROWS, Problem
from pallas_kernels.matmul.kind import Matmul, Operands
from pallas_kernels.mosaic import compat

interpreted = pytest.mark.skipif(compat.version < (0, 11), reason="Mosaic GPU's interpreter needs jax 0.11")


def problem(m, n, k, bits, *, group_dtype=None, folded=False, weight_only=False, **change):
    decoder = decoder_for(bits, group_dtype=group_dtype, folded=folded, weight_only=weight_only)
    base = Problem(m=m, n=n, k=k, decoder=decoder, per_channel=True, out_dtype=jnp.dtype("float32"))
    return dataclasses.replace(base, **change)


def changed(p, *, bits=None, group_dtype=None, folded=False, weight_only=False, **change):
    """Another problem: with another format, if anything is said of it."""
    if bits or group_dtype or weight_only:
        bits = bits or p.decoder.bits
        change["decoder"] = decoder_for(bits, group_dtype=group_dtype, folded=folded, weight_only=weight_only)
    return dataclasses.replace(p, **change)


INTEGER, FLOAT = {"group_dtype": jnp.dtype("int32")}, {"group_dtype": jnp.dtype("float32")}
WEIGHT_ONLY = FLOAT | {"weight_only": True}
SHORT, FOLDED = {"group_dtype": jnp.dtype("int16")}, INTEGER | {"folded": True}


def operands(p, seed=0):
    """x, weight codes (packed or not), x_scale, w_scale, scales of groups or None, bias or None; all codes occur."""
    rng, floats = np.random.default_rng(seed), p.decoder.x_dtype == jnp.bfloat16
    low, high = (-128, 128) if p.decoder.bits == 8 else (-8, 8)
    weight = jnp.asarray(rng.integers(low, high, (p.n, p.k)).astype(np.int8))
    groups = None
    if p.decoder.operands:
        groups = jnp.asarray(rng.integers(1, 16, (p.k // 128, p.n)), p.decoder.scale_dtype)
        groups = groups * 0.37 if p.decoder.total_dtype == jnp.float32 else groups
        groups = (
            jnp.exp2(jnp.round(groups)) if (p.decoder.x_dtype == jnp.bfloat16) else groups
        )  # Codes times scales are exact in bfloat16.
    return (
        jnp.asarray(rng.integers(-127, 128, (p.m, p.k)), p.decoder.x_dtype),
        weight if p.decoder.bits == 8 else jax.jit(pack_int4)(weight),
        jnp.float32(1) if floats else jnp.asarray(rng.uniform(0.5, 2, p.m if p.per_token else ()), jnp.float32),
        jnp.asarray(rng.uniform(0.5, 2, p.n if p.per_channel else ()), jnp.float32),
        groups,
        jnp.asarray(rng.normal(0, 1, p.n), jnp.float32) if p.bias else None,
    )


def expected(p, arguments):
    return jax.jit(Matmul(decoder=p.decoder, out_dtype=p.out_dtype).xla)(Operands(*arguments))


def same(p, result, wanted):
    """Bit for bit; where floats are added up, as closely as the order of the sum allows."""
    if p.decoder.total_dtype == jnp.float32:
        largest = jnp.abs(wanted.astype(jnp.float32)).max()
        rounding = 2.0**-7 if p.out_dtype == jnp.bfloat16 else 2.0**-20
        return bool(jnp.allclose(result, wanted, rtol=rounding, atol=1e-6 * float(largest)))
    return bool(jnp.array_equal(result, wanted))


@pytest.mark.smoke
@pytest.mark.sample(3)
@interpreted
@pytest.mark.parametrize(
    ("p", "config"),
    [
        (problem(256, 256, 512, 8), GemmConfig(tokens=64)),
        (problem(256, 256, 512, 4, per_token=True, bias=True), GemmConfig(tokens=64)),
        (problem(136, 192, 512, 4, per_channel=False), GemmConfig(tokens=64)),
        (problem(130, 192, 384, 8, per_token=True), GemmConfig(tokens=128, width=1)),
        (problem(136, 320, 512, 8), GemmConfig(tokens=64, warpgroups=2, cluster=2)),
        (problem(72, 320, 512, 4), GemmConfig(tokens=64, warpgroups=1, cluster=2)),
        (problem(72, 320, 256, 4, out_dtype=jnp.dtype("int32")), GemmConfig(tokens=64, warpgroups=3)),
        (problem(136, 192, 512, 4, per_token=True, bias=True, **INTEGER), GemmConfig(tokens=128)),
        (problem(72, 128, 768, 4, out_dtype=jnp.dtype("int32"), **SHORT), GemmConfig(tokens=64, warpgroups=1)),
        (problem(136, 320, 512, 4, bias=True, **FLOAT), GemmConfig(tokens=128, cluster=2)),
        (problem(136, 192, 512, 4, per_token=True, **FOLDED), GemmConfig(tokens=64)),
        (problem(72, 192, 512, 4, bias=True, **WEIGHT_ONLY), GemmConfig(tokens=64)),
    ],
)
def test_gemm_in_interpret_mode(monkeypatch, p, config):
    build = gemm.build
    settings = {"multiprocessors": 4, "interpret": compat.interpret_params()}
    monkeypatch.setattr(gemm, "build", lambda p, config: build(p, config, **settings))
    device.clear_caches()
    arguments = operands(p)
    result = launch.matmul(p, config, *arguments)
    device.clear_caches()
    assert same(p, result, expected(p, arguments))


@interpreted
def test_what_wraps_on_the_way_does_so_exactly(monkeypatch):
    p = problem(136, 64, 1024, 4, out_dtype=jnp.dtype("int32"), **INTEGER)
    build, settings = gemm.build, {"multiprocessors": 4, "interpret": compat.interpret_params()}
    monkeypatch.setattr(gemm, "build", lambda p, config: build(p, config, **settings))
    device.clear_caches()
    scales = np.asarray(
        [1] * 7 + [1000]
    )  # The accumulator times a difference of these is far beyond int32, the sum is not.
    packed = pack_int4(jnp.full((p.n, p.k), -8, jnp.int8))
    groups = jnp.tile(jnp.asarray(scales, jnp.int32)[:, None], (1, p.n))
    x = jnp.full((p.m, p.k), 127, jnp.int8)
    result = launch.matmul(
        p, GemmConfig(tokens=128, warpgroups=1), x, packed, jnp.ones(()), jnp.ones(p.n), groups, None
    )
    device.clear_caches()
    one = -8 * 127 * 128  # product of one group
    assert 16 * abs(one) * scales.sum() < 2**31 < 16 * abs(one) * 8 * 999
    assert (np.asarray(result) == one * scales.sum()).all()


@pytest.mark.smoke
@pytest.mark.sample(2)
@interpreted
@pytest.mark.parametrize(
    ("p", "config"),
    [
        (problem(16, 256, 1024, 4), DecodeConfig(splits=4, stages=2)),
        (problem(1, 256, 1024, 4), DecodeConfig(splits=2)),
        (problem(8, 128, 3584, 4), DecodeConfig(splits=2, warpgroups=1, groups=2, stages=5)),
        (problem(5, 192, 1280, 4), DecodeConfig(splits=3, warpgroups=3)),
        (problem(40, 448, 768, 8), DecodeConfig(splits=1, ctas=2, warpgroups=3)),
        (problem(8, 128, 2560, 4, **INTEGER), DecodeConfig(splits=2, warpgroups=1, groups=2, stages=4)),
        (problem(40, 192, 768, 4, **SHORT), DecodeConfig(splits=1, ctas=2, warpgroups=2)),
        (problem(16, 192, 768, 4, **FOLDED), DecodeConfig(splits=3, warpgroups=3)),
        (problem(16, 192, 768, 4, **FOLDED), DecodeConfig(splits=3, warpgroups=3, fold=True)),
        (problem(16, 128, 768, 4, **FLOAT), DecodeConfig(splits=2)),
        (problem(40, 128, 768, 4, **WEIGHT_ONLY), DecodeConfig(splits=2)),
    ],
)
def test_partial_sums_of_decode_in_interpret_mode(p, config):
    x, weight, _, _, groups, _ = operands(p)
    kernel = decode.build(p, config, interpret=compat.interpret_params())
    ordered = reorder(x) if (p.decoder.x_dtype == jnp.bfloat16) else x
    partial = kernel(weight, ordered, jnp.ones(p.n), jnp.ones(1), *(() if groups is None else (groups,)))
    sums = np.asarray(partial).sum(0)[: p.n, : p.m].T
    sums = sums / (2 ** (p.decoder if config.fold else p.decoder.without_folding()).shift)
    one = jnp.float32(1)
    raw = dataclasses.replace(p, per_token=False, per_channel=False, bias=False, out_dtype=jnp.dtype("float32"))
    wanted = expected(raw, (x, weight, one, one, groups, None))
    assert same(p, jnp.asarray(sums, jnp.float32), wanted)


@pytest.mark.smoke
@pytest.mark.sample(6)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
@pytest.mark.parametrize(
    ("m", "config"),
    [
        (1, DecodeConfig(splits=2, warpgroups=2, groups=2)),
        (64, DecodeConfig(splits=1)),
        (264, GemmConfig(cluster=2)),
        (129, GemmConfig(tokens=64, warpgroups=4)),
    ],
)
def test_kernels_lower_for_cuda(bits, dtype, m, config):
    p = problem(m, 448, 2048, bits, out_dtype=jnp.dtype(dtype), per_token=True, bias=True)
    assert_lowers(p, config)


@pytest.mark.smoke
@pytest.mark.sample(5)
@pytest.mark.parametrize("scales", [INTEGER, SHORT, FLOAT, FOLDED, WEIGHT_ONLY])
@pytest.mark.parametrize(
    ("m", "config"),
    [(1, DecodeConfig()), (64, DecodeConfig(splits=2, fold=True)), (264, GemmConfig(tokens=64, cluster=2))],
)
def test_kernels_with_groups_lower_for_cuda(scales, m, config):
    per_token = not scales.get("weight_only", False)
    p = problem(m, 448, 2048, 4, out_dtype=jnp.dtype("bfloat16"), per_token=per_token, bias=True, **scales)
    assert_lowers(p, config)


def assert_lowers(p, config):
    f = jax.jit(lambda *a: launch.matmul(p, config, *a))
    text = f.trace(*operands(p)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1


@pytest.mark.parametrize(("m_tiles", "n_tiles", "width"), [(1, 1, 8), (5, 3, 2), (8, 7, 8), (7, 2, 3)])
def test_every_tile_is_visited_once(m_tiles, n_tiles, width):
    visit = jax.vmap(lambda t: jnp.stack(tiles.order(t, m_tiles, n_tiles, width)))
    visited = np.asarray(visit(jnp.arange(m_tiles * n_tiles)))
    assert sorted(map(tuple, visited)) == [(m, n) for m in range(m_tiles) for n in range(n_tiles)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 100}, "N = 100 is not a multiple of 64"),
        ({"k": 128}, "K = 128 is not a multiple of 256"),
        ({"k": 262144}, "could overflow"),
        ({"out_dtype": jnp.dtype("int8")}, "int8 is not one of"),
        ({"bits": 8} | INTEGER, "8 bits have no kernel with groups"),
        ({"out_dtype": jnp.dtype("int32")} | FLOAT, "no bare accumulator"),
        ({"k": 262144} | FOLDED, "could overflow"),
        (INTEGER | {"weight_only": True}, "weight-only matmuls need float scales"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(change, reason):
    assert launch.cannot_use(problem(4, 128, 256, 4)) is None
    assert reason in launch.cannot_use(changed(problem(4, 128, 256, 4), **change))


def test_folded_codes_overflow_where_120_times_127_times_k_does():
    fitting = 2**31 // (127 * 8 * 15) // 256 * 256
    folded = problem(130, 64, fitting, 4, **FOLDED)
    assert launch.cannot_use(folded) is None
    assert "could overflow" in launch.cannot_use(dataclasses.replace(folded, k=fitting + 256))


@pytest.mark.parametrize("bad", [{"tokens": 12}, {"tokens": 512}, {"warpgroups": 5}, {"cluster": 3}])
def test_bad_tiles_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GemmConfig(**bad)


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (8, DecodeConfig(splits=1, stages=1)),  # would wait for ever
        (8, DecodeConfig(splits=3, warpgroups=2)),  # eight warps' rows for three CTAs
        (8, DecodeConfig(splits=8, warpgroups=2)),  # more CTAs than steps
    ],
)
def test_configurations_that_cannot_work_are_refused(m, config):
    assert not tuning.fits(problem(m, 256, 512, 8), config)


@pytest.mark.parametrize(
    ("m", "config"),
    [(256, GemmConfig(tokens=256)), (256, GemmConfig(tokens=64, warpgroups=3)), (64, DecodeConfig(warpgroups=3))],
)
def test_groups_are_refused_registers_that_are_not_there(m, config):
    p = problem(m, 768, 4096, 4)
    assert tuning.fits(p, config) and not tuning.fits(changed(p, **INTEGER), config)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 16, 64, 65, 4096])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (4096, 14336), (57344, 8192)])
def test_the_rule_finds_a_kernel_for_every_shape(bits, m, n, k):
    p = problem(m, n, k, bits)
    for scales in (None, INTEGER, FLOAT, FOLDED, WEIGHT_ONLY) if bits == 4 else (None,):
        p = changed(p, **scales or {})
        config = tuning.rule(p)
        assert isinstance(config, DecodeConfig) == (m <= DECODE_ROWS)
        assert tuning.fits(p, config)


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_every_entry_of_the_table_can_be_built(device):
    table = tuning._table(device)
    assert table
    kinds = {None: {}, "integer": INTEGER, "float": FLOAT, "folded": FOLDED, "weight_only": WEIGHT_ONLY}
    for (bits, groups, n, k), rows in table.items():
        for m, config in rows.items():
            assert config is None or tuning.fits(problem(m, n, k, bits, **kinds[groups]), config)


def test_more_rows_than_were_measured_use_the_rule(monkeypatch):
    p, small = problem(256, 4096, 4096, 4), GemmConfig(tokens=64)
    monkeypatch.setattr(tuning, "_table", lambda device: {(4, None, 4096, 4096): {256: small}})
    choices = {m: tuning.choose(dataclasses.replace(p, m=m), "a GPU") for m in (200, 256, 512, 1024)}
    assert choices[200] == choices[256] == choices[512] == small
    assert choices[1024] == tuning.rule(dataclasses.replace(p, m=1024)) != small


def test_nearly_as_many_channels_use_what_was_measured(monkeypatch):
    near, small = problem(16, 4096, 4352, 4), DecodeConfig(splits=1, warpgroups=1, stages=5)
    table = {(4, None, 4096, 4096): {16: small, 64: None}, (4, None, 4096, 3584): {16: DecodeConfig(splits=2)}}
    monkeypatch.setattr(tuning, "_table", lambda device: table)
    assert tuning.choose(near, "a GPU") == small
    assert tuning.choose(dataclasses.replace(near, k=3712), "a GPU") == DecodeConfig(splits=2)
    others = (dataclasses.replace(near, **change) for change in ({"k": 4864}, {"n": 4224}, {"m": 64}, {"m": 4096}))
    assert all(tuning.choose(p, "a GPU") == tuning.rule(p) for p in others)
    assert tuning.choose(problem(64, 4096, 4096, 4), "a GPU") is None


def test_a_shape_that_no_device_has_measured_uses_the_rule():
    p = problem(16, 320, 1280, 4)
    assert tuning.choose(p, "a GPU of the future") == tuning.choose(p, "NVIDIA H200") == tuning.rule(p)


def test_a_device_without_a_measure_takes_anothers(monkeypatch):
    own, others = DecodeConfig(splits=2), DecodeConfig(splits=3)
    tables = {
        "a GPU": {(4, None, 4096, 4096): {16: own}},
        "b": {},
        "c": {(4, None, 4096, k): {16: others} for k in (4096, 8192)},
    }
    monkeypatch.setattr(tuning, "_table", lambda device: tables.get(device, {}))
    monkeypatch.setattr(tuning, "_devices", lambda: ["b", "c"])
    p = problem(16, 4096, 4096, 4)
    assert tuning.choose(p, "a GPU") == own and tuning.choose(p, "another") == others
    assert tuning.choose(dataclasses.replace(p, k=8192), "a GPU") == others
    assert tuning.choose(dataclasses.replace(p, n=8192), "a GPU") == tuning.rule(dataclasses.replace(p, n=8192))


def test_rows_that_a_table_lacks_are_those_of_a_shape_near_it_or_of_another_device(monkeypatch):
    few, near, others = DecodeConfig(splits=2), GemmConfig(tokens=128), GemmConfig(tokens=192)
    own = {(4, None, 4096, 4352): {16: few}, (4, None, 4096, 4096): {16: DecodeConfig(), 256: near}}
    tables = {
        "a GPU": own,
        "b": {(4, None, 4096, 4352): {16: DecodeConfig(), 256: GemmConfig(tokens=64), 4096: others}},
    }
    monkeypatch.setattr(tuning, "_table", lambda device: tables[device])
    monkeypatch.setattr(tuning, "_devices", lambda: ["b"])
    chosen = [tuning.choose(problem(m, 4096, 4352, 4), "a GPU") for m in (16, 256, 4096)]
    assert chosen == [few, near, others]


def test_devices_with_a_table_are_known():
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        assert tuning.table_file(name).stem in tuning._devices()
    assert all(tuning._table(name) for name in tuning._devices())


needs_hopper = pytest.mark.skipif(hopper_device() is None, reason="needs an NVIDIA GPU of compute capability 9.0")


KINDS = {
    "int8": (8, {}),
    "int4": (4, {}),
    "integer": (4, INTEGER),
    "short": (4, SHORT),
    "float": (4, FLOAT),
    "folded": (4, FOLDED),
    "weight_only": (4, WEIGHT_ONLY),
}


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 13, 64, 1000])
def test_every_configuration_on_the_gpu(kind, m):
    bits, scales = KINDS[kind]
    per_token = kind != "weight_only"
    p = problem(m, 1472, 2560, bits, out_dtype=jnp.dtype("bfloat16"), bias=True, per_token=per_token, **scales)
    arguments = operands(p)
    wanted = expected(p, arguments)
    for config in tuning.candidates(p):
        result = jax.jit(lambda *a, config=config: launch.matmul(p, config, *a))(*arguments)
        assert same(p, result, wanted), config


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (16, 6144, 4096), (64, 4096, 14336), (1024, 4096, 4096), (4096, 4096, 4096)]
)
def test_no_races_in_fifty_runs(kind, m, n, k):
    bits, scales = KINDS[kind]
    p = problem(m, n, k, bits, out_dtype=jnp.dtype("bfloat16"), **scales)
    config = tuning.choose(p, hopper_device()) or tuning.rule(p)
    f = jax.jit(lambda *a: launch.matmul(p, config, *a))
    for seed in range(5):
        arguments = operands(p, seed)
        first = f(*arguments)
        assert same(p, first, expected(p, arguments))
        assert all(bool(jnp.array_equal(f(*arguments), first)) for _ in range(9))
