import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.inference import programs
from fqjax.inference.generate import generate, stream
from fqjax.inference.programs import Decoding, decode
from fqjax.inference.sampling import Kinds
from fqjax.inference.settings import Draws, ends_array, sampling_of
from fqjax.layers.flattened import Structure
from fqjax.models.llama import Llama, LlamaConfig
from fqjax.runtime.errors import InputError
from tests.kernels import ahead_of_time
from tests.models import variants


@pytest.fixture(scope="module", params=["llama-grouped", "opt"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return load_hf(variants.write_checkpoint(directory, variants.VARIANTS[request.param]), jnp.float32)[0]


PROMPTS = [[5, 9, 11], [7], [20, 30, 40, 50, 60, 10, 12]]


def greedy_by_hand(model, prompt, count):
    forward = nnx.jit(lambda model, tokens: model(tokens)[0])
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)  # One shape to compile; what follows a token does not reach its logits.
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(forward(model, padded)[len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.sample(1)
def test_greedy_takes_the_likeliest_token_each_time(model):
    new = generate(model, PROMPTS[0], 8, eos_token_id=[])
    assert new.shape == (8,) and new.dtype == np.int32
    assert new.tolist() == greedy_by_hand(model, PROMPTS[0], 8)


@pytest.mark.sample(1)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_each_prompt_what_it_gives_alone(model, temperature):
    together = generate(model, PROMPTS, 6, temperature, 0.9, seed=5, eos_token_id=[])
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt, 6, temperature, 0.9, seed=5 + i, eos_token_id=[])
        assert together[i].tolist() == alone.tolist()


@pytest.mark.sample(1)
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
def test_prompts_taken_up_in_pieces_are_continued_alike(model, kv_cache, chunk):
    whole = generate(model, PROMPTS, 6, eos_token_id=[], kv_cache=kv_cache)
    pieces = generate(model, PROMPTS, 6, eos_token_id=[], kv_cache=kv_cache, prefill_chunk=chunk)
    assert pieces.tolist() == whole.tolist()


class WithoutPrefill(nnx.Module):
    """What a model of one's own must have, and no more."""

    def __init__(self, model):
        self.model = model

    def extend(self, tokens, cache, counts):
        return self.model.extend(tokens, cache, counts)

    def make_cache(self, batch, capacity):
        return self.model.make_cache(batch, capacity)


@pytest.mark.sample(1)
def test_a_model_needs_extend_and_make_cache_alone(model):
    own = WithoutPrefill(model)
    assert generate(own, PROMPTS, 5).tolist() == generate(model, PROMPTS, 5, eos_token_id=[]).tolist()
    with pytest.raises(InputError, match="make_cache does not take dtype"):
        generate(own, PROMPTS, 5, kv_cache="int8")


@pytest.mark.sample(1)
def test_seeds_decide_the_draws(model):
    draws = [generate(model, PROMPTS[0], 12, 1.5, seed=seed, eos_token_id=[]).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_small_nucleus_is_greedy(model):
    greedy = generate(model, PROMPTS[2], 6, eos_token_id=[])
    assert generate(model, PROMPTS[2], 6, 1.0, 1e-6, eos_token_id=[]).tolist() == greedy.tolist()


@pytest.mark.sample(1)
def test_a_sequence_ends_at_eos_and_repeats_it(model):
    free = generate(model, PROMPTS, 8, eos_token_id=[]).tolist()
    eos = free[0][3]
    ended = generate(model, PROMPTS, 8, eos_token_id=eos).tolist()
    for row, plain in zip(ended, free, strict=True):
        cut = plain.index(eos) + 1 if eos in plain else len(plain)
        assert row == plain[:cut] + [eos] * (len(plain) - cut)


@pytest.mark.sample(1)
def test_generation_stops_early_when_all_have_ended(model):
    eos = generate(model, PROMPTS[0], 1, eos_token_id=[])[0]
    assert generate(model, PROMPTS[0], 50, eos_token_id=int(eos)).tolist() == [eos] * 50


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", [-1, -(10**30), 2**32, 2**64 + 3, np.int64(-5)])
def test_any_whole_number_is_a_seed_and_counts_modulo_2_to_the_32(model, seed):
    settings = {"max_new_tokens": 6, "temperature": 3.0, "eos_token_id": []}
    drawn = generate(model, PROMPTS[0], seed=seed, **settings)
    np.testing.assert_array_equal(drawn, generate(model, PROMPTS[0], seed=int(seed) % 2**32, **settings))


@pytest.mark.sample(1)
def test_rows_of_a_batch_are_drawn_with_seeds_that_wrap_around(model):
    settings = {"max_new_tokens": 6, "temperature": 3.0, "eos_token_id": []}
    both = generate(model, [PROMPTS[0], PROMPTS[0]], seed=2**32 - 1, **settings)
    np.testing.assert_array_equal(both[1], generate(model, PROMPTS[0], seed=0, **settings))


@pytest.mark.sample(1)
def test_arrays_of_prompts_are_taken(model):
    rows = np.array([[5, 9, 11], [8, 8, 8]])
    assert generate(model, jnp.asarray(rows), 3).shape == (2, 3)


@pytest.mark.thorough
def test_a_quantized_model_generates(model):
    batch = np.random.default_rng(0).integers(3, 64, (4, 32)).astype(np.int32)
    quantized, _ = fqjax.quantize(model, "flattenquant", [batch])
    new = generate(quantized, PROMPTS[0], 5, eos_token_id=[])
    assert new.tolist() == greedy_by_hand(quantized, PROMPTS[0], 5)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "empty"),
        ([[1], []], {}, "empty"),
        ("text", {}, "token ids"),
        ([1.5], {}, "integer"),
        ([64], {"max_new_tokens": 4}, "token 64 is not in"),
        ([-1], {"max_new_tokens": 4}, "token -1 is not in"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([1], {"temperature": -1.0}, "temperature -1"),
        ([1], {"max_new_tokens": 2**31}, "max_new_tokens 2147483648: expected at most"),
        ([1], {"max_new_tokens": 10**30}, "max_new_tokens 1000000000000000000000000000000: expected at most"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens 2.5: expected a whole number"),
        ([1], {"max_new_tokens": 4, "seed": 0.5}, "seed 0.5: expected a whole number"),
        ([1], {"max_new_tokens": 4, "eos_token_id": 2**31}, "eos_token_id 2147483648: expected a token id"),
        ([1], {"temperature": float("nan")}, "temperature nan"),
        ([1], {"temperature": float("inf")}, "temperature inf"),
        ([1], {"temperature": 1e-40}, "temperature 1e-40: expected 0, or a finite number of at least 1e-06"),
        ([1], {"top_p": float("nan")}, "top_p nan"),
        ([1], {"top_p": 0.0}, "top_p 0"),
        ([1], {"top_p": 1.5}, "top_p 1.5"),
        ([1], {"top_k": -1}, "top_k -1: expected at least 0"),
        ([1], {"top_k": 0.5}, "top_k 0.5: expected a whole number"),
        ([1], {"min_p": 1.5}, "min_p 1.5: expected a number from 0 to 1"),
        ([1], {"min_p": float("nan")}, "min_p nan"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty 0.0: expected a number from 1e-06"),
        ([1], {"repetition_penalty": float("inf")}, "repetition_penalty inf"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk 0"),
        ([1], {"max_new_tokens": 4, "kv_cache": "int4"}, "kv_cache 'int4': expected int8"),
    ],
)
def test_bad_requests_are_named(model, prompt, settings, message):
    with pytest.raises(InputError, match=message):
        generate(model, prompt, **settings)


@pytest.mark.sample(1)
@pytest.mark.parametrize("burst", [1, 3])
def test_a_stream_gives_the_same_tokens_as_they_come(model, burst):
    settings = {"max_new_tokens": 7, "temperature": 1.0, "seed": 3}
    whole = generate(model, PROMPTS, eos_token_id=[], **settings)
    columns = list(stream(model, PROMPTS, eos_token_id=[], burst=burst, **settings))
    np.testing.assert_array_equal(np.stack(columns, axis=1), whole)
    eos = int(whole[0][4])
    alone = list(stream(model, PROMPTS[0], eos_token_id=eos, burst=burst, **settings))
    assert alone == whole[0][: whole[0].tolist().index(eos) + 1].tolist() and type(alone[0]) is int
    with pytest.raises(InputError, match="burst 0"):
        stream(model, PROMPTS, burst=0)


@pytest.mark.sample(1)
def test_more_tokens_than_a_burst_are_those_of_one_burst(model, monkeypatch):
    whole = generate(model, PROMPTS, 11, eos_token_id=[])
    monkeypatch.setattr("fqjax.inference.generate.BURST", 3)
    np.testing.assert_array_equal(generate(model, PROMPTS, 11, eos_token_id=[]), whole)


@pytest.mark.sample(1)
def test_a_penalty_keeps_tokens_from_being_repeated(model):
    new = generate(model, PROMPTS, 8, repetition_penalty=1e6, eos_token_id=[])
    for prompt, row in zip(PROMPTS, new.tolist(), strict=True):
        assert len({*prompt, *row}) == len(set(prompt)) + 8


@pytest.mark.sample(1)
def test_a_second_call_compiles_nothing_and_takes_new_weights(model):
    generate(model, PROMPTS, 5, 1.0, 0.5, eos_token_id=[])
    functions = programs.prefill, programs.begin, programs.decode
    before = [function._cache_size() for function in functions]
    first = generate(model, PROMPTS, 6, 0.7, 0.8, seed=4, eos_token_id=[3, 5], top_k=4, min_p=0.01)
    assert [function._cache_size() for function in functions] == before
    changed = nnx.clone(model)
    nnx.update(changed, jax.tree.map(lambda leaf: leaf[::-1] if leaf.ndim else leaf, nnx.state(changed)))
    assert generate(changed, PROMPTS, 6, 0.7, 0.8, seed=4, eos_token_id=[3, 5]).tolist() != first.tolist()
    assert [function._cache_size() for function in functions] == before


@pytest.mark.sample(1)
def test_logits_that_are_not_finite_are_an_error(model):
    broken = nnx.clone(model)
    nnx.update(broken, jax.tree.map(lambda leaf: leaf * np.nan, nnx.state(broken)))
    for give in (generate, lambda *arguments: list(stream(*arguments))):
        with pytest.raises(InputError, match="its logits are not finite"):
            give(broken, PROMPTS[0], 4)


def test_learned_positions_set_a_limit(tmp_path):
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS["opt"]), jnp.float32)
    assert generate(model, [3] * 60, 4, eos_token_id=[]).shape == (4,)
    with pytest.raises(InputError, match="65 tokens is longer than the 64 positions"):
        generate(model, [3] * 60, 5)


@pytest.mark.skipif(not ahead_of_time.HAS_PLUGIN, reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("dtype", [None, jnp.int8])
def test_the_loop_moves_no_cache_on_a_hopper_gpu(dtype, monkeypatch):
    """Compiled for one: entries are written in place, and the kernel reads the cache as it lies."""
    monkeypatch.setattr("pallas_kernels.device.capability", lambda: (9, 0))
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 4096}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(nnx.state(model))
    structure = Structure(nnx.graphdef(model), tree)
    row, sampling, eos = jax.ShapeDtypeStruct((4,), jnp.int32), sampling_of([Draws()] * 4), ends_array((2,))
    cache = jax.eval_shape(lambda: model.make_cache(4, 2048, dtype))
    start = Decoding(cache, row, row.update(shape=()), row.update(dtype=bool), None)
    held, state_tree = jax.tree.flatten(start)

    def loop(*arrays):
        state = jax.tree.unflatten(state_tree, arrays[: len(held)])
        return decode.__wrapped__(structure, arrays[len(held) :], state, sampling, np.int32(100), eos, 100, Kinds())

    text = ahead_of_time.compile_for_h200(loop, *held, *leaves).as_text()
    inside, outside = text.split("ENTRY ")  # The caches are not donated here, and so copied once before the loop.
    moved = re.compile(r"= \w+\[4,2048,2,64\]\S* (copy|transpose|convert)\(")
    assert "custom-call" in inside and not moved.search(inside) and len(moved.findall(outside)) == 4
