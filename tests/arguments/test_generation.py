"""Malformed prompts and settings of generation."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fqjax
from fqjax.inference.engine import Engine
from fqjax.inference.requests import Request
from fqjax.inference.serve import serve
from fqjax.methods import IntegerScale
from fqjax.runtime.errors import InputError
from tests.arguments.values import (
    SHORT_TEXT,
    Anything,
    X,
    few,
    fractions,
    junk,
    large,
    no_count,
    no_whole,
    not_finite,
    refused,
    short,
)
from tests.inference.test_generate import WithoutPrefill


@few
@given(value=no_count)
@pytest.mark.parametrize("name", ["max_new_tokens", "prefill_chunk"])
def test_counts_of_generation(llama, name, value):
    refused(name, fqjax.generate, llama, [5], **{"max_new_tokens": 2, name: value})


@few
@given(value=no_whole)
def test_seeds_of_generation(llama, value):
    refused("seed", fqjax.generate, llama, [5], 2, seed=value)


@few
@given(value=st.one_of(junk, not_finite, st.floats(max_value=-1e-300), st.floats(1e31, 1e300), st.floats(1e-300, 1e-7)))
def test_temperatures(llama, value):
    refused("temperature", fqjax.generate, llama, [5], 2, temperature=value)


@few
@given(value=st.one_of(junk, not_finite, st.floats(max_value=0.0), st.floats(1.0, exclude_min=True)))
def test_nuclei(llama, value):
    refused("top_p", fqjax.generate, llama, [5], 2, top_p=value)


@few
@given(
    value=st.one_of(
        SHORT_TEXT.filter(bool), fractions, st.sampled_from([[None], ["1"], [1.5], 3j, object(), [[1]]]), large
    )
)
def test_tokens_that_end_a_text(llama, value):
    refused("eos_token_id", fqjax.generate, llama, [5], 2, eos_token_id=value)


def test_small_whole_numbers_of_numpy_do_not_overflow(llama, mlp):
    ids = np.arange(300, dtype=np.int8) % 64
    wanted = fqjax.perplexity(llama, ids, 64, windows=3, batch_size=2, bos_token_id=1)
    small = {"windows": np.uint8(3), "batch_size": np.int8(2), "bos_token_id": np.int8(1)}
    assert fqjax.perplexity(llama, ids, np.int8(64), **small) == wanted
    (batch, *_) = fqjax.calibration_batches(ids, llama.config, samples=np.int8(2), window=np.int8(64))
    assert batch.shape == (2, 64)
    found = fqjax.calibrate(mlp, [X] * 50, ["layers.0"], sample_rows=np.uint8(255))
    assert found["layers.0"].samples.shape == (150, 4)
    assert fqjax.Scheme("small", "", IntegerScale(amplifier=np.int16(64)), sample_rows=np.uint8(9)).sample_rows == 9
    refused("amplifier=3: expected a power", fqjax.integer_scales, mlp, np.int8(3))
    engine = Engine(WithoutPrefill(llama), slots=np.int8(1), capacity=np.int8(127), chunk=np.int8(100))
    request = Request(prompt=[5] * 60, max_new_tokens=np.int8(100))
    refused("request: 60 tokens and 100 new ones", engine.submit, request)
    settings = {"temperature": np.float16(0.5), "top_p": np.float16(0.5), "seed": np.uint8(255)}
    drawn = fqjax.generate(llama, np.full(63, 5, np.int8), np.int8(1), **settings, prefill_chunk=np.int8(64))
    np.testing.assert_array_equal(drawn, fqjax.generate(llama, [5] * 63, 1, 0.5, 0.5, 255))


MASKED = np.ma.masked_greater(np.full((2, 8), 5), 8)


def test_masks_are_not_lost(llama, mlp):
    for data in ([MASKED], [(MASKED,)], [{"x": MASKED}], [list(MASKED)]):
        refused("calibration: batch 0: a masked array", fqjax.quantize, mlp, "w8a8", data)
    refused("calibration: batch 0: a masked array", fqjax.quantize, llama, "w8a8", [MASKED])
    for prompt in (MASKED, MASKED[0], [MASKED[0], [3]]):
        refused("prompt: a masked array", fqjax.generate, llama, prompt, 2)
    refused("token_ids: a masked array", fqjax.perplexity, llama, MASKED[0], 4)
    refused("eos_token_id: a masked array", fqjax.generate, llama, [5], 2, eos_token_id=MASKED[0])


@pytest.mark.parametrize("token", [2**31, -(2**31), 2**63 - 1, -(2**63), np.uint64(2**64 - 1)], ids=str)
def test_tokens_that_32_bits_do_not_hold(llama, token):
    """Of a model that does not say what its vocabulary is, too."""
    refused(f"token {token}", fqjax.generate, WithoutPrefill(llama), [[5], [token]], 2)
    refused(f"token {token}", fqjax.perplexity, Anything(), np.array([token] * 16), 4, bos_token_id=1)
    refused(f"eos_token_id {token}", fqjax.generate, llama, [5], 2, eos_token_id=token)


@pytest.mark.parametrize("end", [np.array(7), jnp.array(7), np.array([7]), np.int8(7), (np.uint8(7),)], ids=short)
def test_arrays_of_tokens_that_end_a_text(llama, end):
    found = fqjax.generate(llama, [5], 2, eos_token_id=end)
    np.testing.assert_array_equal(found, fqjax.generate(llama, [5], 2, eos_token_id=[7]))


@pytest.mark.parametrize("end", [np.array(7.0), np.array("7"), np.array([[7]]), jnp.zeros(2)], ids=short)
def test_arrays_that_are_no_tokens_that_end_a_text(llama, end):
    refused("eos_token_id", fqjax.generate, llama, [5], 2, eos_token_id=end)


BAD_PROMPTS = [
    None,
    3,
    "text",
    b"text",
    [],
    [[]],
    [[1], []],
    [1.5],
    [[1], 2],
    [None],
    ["a"],
    [[["a"]]],
    {1: 2},
    {1, 2},
    3j,
]


BAD_PROMPTS += [
    np.array(3),
    np.zeros((0,), int),
    np.zeros((1, 0), int),
    np.zeros((1, 1, 1), int),
    np.ones(2),
    [10**400],
]


BAD_PROMPTS += [
    [64],
    [-1],
    [10**30],
    np.array([[1, 64]]),
    jnp.array(3),
    object(),
    iter([1]),
    [object()],
    [[1], "a"],
    [1, [2]],
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=short)
def test_prompts(llama, prompt):
    with pytest.raises(InputError, match=r"^(prompt|token)") as caught:
        fqjax.generate(llama, prompt, 2)
    assert "\n" not in str(caught.value)
    request = Request(prompt=prompt, max_new_tokens=2)
    (finished,) = serve(llama, [request], slots=1, capacity=8, chunk=4)
    assert finished.request is request and finished.reason == "refused" and not finished.tokens.size
    assert finished.error and "\n" not in finished.error


def test_no_more_tokens_than_the_model_has_positions(llama):
    for count in (64, 10**6, 10**9):
        refused("positions", fqjax.generate, llama, [5], count)
        refused("positions", Engine(llama, slots=1, capacity=2**10).submit, Request(prompt=[5] * 60, max_new_tokens=5))


def test_a_cache_larger_than_the_memory_is_refused_before_it_is_made(llama):
    refused("max_new_tokens 1000000000: a cache", fqjax.generate, WithoutPrefill(llama), [[5]] * 64, 10**9)
    refused("slots 64, capacity 1000000000: a cache", Engine, WithoutPrefill(llama), slots=64, capacity=10**9)
