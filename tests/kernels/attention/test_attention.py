"""Decoding attention: the kernel in interpret mode, and XLA, against NumPy; and machine code for a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import api as attention
from pallas_kernels.attention import triton as attention_kernel
from pallas_kernels.attention.api import decode_attention, quantized_decode_attention
from pallas_kernels.attention.codes import Recipe
from pallas_kernels.attention.problem import MANY_HEADS, WHOLE_HEADS, Cut, best_cut
from pallas_kernels.attention.reference import decode_attention as reference
from pallas_kernels.attention.triton import cannot_use
from pallas_kernels.device import NO_GPU, capability
from pallas_kernels.quantize.dispatch import quantize
from pallas_kernels.quantize.kind import Quantization
from tests.kernels import ahead_of_time

BLOCK = Cut().block
CAPACITY = 3 * BLOCK + 5
LENGTHS = (0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, CAPACITY - 2, CAPACITY - 1)


def operands(codes, heads=4, kv_heads=2, dim=16, lengths=LENGTHS, capacity=CAPACITY, dtype=jnp.bfloat16, rotates=True):
    """Projections of new tokens, lengths, a rotation, and a cache that behind the lengths holds what must not be read."""
    rng = np.random.default_rng(0)
    shape = (len(lengths), capacity, kv_heads, dim)
    behind = np.arange(capacity) >= np.array(lengths)[:, None]
    if codes:
        scales = [rng.uniform(0.005, 0.02, shape[:3]).astype(np.float32) for _ in range(2)]
        scales = tuple(jnp.asarray(np.where(behind[..., None], np.nan, s)) for s in scales)
        cache = (*(jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for _ in range(2)), *scales)
    else:
        cache = [rng.normal(size=shape) for _ in range(2)]
        cache = tuple(jnp.asarray(np.where(behind[..., None, None], np.nan, x), dtype) for x in cache)
    qkv = jnp.asarray(rng.normal(size=(len(lengths), heads + 2 * kv_heads, dim)), dtype)
    angles = rng.uniform(0, 6, (len(lengths), dim // 2))
    rotation = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)) if rotates else ()
    return qkv, jnp.asarray(lengths, jnp.int32), rotation, cache


def appended(qkv, lengths, rotation, cache):
    """Queries in float64, and the cache with the new tokens, codes as (codes, scale)."""
    kv_heads, capacity = cache[0].shape[2], cache[0].shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    x = np.asarray(qkv, np.float64)
    if rotation:
        cos, sin = (np.asarray(part, np.float64)[:, None] for part in rotation)
        turned = x[:, : heads + kv_heads]
        first, second = np.split(turned, 2, axis=-1)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        x = np.concatenate([turned, x[:, heads + kv_heads :]], axis=1)
    x = np.array(jnp.asarray(x, qkv.dtype), np.float64)
    q, new = x[:, :heads], [x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]]
    held = [np.asarray(array, np.float64) for array in cache[:2]]
    if len(cache) > 2:
        held = [codes * np.asarray(scales)[..., None] for codes, scales in zip(held, cache[2:], strict=True)]
        sizes = [np.maximum(np.abs(entry).max(-1, keepdims=True), 1e-8) / 127 for entry in new]
        new = [np.rint(entry / size) * size for entry, size in zip(new, sizes, strict=True)]
    for array, entry in zip(held, new, strict=True):
        array[np.arange(len(q)), np.minimum(np.asarray(lengths), capacity - 1)] = entry
    return q, held


def expected(qkv, lengths, rotation, cache, *, scale, window):
    """One query at a time, in float64."""
    q, (keys, values) = appended(qkv, lengths, rotation, cache)
    out = np.zeros(q.shape)
    for b, h in np.ndindex(q.shape[:2]):
        length, shared = int(lengths[b]) + 1, h // (q.shape[1] // keys.shape[2])
        seen = slice(max(0, length - window) if window else 0, length)
        scores = keys[b, seen, shared] @ q[b, h] * scale
        weights = np.exp(scores - scores.max())
        out[b, h] = weights @ values[b, seen, shared] / weights.sum()
    return out


def check(found, operands, *, scale, window, tolerance=0.02):
    """The result, and that the cache holds the new tokens and what it held."""
    out, cache = found
    wanted = expected(*operands, scale=scale, window=window)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=tolerance, atol=tolerance)
    _, held = appended(*operands)
    arrays = [np.asarray(array, np.float64) for array in cache[:2]]
    if len(cache) > 2:
        arrays = [codes * np.asarray(scales)[..., None] for codes, scales in zip(arrays, cache[2:], strict=True)]
    for found_array, wanted_array in zip(arrays, held, strict=True):
        filled = np.arange(wanted_array.shape[1]) <= np.asarray(operands[1])[:, None]
        # A code may be another where a value lies within rounding of a half.
        np.testing.assert_allclose(found_array[filled], wanted_array[filled], rtol=0.02, atol=0.04)


def run(qkv, *rest, finish=None, **kinds):
    """The kernel, by default with what puts its parts together for :func:`decode_attention`."""
    finish = finish or functools.partial(attention._whole, qkv.dtype)
    return attention_kernel.run(qkv, *rest, finish=finish, **kinds)


def finite(operands):
    """For XLA, which multiplies what it does not see with zero."""
    *rest, cache = operands
    return *rest, tuple(jnp.nan_to_num(x) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in cache)


def decode(operands, **kinds):
    """Through the entry point."""
    qkv, lengths, rotation, (keys, values, *scales) = operands
    return decode_attention(qkv, keys, values, lengths, *scales, rotation=rotation or None, **kinds)


@pytest.mark.smoke
@pytest.mark.sample(2)
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, BLOCK, BLOCK + 3, 1000])
@pytest.mark.parametrize("cut", [Cut(splits=1), Cut(splits=3), Cut(splits=7), Cut(splits=3, block=32, integers=True)])
def test_the_kernel_sees_what_is_filled_and_nothing_else(codes, window, cut):
    arguments, kinds = operands(codes), {"scale": 0.3, "window": window}
    check(run(*arguments, cut=cut, interpret=True, **kinds), arguments, **kinds)
    check(reference(*finite(arguments), **kinds), arguments, **kinds)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 1), (6, 2), (20, 1)])
def test_heads_in_groups_without_rotation(heads, kv_heads):
    arguments = operands(True, heads, kv_heads, dim=32, lengths=(70, 3), capacity=128, rotates=False)
    kinds = {"scale": 0.2, "window": None}
    check(run(*arguments, interpret=True, **kinds), arguments, **kinds)
    check(reference(*finite(arguments), **kinds), arguments, **kinds)


@pytest.mark.parametrize("codes", [False, True])
def test_xla_is_exact_in_float32(codes):
    arguments = operands(codes, dtype=jnp.float32)
    check(decode(finite(arguments), window=5), arguments, scale=0.25, window=5, tolerance=1e-5)


def test_integer_queries_lose_nothing_that_shows():
    """Scores by two codes of a query are those of float32 but for the query's 15 bits."""
    arguments, kinds = operands(True, dtype=jnp.float16), {"scale": 0.3, "window": None}
    check(run(*arguments, cut=Cut(integers=True), interpret=True, **kinds), arguments, **kinds, tolerance=2e-3)


def test_many_sequences_take_one_warp_each():
    """And integers over codes; where one warp cannot hold what a program finds, the usual cut stays."""
    assert best_cut(MANY_HEADS, 4, 128, True) == Cut(block=32, warps=1, integers=True)
    assert best_cut(MANY_HEADS, 4, 16, True) == best_cut(MANY_HEADS, 4, 128, False) == Cut(block=32, warps=1)
    assert best_cut(MANY_HEADS - 1, 4, 128, False) == Cut(warps=2)
    whole = functools.partial(best_cut, group=4, dim=128, codes=True, whole=True)
    assert (
        whole(WHOLE_HEADS).splits == 1
        and whole(WHOLE_HEADS - 1) == Cut()
        and whole(MANY_HEADS) == best_cut(MANY_HEADS, 4, 128, True)
    )
    for heads, group, dim, codes in (
        (MANY_HEADS - 1, 4, 128, True),
        (MANY_HEADS, 17, 128, True),
        (MANY_HEADS, 4, 256, False),
    ):
        assert best_cut(heads, group, dim, codes) == Cut()


def test_a_capacity_below_a_block():
    arguments, kinds = operands(False, lengths=(0, 7, 8), capacity=9), {"scale": 0.25, "window": None}
    check(run(*arguments, interpret=True, **kinds), arguments, **kinds)


def test_a_full_cache_loses_its_last_token():
    arguments = operands(False, lengths=(9, 8), capacity=9)
    for _, cache in (
        run(*arguments, scale=1.0, window=None, interpret=True),
        reference(*arguments, scale=1.0, window=None),
    ):
        _, held = appended(*arguments)
        np.testing.assert_allclose(np.asarray(cache[0], np.float64), held[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 80}, "head_dim is 80"),
        ({"dtype": jnp.float32}, "qkv is float32"),
        ({"heads": 130, "kv_heads": 1}, "130 heads"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change, message):
    qkv, _, _, cache = operands(False, lengths=(1, 2), capacity=8, **change)
    assert message in cannot_use(qkv, *cache)
    qkv, _, _, cache = operands(True, lengths=(1, 2), capacity=8)
    assert cannot_use(qkv, *cache[:2]) is None


def test_wrong_operands_are_named():
    qkv, lengths, rotation, (keys, values, *scales) = operands(True)
    for arguments, message in (
        ((qkv[:, :7], keys, values, lengths, *scales), "do not fit together"),
        ((qkv[:, :4], keys, values, lengths, *scales), "do not fit together"),
        ((qkv, keys, values[:, 1:], lengths, *scales), "need values of that shape"),
        ((qkv, keys, values, lengths), "int8 codes and scales come together"),
        ((qkv, keys, values, lengths, scales[0][:, 1:], scales[1]), "key_scales must be"),
        ((qkv, keys, keys.astype(jnp.bfloat16), lengths, scales[0], None), "expected one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*arguments)
    with pytest.raises(ValueError, match="rotation must be two arrays"):
        decode_attention(qkv, keys, values, lengths, *scales, rotation=(rotation[0], rotation[1][:, 1:]))
    with pytest.raises(ValueError, match="64 channels need multiplier"):
        quantized_decode_attention(
            qkv, keys, values, lengths, *scales, jnp.ones(63), lengths[:0], lengths[:0], qmax=127
        )
    if capability() < (8, 0):
        with pytest.raises(NotImplementedError, match="compute capability 8.0"):
            decode_attention(qkv, keys, values, lengths, *scales, implementation="triton")


def quantized(operands, recipe, per_token, **kinds):
    """Through the entry point: the real values that codes stand for, and the cache."""
    qkv, lengths, rotation, (keys, values, *scales) = operands
    scales, rotation = (scales or (None, None)), rotation or None
    kinds |= {"qmax": 127, "per_token": per_token, "rotation": rotation}
    codes, scale, cache = quantized_decode_attention(qkv, keys, values, lengths, *scales, *recipe, **kinds)
    multiplier, source, _ = recipe
    real = np.asarray(codes[:, : len(multiplier)], np.float64)
    for e, channel in enumerate(np.asarray(source)):
        real[:, channel] += np.asarray(codes[:, len(multiplier) + e], np.float64)
    return real * (1 if scale is None else np.asarray(scale)[:, None]) / np.asarray(multiplier), cache


def recipe(channels, per_token):
    """Multipliers of different sizes; with fixed scales what is 3.5 fills a code, and two in the first 128 channels."""
    multiplier = np.tile(np.float32([1, 2]), channels // 2) * (1 if per_token else 18)
    multiplier[:128] *= 1 if per_token else 2
    source = jnp.arange(0 if per_token else 128, dtype=jnp.int32)
    return jnp.asarray(multiplier), source, jnp.ones_like(source)


def check_codes(found, wanted):
    """Codes, and scales if rows have them, of an output that was rounded to bfloat16 in between, or was not."""
    (codes, *scales), (wanted_codes, *wanted_scales) = found, wanted
    np.testing.assert_allclose(np.asarray(codes, np.int32), np.asarray(wanted_codes, np.int32), rtol=0, atol=1)
    for scale, wanted_scale in zip(scales, wanted_scales, strict=True):
        np.testing.assert_allclose(scale, wanted_scale, rtol=0.005)


@pytest.mark.sample(1)
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_quantized_output_stands_for_the_output(codes, per_token, splits):
    """By the entry point, on the CPU, and by the kernel's parts; a code is worth 1 / 18 at most, outputs reach about 3.5."""
    arguments, kinds = operands(codes, heads=16, kv_heads=2), {"scale": 0.3, "window": None}
    how = recipe(256, per_token)
    kind = Quantization(name="quantize_attended", qmax=127, per_token=per_token)
    finish = functools.partial(attention._quantized, kind, Recipe(127, *how), None)
    found, cache = quantized(finite(arguments), how, per_token, scale=0.3)
    check((found.reshape(-1, 16, 16), cache), arguments, **kinds, tolerance=0.04)
    given = None if per_token else Recipe(127, *how)
    by_parts, _ = run(*arguments, **kinds, cut=Cut(splits=splits), interpret=True, finish=finish, recipe=given)
    whole, _ = run(*arguments, **kinds, cut=Cut(splits=splits), interpret=True)
    wanted = quantize(kind, "xla")(whole.reshape(len(whole), -1), *how)
    check_codes(by_parts, wanted)
    assert per_token or not codes or np.abs(np.asarray(wanted[0][:, 256:])).max() > 1


@pytest.mark.parametrize(("capacity", "splits"), [(1024, 1), (1152, 2)])
def test_one_program_quantizes_what_it_finds_whole_in_a_short_cache(monkeypatch, capacity, splits):
    arguments = operands(True, heads=32, kv_heads=8, dim=16, lengths=(3,) * 14, capacity=capacity)
    seen = []
    monkeypatch.setattr(attention_kernel, "_call", lambda p, interpret: seen.append(p) or _stop())
    for how in (None, Recipe(127, *recipe(512, False))):
        with pytest.raises(StopIteration):
            run(*arguments, scale=0.3, window=None, finish=None, recipe=how)
    assert [p.splits for p in seen] == [2, splits] and [p.qmax for p in seen] == [0, 127 if splits == 1 else 0]


def _stop():
    raise StopIteration


needs_gpu = {
    "triton": pytest.mark.skipif(capability() < (8, 0), reason=NO_GPU),
    "mosaic": pytest.mark.skipif(capability() != (9, 0), reason="needs a Hopper GPU"),
}
KERNELS = [
    pytest.param(codes, name, marks=needs_gpu[name])
    for codes, name in ((False, "triton"), (True, "triton"), (True, "mosaic"))
]


@pytest.mark.gpu
@pytest.mark.parametrize(("codes", "implementation"), KERNELS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("batch", "capacity"), [(1, 2048), (5, 2048), (16, 576), (49, 2048), (70, 2048)])
def test_the_compiled_kernels_quantize_their_output(codes, implementation, per_token, batch, capacity):
    """Of some sequences the new token is the first: what comes out is its value, large enough for extra channels."""
    lengths = tuple(np.random.default_rng(0).integers(0, capacity, batch) * (np.arange(batch) % 3 > 0))
    arguments, how = operands(codes, 32, 8, 128, lengths=lengths, capacity=capacity), recipe(4096, per_token)
    f = jax.jit(
        functools.partial(quantized_decode_attention, qmax=127, per_token=per_token, implementation=implementation)
    )
    qkv, held, rotation, (keys, values, *scales) = arguments
    found = f(qkv, keys, values, held, *(scales or (None, None)), *how, rotation=rotation)
    out, _ = decode(arguments, implementation=implementation)
    kind = Quantization(name="quantize_attended", qmax=127, per_token=per_token)
    wanted = quantize(kind, "xla")(out.reshape(batch, -1), *how)
    check_codes(found[: 1 + per_token], wanted)
    assert per_token or np.abs(np.asarray(wanted[0][:, 4096:])).max() > 1


@pytest.mark.gpu
@pytest.mark.parametrize(("codes", "implementation"), KERNELS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotates"),
    [(32, 8, 128, True), (8, 8, 64, False), (7, 1, 128, True), (16, 1, 256, True)],
)
def test_the_compiled_kernel_is_right(codes, implementation, window, heads, kv_heads, dim, rotates):
    if implementation == "mosaic" and dim == 256:
        pytest.skip("the kernel for Hopper GPUs has no heads of that size")
    arguments = operands(codes, heads, kv_heads, dim, lengths=(0, 1, 64, 700, 2047), capacity=2048, rotates=rotates)
    found = jax.jit(lambda arguments: decode(arguments, window=window, implementation=implementation))(arguments)
    check(found, arguments, scale=dim**-0.5, window=window)


@pytest.mark.thorough
@pytest.mark.skipif(not ahead_of_time.HAS_PLUGIN, reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "window"),
    [(1, 32, 8, 128, None), (64, 32, 8, 128, None), (64, 32, 32, 64, 4096), (400, 16, 1, 256, None)],
)
def test_it_compiles_for_a_hopper_gpu(codes, batch, heads, kv_heads, dim, window):
    def shaped(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = [shaped(batch, 4096, kv_heads, dim, dtype=jnp.int8 if codes else jnp.bfloat16)] * 2
    cache += [shaped(batch, 4096, kv_heads, dtype=jnp.float32)] * 2 if codes else []
    qkv = shaped(batch, heads + 2 * kv_heads, dim, dtype=jnp.bfloat16)
    lengths, angles = shaped(batch, dtype=jnp.int32), shaped(batch, dim // 2, dtype=jnp.float32)

    def f(qkv, lengths, cos, sin, *cache):
        return run(qkv, lengths, (cos, sin), cache, scale=0.1, window=window)

    compiled = ahead_of_time.compile_for_h200(f, qkv, lengths, angles, angles, *cache)
    assert "decode_attention" in compiled.as_text()
