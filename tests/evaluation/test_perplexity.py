import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.checkpoint.hugging_face import load_hf
from fqjax.data.text import cut_windows
from fqjax.evaluation.perplexity import perplexity
from fqjax.runtime.errors import InputError
from tests.models import variants


def test_windows_begin_with_bos_and_an_incomplete_last_one_is_dropped():
    assert cut_windows(np.arange(10, 21), 4, 1).tolist() == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]
    assert cut_windows(np.arange(10, 21), 4, 1, 2).shape == (2, 4)
    assert cut_windows(np.arange(10, 21), 4, 1, 99).shape == (3, 4)


@pytest.mark.parametrize(("window", "windows", "message"), [(20, None, "at least 19"), (1, None, "2"), (4, 0, "1")])
def test_windows_that_cannot_be_cut_are_named(window, windows, message):
    with pytest.raises(InputError, match=message):
        cut_windows(np.arange(11), window, 1, windows)


class Bigram(nnx.Module):
    """Logits by a table: its perplexity can be worked out by hand."""

    def __init__(self):
        self.table = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(7, 7)), jnp.float32))

    def __call__(self, tokens):
        return self.table[...][tokens]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_perplexity_follows_the_protocol(batch_size):
    model, ids = Bigram(), np.random.default_rng(1).integers(0, 7, 53)
    table = np.asarray(model.table[...], np.float64)
    log_p = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    losses = []
    for start in range(0, 50, 5):
        window = [1, *ids[start : start + 5]]
        losses += [-log_p[a, b] for a, b in itertools.pairwise(window)]
    expected = math.exp(np.mean(losses))
    assert perplexity(model, ids, 6, bos_token_id=1, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("scale", "message"), [(1e4, "nats a token"), (math.nan, "not finite"), (math.inf, "not finite")]
)
def test_a_perplexity_that_is_no_number_is_refused(scale, message):
    model = Bigram()
    model.table[...] = -scale * jnp.eye(7)  # The same token never comes again, it says; here it always does.
    with pytest.raises(InputError, match=message):
        perplexity(model, np.ones(53, np.int32), 4, bos_token_id=1)


def test_only_so_many_windows():
    model, ids = Bigram(), np.random.default_rng(1).integers(0, 7, 53)
    assert perplexity(model, ids, 6, windows=2, bos_token_id=1) == pytest.approx(
        perplexity(model, ids[:10], 6, bos_token_id=1)
    )


def test_a_model_without_bos_needs_one_named():
    with pytest.raises(InputError, match="bos_token_id"):
        perplexity(Bigram(), np.zeros(50, int), 6)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_without_windows_is_refused(batch_size):
    with pytest.raises(InputError, match=f"batch_size {batch_size}: expected at least 1"):
        perplexity(Bigram(), np.zeros(50, int), 6, bos_token_id=1, batch_size=batch_size)


def test_a_token_that_int32_cannot_hold_is_refused():
    with pytest.raises(InputError, match="token 4294967297: expected a token id"):
        perplexity(Bigram(), np.full(50, 2**32 + 1), 6, bos_token_id=1)


def test_what_does_not_fit_the_model_is_named(tmp_path):
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS["opt"]), jnp.float32)
    with pytest.raises(InputError, match="65 tokens.*64 positions"):
        perplexity(model, np.zeros(200, int), 65)
    with pytest.raises(InputError, match="token 64 is not in the model's vocabulary of 64"):
        perplexity(model, np.full(200, 64), 16)


def test_an_int8_cache_costs_little_and_something(tmp_path):
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS["llama-grouped"]), jnp.float32)
    ids = np.random.default_rng(0).integers(3, 64, 200)
    plain, rounded = (perplexity(model, ids, 24, kv_cache=kind) for kind in (None, "int8"))
    assert plain != rounded == pytest.approx(plain, rel=0.02)
    with pytest.raises(InputError, match="kv_cache 'fp8': expected int8"):
        perplexity(model, ids, 24, kv_cache="fp8")
    with pytest.raises(InputError, match="call does not take cache_dtype"):
        perplexity(Bigram(), ids % 7, 6, bos_token_id=1, kv_cache="int8")
