"""Decoding attention over pages: every implementation gives the bits that it gives over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.attention import hopper
from pallas_kernels.attention.api import decode_attention, quantized_decode_attention
from pallas_kernels.attention.codes import Recipe
from pallas_kernels.attention.hopper_cut import TILE_POSITIONS
from pallas_kernels.attention.problem import Cut
from pallas_kernels.attention.reference import decode_attention as reference
from tests.kernels import ahead_of_time
from tests.kernels.attention.pages import check_pages, in_pages
from tests.kernels.attention.test_attention import (
    BLOCK,
    KERNELS,
    decode,
    finite,
    needs_gpu,
    operands,
    recipe,
    run,
)
from tests.kernels.attention.test_hopper import in_numpy, usual, whole


@pytest.mark.sample(2)
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("window", [None, BLOCK + 3])
@pytest.mark.parametrize("page", [16, BLOCK, 3])
@pytest.mark.parametrize("cut", [Cut(splits=1), Cut(splits=3), Cut(splits=3, block=32, integers=True)])
def test_the_kernel_for_any_gpu_and_xla(codes, window, page, cut):
    rows, pools, table = in_pages(operands(codes), page)
    kinds = {"scale": 0.3, "window": window, "cut": cut, "interpret": True}
    check_pages(run(*pools, pages=table, **kinds), run(*rows, **kinds), table, rows[1])
    kinds = {"scale": 0.3, "window": window}
    found = reference(*finite(pools), pages=table, **kinds)
    check_pages(found, reference(*finite(rows), **kinds), table, rows[1])


@pytest.mark.sample(1)
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_the_kernel_for_any_gpu_quantizes(codes, splits):
    """By itself with one program a head; otherwise what it hands on is the same."""
    rows, pools, table = in_pages(operands(codes, heads=16, kv_heads=2), 16)
    how = Recipe(127, *recipe(256, False))
    kinds = {"scale": 0.3, "window": None, "cut": Cut(splits=splits), "interpret": True, "recipe": how}
    kinds["finish"] = lambda out, sums: (out, sums)
    check_pages(run(*pools, pages=table, **kinds), run(*rows, **kinds), table, rows[1])


@pytest.mark.sample(2)
@pytest.mark.parametrize("window", [None, TILE_POSITIONS + 3])
@pytest.mark.parametrize("page", [TILE_POSITIONS, 3 * TILE_POSITIONS, 4 * TILE_POSITIONS])
@pytest.mark.parametrize("cut", [hopper.Cut(), hopper.Cut(splits=3), hopper.Cut(units=4), hopper.Cut(warps=8)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (7, 1, 128)])
def test_the_kernel_for_hopper_gpus(window, page, cut, heads, kv_heads, dim):
    rows, pools, table = in_pages(usual(heads, kv_heads, dim), page)
    kinds = {"scale": 0.1, "window": window}
    check_pages(whole(pools, cut, pages=table, **kinds), whole(rows, cut, **kinds), table, rows[1])


@pytest.mark.sample(1)
@pytest.mark.parametrize("cut", [hopper.Cut(), hopper.Cut(warps=4, units=2)])
@pytest.mark.parametrize("extra", [0, 128])
def test_the_kernel_for_hopper_gpus_quantizes(cut, extra):
    rows, pools, table = in_pages(usual(8, 2, 128), 4 * TILE_POSITIONS)
    multiplier, source, part = recipe(1024, False)
    kinds = {"scale": 0.3, "window": None, "how": (multiplier, source[:extra], part[:extra])}
    check_pages(in_numpy(pools, cut, pages=table, **kinds), in_numpy(rows, cut, **kinds), table, rows[1])


def test_a_full_cache_loses_its_last_token():
    """In the last page, as in a row; and sequences may share pages that are full."""
    rows, pools, table = in_pages(operands(True, 4, 2, 64, lengths=(64, 63, 48), capacity=64), 16)
    table = table.at[2, 0].set(table[0, 0])
    rows = (*rows[:3], tuple(array.at[2, :16].set(array[0, :16]) for array in rows[3]))
    lengths = jnp.minimum(rows[1], 63)
    kinds = {"scale": 0.1, "window": None}
    check_pages(whole(pools, hopper.Cut(), pages=table, **kinds), whole(rows, hopper.Cut(), **kinds), table, lengths)
    check_pages(reference(*finite(pools), pages=table, **kinds), reference(*finite(rows), **kinds), table, lengths)
    kinds["interpret"] = True
    check_pages(run(*pools, pages=table, **kinds), run(*rows, **kinds), table, lengths)


@pytest.mark.sample(1)
@pytest.mark.parametrize("codes", [False, True])
def test_the_entry_points(codes):
    rows, pools, table = (finite(each) if type(each) is tuple else each for each in in_pages(operands(codes), 16))
    check_pages(decode(pools, pages=table), decode(rows), table, rows[1])
    check_pages(quantized(pools, table), quantized(rows, None), table, rows[1])


def quantized(operands, pages, **kinds):
    """Codes by the entry point, and the cache."""
    qkv, lengths, rotation, (keys, values, *scales) = operands
    how = recipe((qkv.shape[1] - 2 * keys.shape[2]) * qkv.shape[2], False)
    kinds |= {"qmax": 127, "rotation": rotation, "pages": pages}
    codes, _, cache = quantized_decode_attention(qkv, keys, values, lengths, *(scales or (None, None)), *how, **kinds)
    return codes, cache


def test_wrong_tables_and_pools_are_named():
    _, pools, table = in_pages(operands(True), 16)
    for wrong in (table[:1], table.astype(jnp.float32), table[:, 0], table[:, :0]):
        with pytest.raises(ValueError, match=r"pages must be int32 \(9, n\) with n of 1 or more, got"):
            decode(pools, pages=wrong)
    for pool in (lambda array: array[:0], lambda array: array[:, :0], lambda array: array[:, :, :0]):
        wrong = (*pools[:3], tuple(map(pool, pools[3])))
        with pytest.raises(ValueError, match=r"keys \(pages, page_size, kv_heads, dim\) do not fit together"):
            decode(wrong, pages=table)


@pytest.mark.parametrize("page", [8, 24])
def test_pages_that_split_a_tile_are_left_to_the_other_kernel(monkeypatch, page):
    _, (qkv, lengths, _, (keys, values, *scales)), table = in_pages(usual(heads=8, kv_heads=2, dim=64), page)
    monkeypatch.setattr(device, "capability", lambda: (9, 0))
    monkeypatch.setattr(device, "hopper_device", lambda: "some Hopper GPU")
    used = []
    monkeypatch.setattr(device, "say", lambda name, shape, choice, why: used.append((choice, why)))
    arguments, why = (qkv, keys, values, lengths, *scales), f"pages hold {page} positions, not a multiple of 16"
    decode_attention(*arguments, pages=table)
    assert used == [("triton", why)]
    with pytest.raises(NotImplementedError, match=f"'mosaic' cannot take qkv .*: {why}"):
        decode_attention(*arguments, pages=table, implementation="mosaic")


XLA = [pytest.param(codes, "xla", marks=needs_gpu["triton"]) for codes in (False, True)]


@pytest.mark.gpu
@pytest.mark.parametrize(("codes", "implementation"), [*KERNELS, *XLA])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "window"),
    [(1, 8, 2, None), (5, 8, 2, 100), (64, 8, 2, None), (64, 32, 8, None), (9, 7, 1, 100), (130, 8, 8, None)],
)
@pytest.mark.parametrize("quantizes", [False, True])
def test_on_a_gpu(codes, implementation, page, batch, heads, kv_heads, window, quantizes):
    lengths = np.random.default_rng(2).integers(0, 700, batch)
    lengths[::4] = lengths[::4] // page * page  # The new token begins a page.
    given = operands(codes, heads, kv_heads, 128, lengths=tuple(lengths.tolist()), capacity=704)
    rows, pools, table = in_pages(given, page)
    if implementation == "xla":
        rows, pools = finite(rows), finite(pools)
    attend = functools.partial(quantized if quantizes else decode_pages, window=window, implementation=implementation)
    check_pages(jax.jit(attend)(pools, table), jax.jit(attend)(rows, None), table, rows[1])


def decode_pages(operands, pages, **kinds):
    """The output by the entry point, and the cache."""
    return decode(operands, pages=pages, **kinds)


@pytest.mark.thorough
@pytest.mark.skipif(not ahead_of_time.HAS_PLUGIN, reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "window"),
    [(1, 32, 8, 128, None), (64, 32, 8, 128, None), (64, 32, 32, 64, 4096), (400, 16, 1, 256, None)],
)
def test_the_kernel_for_any_gpu_compiles_in_place(codes, batch, heads, kv_heads, dim, window):
    """Without a copy of the cache; the kernel for Hopper GPUs is compiled where it is over rows."""

    def shaped(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    pool = (16 * batch + 1, 64, kv_heads)
    cache = [shaped(*pool, dim, dtype=jnp.int8 if codes else jnp.bfloat16)] * 2
    cache += [shaped(*pool, dtype=jnp.float32)] * 2 if codes else []
    qkv = shaped(batch, heads + 2 * kv_heads, dim, dtype=jnp.bfloat16)
    lengths, angles = shaped(batch, dtype=jnp.int32), shaped(batch, dim // 2, dtype=jnp.float32)

    def f(cache, qkv, lengths, cos, sin, table):
        return run(qkv, lengths, (cos, sin), cache, scale=0.1, window=window, pages=table)

    table = shaped(batch, 16, dtype=jnp.int32)
    compiled = ahead_of_time.compile_for_h200(f, tuple(cache), qkv, lengths, angles, angles, table, donate=0).as_text()
    assert "decode_attention" in compiled
    held = f"{'s8' if codes else 'bf16'}[{pool[0]},64", f"{'s8' if codes else 'bf16'}[1,{pool[0] * 64}"
    assert not [line for line in compiled.splitlines() if " copy(" in line and any(name in line for name in held)]
