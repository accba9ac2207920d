"""Attention for Hopper GPUs: its instructions one by one in NumPy, against NumPy; and machine code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.attention import api as attention
from pallas_kernels.attention import hopper
from pallas_kernels.attention.hopper import cannot_use
from pallas_kernels.attention.hopper_cut import TILE_POSITIONS, Cut, best_cut
from pallas_kernels.attention.hopper_memory import shared_words
from pallas_kernels.attention.hopper_unit import Unit
from pallas_kernels.attention.problem import Problem
from pallas_kernels.quantize.dispatch import quantize
from pallas_kernels.quantize.kind import Quantization
from tests.kernels import ahead_of_time
from tests.kernels.attention.pages import in_pages
from tests.kernels.attention.test_attention import check, check_codes, operands, recipe
from tests.kernels.numpy_lanes import NumpyLanes

CAPACITY = 12 * TILE_POSITIONS + 5
LENGTHS = (0, 1, TILE_POSITIONS - 1, TILE_POSITIONS, TILE_POSITIONS + 1, 8 * TILE_POSITIONS, CAPACITY - 2, CAPACITY - 1)
CUTS = [Cut(), Cut(units=2), Cut(units=4, splits=2), Cut(splits=3), Cut(warps=8), Cut(warps=16)]
usual = functools.partial(operands, True, lengths=LENGTHS, capacity=CAPACITY)


def in_numpy(arguments, cut, *, scale, window, how=None, pages=None):
    """What the kernel's CTAs find, one after the other: (parts, logarithms) or codes, and the cache."""
    qkv, lengths, rotation, cache = arguments
    p = Problem.of(qkv, rotation, cache, scale, window, cut, pages)
    if how is not None:
        p = p.quantizing(hopper.Recipe(127, *how))
    arrays = [np.array(array) for array in cache]
    table = () if pages is None else (pages,)
    given = [np.array(array) for array in (lengths, *table, qkv, *rotation)]
    recipe = [np.array(array) for array in (how or ())[: 3 if p.extra else 1]]
    parts, channels = (p.batch, p.kv_heads, p.splits, p.group), p.kv_heads * p.group * p.dim
    found = [np.zeros((*parts, p.dim), np.float32), np.zeros(parts, np.float32)]
    if p.splits == 1:
        found = (
            [np.zeros((*parts, p.dim), qkv.dtype)]
            if how is None
            else [np.zeros((p.batch, channels + p.extra), np.int8)]
        )
    with np.errstate(invalid="ignore"):
        for cta in range(p.batch * p.kv_heads * p.splits // cut.units):
            lanes = NumpyLanes(32 * cut.warps * cut.units)
            shared = {name: np.zeros(size * cut.units, np.int32) for name, size in shared_words(p).items()}
            inputs, outputs = [*given, *arrays, *recipe], [*arrays, *found]
            Unit(lanes, p, lanes.constant(cta), inputs, outputs, shared).run()
    return found, tuple(arrays)


def whole(arguments, cut, **kinds):
    """Put together."""
    (out, *sums), cache = in_numpy(arguments, cut, **kinds)
    together = functools.partial(attention._whole, arguments[0].dtype)
    return together(jnp.asarray(out), jnp.asarray(sums[0]) if sums else None), cache


@pytest.mark.sample(2)
@pytest.mark.parametrize("window", [None, 1, 2, TILE_POSITIONS + 3, 1000])
@pytest.mark.parametrize("cut", CUTS)
def test_it_sees_what_is_filled_and_nothing_else(window, cut):
    arguments = usual(heads=8, kv_heads=2, dim=128)
    kinds = {"scale": 0.1, "window": window}
    check(whole(arguments, cut, **kinds), arguments, **kinds)


@pytest.mark.smoke
@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (8, 1, 128), (7, 1, 64), (6, 2, 128)])
def test_heads_in_groups_without_rotation(dtype, heads, kv_heads, dim):
    arguments = usual(heads, kv_heads, dim, dtype=dtype, rotates=False)
    kinds = {"scale": 0.1, "window": None}
    check(whole(arguments, Cut(), **kinds), arguments, **kinds, tolerance=0.02 if dtype == jnp.bfloat16 else 3e-3)


@pytest.mark.sample(1)
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
def test_scales_of_values_may_have_any_size(size):
    """Weights in float16 do not depend on it."""
    qkv, lengths, rotation, (keys, values, key_scales, value_scales) = usual(4, 1, 64)
    arguments = qkv * 0, lengths, rotation, (keys, values, key_scales, value_scales * size)
    out, _ = whole(arguments, Cut(), scale=0.1, window=None)
    long = np.asarray(lengths) > TILE_POSITIONS
    held = [values[b, :n] * np.asarray(value_scales * size)[b, :n, :, None] for b, n in enumerate(np.asarray(lengths))]
    wanted = [v.sum(0) / (len(v) + 1) for v in held]
    for found, w in zip(np.asarray(out, np.float64)[long], np.asarray(wanted)[long], strict=True):
        np.testing.assert_allclose(found, np.repeat(w, 4, axis=0), rtol=0.01, atol=2e-3 * size)


@pytest.mark.sample(1)
@pytest.mark.parametrize("cut", [Cut(), Cut(warps=4, units=2), Cut(warps=8)])
@pytest.mark.parametrize("extra", [0, 128])
def test_codes_are_those_of_the_output(cut, extra):
    arguments, how = usual(8, 2, 128), recipe(1024, False)
    how = (how[0], how[1][:extra], how[2][:extra])
    kinds = {"scale": 0.3, "window": None}
    (codes,), cache = in_numpy(arguments, cut, **kinds, how=how)
    out, _ = whole(arguments, cut, **kinds)
    wanted = quantize(Quantization(name="quantize_attended", qmax=127, per_token=False), "xla")(
        out.reshape(len(out), -1), *how
    )
    check_codes((codes,), wanted)
    check((out, cache), arguments, **kinds)
    assert not extra or np.abs(codes[:, 1024:]).max() > 1


def test_wrong_cuts_are_refused():
    for kinds in ({"warps": 6}, {"units": 3}, {"warps": 8, "units": 4}, {"splits": 0}):
        with pytest.raises(ValueError, match="warps must be 4, 8 or 16"):
            Cut(**kinds)
    qkv, lengths, rotation, cache = operands(True, dim=64, heads=3, kv_heads=3, lengths=(1,), capacity=8)
    with pytest.raises(ValueError, match="3 units do not fill CTAs"):
        hopper.run(qkv, lengths, rotation, cache, scale=1.0, window=None, finish=None, cut=Cut(units=2))


def test_the_cut_fills_the_gpu_in_one_wave():
    for heads in (1, 8, 40, 128, 132, 133, 396, 400, 401, 402, 512, 4096):
        cut = best_cut(heads, 576)
        ctas = heads * cut.splits // cut.units
        assert heads * cut.splits % cut.units == 0
        assert ctas <= 132 * (3 if cut.warps * cut.units == 4 else 1) or heads > 396
    assert best_cut(8, 576) == Cut(splits=5, warps=8) and best_cut(8, 4096).splits == 16
    assert best_cut(128, 576) == Cut(warps=8) and best_cut(512, 576) == Cut(warps=4, units=4)


@pytest.mark.parametrize(
    ("codes", "change", "message"),
    [
        (True, {"dim": 256}, "head_dim is 256"),
        (True, {"heads": 20}, "10 heads share"),
        (True, {"dtype": jnp.float32}, "qkv is float32"),
        (False, {}, "keys are bfloat16, not int8"),
    ],
)
def test_what_it_cannot_take_is_named(codes, change, message):
    qkv, lengths, _, (keys, values, *scales) = operands(codes, **{"dim": 64, "lengths": (1,), "capacity": 8} | change)
    assert message in cannot_use(qkv, keys, values)
    with pytest.raises(NotImplementedError, match="implementation 'mosaic' cannot take"):
        attention.decode_attention(qkv, keys, values, lengths, *scales, implementation="mosaic")


def test_the_kernel_for_any_gpu_takes_what_this_one_cannot(monkeypatch):
    """And this one does not need what the other does."""
    monkeypatch.setattr(device, "capability", lambda: (9, 0))
    monkeypatch.setattr(device, "hopper_device", lambda: "some Hopper GPU")
    used = []
    monkeypatch.setattr(device, "say", lambda name, shape, choice, why: used.append((choice, why)))

    def called(dim, **kinds):
        qkv, lengths, _, (keys, values, *scales) = operands(True, dim=dim, lengths=(1,), capacity=8, **kinds)
        attention.decode_attention(qkv, keys, values, lengths, *scales)
        return used[-1]

    assert called(64) == ("mosaic", "")
    choice, why = called(256)
    assert choice == "triton" and "head_dim is 256" in why
    choice, why = called(256, dtype=jnp.float32)
    assert choice == "xla" and "qkv is float32" in why
    monkeypatch.setattr(device, "has_triton", lambda: False)
    assert called(64)[0] == "mosaic" and called(256)[0] == "xla"


@pytest.mark.smoke
@pytest.mark.sample(2)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_it_lowers_for_cuda(cut, quantizes, paged):
    (qkv, lengths, rotation, cache), pages = operands(True, 8, 4, 128, lengths=(1, 2), capacity=48), None
    if paged:
        _, (qkv, lengths, rotation, cache), pages = in_pages((qkv, lengths, rotation, cache), 16)
    how = hopper.Recipe(127, *recipe(1024, False)) if quantizes else None
    kinds = {
        "scale": 0.1,
        "window": 9,
        "cut": cut,
        "recipe": how,
        "finish": lambda out, sums: (out, sums),
        "pages": pages,
    }
    f = jax.jit(lambda qkv, lengths, rotation, cache: hopper.run(qkv, lengths, rotation, cache, **kinds))
    text = f.trace(qkv, lengths, rotation, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "output_operand_alias" in text


@pytest.mark.thorough
@pytest.mark.skipif(not ahead_of_time.HAS_PLUGIN, reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "window"),
    [
        (1, 32, 8, 128, None),
        (16, 32, 8, 128, None),
        (64, 32, 8, 128, None),
        (30, 56, 56, 128, 4096),
        (3, 7, 1, 64, None),
    ],
)
def test_it_compiles_for_a_hopper_gpu_in_place(
    monkeypatch, capfd, batch, heads, kv_heads, dim, window, quantizes, paged
):
    """Without a spilled register, and without a copy of the cache."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def shaped(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = (64 * batch + 1, 64) if paged else (batch, 4096)
    cache = [shaped(*rows, kv_heads, dim, dtype=jnp.int8)] * 2
    cache += [shaped(*rows, kv_heads, dtype=jnp.float32)] * 2
    table = shaped(batch, 64, dtype=jnp.int32) if paged else None
    qkv = shaped(batch, heads + 2 * kv_heads, dim, dtype=jnp.bfloat16)
    lengths, angles = shaped(batch, dtype=jnp.int32), shaped(batch, dim // 2, dtype=jnp.float32)
    how = recipe(heads * dim, False) if quantizes else None

    def f(cache, qkv, lengths, cos, sin, *table):
        recipe = hopper.Recipe(127, *how) if how else None
        kinds = {"scale": 0.1, "window": window, "recipe": recipe, "pages": table[0] if table else None}
        return hopper.run(qkv, lengths, (cos, sin), cache, **kinds, finish=lambda out, sums: (out, sums))

    compiled = ahead_of_time.compile_for_h200(
        f, tuple(cache), qkv, lengths, angles, angles, *([table] if paged else []), donate=0
    )
    compiled = compiled.as_text()
    assert "decode_attention" in compiled
    assert not [line for line in compiled.splitlines() if " copy(" in line and f"s8[{rows[0]},{rows[1]}" in line]
    spilled = ahead_of_time.spilled_bytes(capfd.readouterr().out)
    assert spilled and not any(map(max, spilled))
