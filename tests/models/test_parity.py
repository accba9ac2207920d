"""The models compute what transformers' torch models compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.checkpoint.hugging_face import load_hf
from tests.models import variants
from tests.tiers import thorough_but

TOLERANCE = 1e-4
ONE_OF_EACH_FAMILY = (
    "llama-grouped",
    "mistral-window",
    "qwen2-window",
    "qwen3-window",
    "mixtral-window",
    "qwen3-moe-mlp-only",
    "opt-350m",
)


@pytest.fixture(scope="module")
def recorded():
    with np.load(variants.RECORDED) as file:
        return dict(file)


def logits_of(directory, tokens):
    model, _ = load_hf(directory, jnp.float32)
    return np.asarray(jax.jit(lambda x: model(x))(tokens))


@pytest.mark.parametrize("name", thorough_but(ONE_OF_EACH_FAMILY, variants.VARIANTS))
def test_logits_equal_the_recorded_ones(name, recorded, tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS[name])
    assert np.abs(recorded[name]).max() > 0.5
    np.testing.assert_allclose(logits_of(directory, variants.tokens()), recorded[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", thorough_but(ONE_OF_EACH_FAMILY, variants.VARIANTS))
def test_extending_a_cache_gives_the_recorded_logits(name, recorded, tmp_path):
    """Prompts of different lengths, then one token at a time."""
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS[name]), jnp.float32)
    tokens, extend = variants.tokens(), jax.jit(lambda *args: model.extend(*args))
    counts = np.array([9, 5], np.int32)
    prompt = np.where(np.arange(10) < counts[:, None], tokens[:, :10], 0)
    logits, cache = extend(prompt, model.make_cache(2, 20), counts)
    for _ in range(6):
        for row in range(2):
            np.testing.assert_allclose(logits[row], recorded[name][row, counts[row] - 1], rtol=0, atol=TOLERANCE)
        logits, cache = extend(tokens[np.arange(2), counts][:, None], cache, np.ones(2, np.int32))
        counts = counts + 1
    np.testing.assert_array_equal(cache.lengths, counts)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["llama-grouped", "qwen3-window", "mixtral-window", "opt-350m"])
def test_pieces_of_a_prompt_give_the_recorded_logits(name, recorded, tmp_path):
    """An empty cache filled without being read, then by pieces; a row that has ended takes none of the last."""
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS[name]), jnp.float32)
    tokens, cache = variants.tokens(), model.make_cache(2, 24)
    for step, counts in ((model.prefill, (8, 8)), (model.extend, (8, 5)), (model.extend, (3, 0))):
        before = cache.lengths
        piece = tokens[np.arange(2)[:, None], np.asarray(before)[:, None] + np.arange(8)]
        logits, cache = step(piece, cache, np.array(counts, np.int32))
        np.testing.assert_array_equal(cache.lengths, before + np.array(counts))
        for row in np.flatnonzero(counts):
            at = cache.lengths[row] - 1
            np.testing.assert_allclose(logits[row], recorded[name][row, at], rtol=0, atol=TOLERANCE)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["llama-grouped", "qwen3-window", "opt"])
def test_an_int8_cache_gives_the_logits_that_are_evaluated(name, tmp_path):
    """Token by token over the cache, and all at once with keys and values rounded."""
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS[name]), jnp.float32)
    tokens, extend = variants.tokens(), jax.jit(lambda *args: model.extend(*args))
    together = jax.jit(lambda tokens: model(tokens, cache_dtype=jnp.int8))(tokens)
    plain = variants.logits(model)
    assert 0 < np.abs(together - plain).max() < 0.2
    cache, found = model.make_cache(2, 24, jnp.int8), []
    for i in range(24):
        logits, cache = extend(tokens[:, i : i + 1], cache, np.ones(2, np.int32))
        found.append(logits)
    # Where a value lies within rounding of a half, its code may be the one or the other.
    difference = np.abs(np.stack(found, axis=1) - together)
    assert np.median(difference) < TOLERANCE and difference.max() < 0.2 * np.abs(together - plain).max()


@pytest.mark.thorough
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_torch_still_gives_the_recorded_logits(name, recorded, tmp_path):
    pytest.importorskip("torch", reason="needs torch, which only the 'parity' extra installs")
    from scripts.record_parity_logits import torch_logits

    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS[name])
    np.testing.assert_allclose(torch_logits(directory, variants.tokens()), recorded[name], rtol=0, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["stories260k", "novels-llama", "novels-opt", "novels-mixtral"])
def test_real_checkpoints_equal_torch(name, shared):
    pytest.importorskip("torch", reason="needs torch, which only the 'parity' extra installs")
    from scripts.record_parity_logits import torch_logits

    directory = shared / "models" / name
    tokens = np.random.default_rng(0).integers(3, 500, (2, 100)).astype(np.int32)
    np.testing.assert_allclose(logits_of(directory, tokens), torch_logits(directory, tokens), rtol=0, atol=TOLERANCE)
