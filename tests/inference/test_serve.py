import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.checkpoint.hugging_face import load_hf
from fqjax.inference import slots as programs
from fqjax.inference.engine import Engine
from fqjax.inference.generate import generate
from fqjax.inference.requests import Request
from fqjax.inference.serve import serve
from fqjax.runtime.errors import InputError
from tests.inference.test_generate import WithoutPrefill
from tests.models import variants


@pytest.fixture(scope="module", params=["qwen3-window", "opt"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return load_hf(variants.write_checkpoint(directory, variants.VARIANTS[request.param]), jnp.float32)[0]


def requests(count, **settings):
    """Prompts of 1 to 19 tokens, 1 to 12 to append."""
    rng = np.random.default_rng(0)
    lengths, limits = rng.integers(1, 20, count), rng.integers(1, 13, count)
    return [
        Request(
            prompt=rng.integers(3, 64, length).tolist(),
            max_new_tokens=int(limit),
            seed=i,
            name=f"number {i}",
            **settings,
        )
        for i, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def alone(model, request, eos, kv_cache=None):
    """What ``generate`` gives, up to the token that ends it."""
    settings = request.max_new_tokens, request.temperature, request.top_p, request.seed
    tokens = generate(model, request.prompt, *settings, eos_token_id=eos, kv_cache=kv_cache).tolist()
    ends = [i for i, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


def check(model, asked, eos=(), kv_cache=None, **settings):
    finished = list(serve(model, asked, eos_token_id=eos, kv_cache=kv_cache, **settings))
    assert sorted(f.request.name for f in finished) == sorted(r.name for r in asked)
    for f in finished:
        assert f.tokens.tolist() == alone(model, f.request, eos, kv_cache) and f.tokens.dtype == np.int32
        assert f.reason == ("eos" if f.tokens[-1] in eos else "length")
    return finished


@pytest.mark.sample(1)
@pytest.mark.parametrize(("slots", "chunk", "burst"), [(3, 4, 1), (1, 32, 1), (4, 7, 3), (16, 5, 2)])
def test_more_requests_than_slots_each_get_what_they_get_alone(model, slots, chunk, burst):
    finished = check(model, requests(9), slots=slots, chunk=chunk, burst=burst, capacity=32)
    if slots == 3:  # Shorter ones overtake.
        assert [f.request.name for f in finished] != [f"number {i}" for i in range(9)]


@pytest.mark.sample(1)
def test_draws_are_those_of_the_request_alone(model):
    mixed = requests(4, temperature=1.3, top_p=0.9) + requests(8)[4:]
    check(model, mixed, slots=3, chunk=8, capacity=32)


@pytest.mark.thorough
def test_tokens_that_end_a_request_free_its_slot(model):
    asked = requests(8)
    eos = [alone(model, asked[i], [])[0] for i in (0, 3)] + [alone(model, asked[1], [])[-1]]
    finished = check(model, asked, eos, slots=2, chunk=8, burst=2, capacity=32)
    assert "eos" in {f.reason for f in finished}


@pytest.mark.thorough
def test_over_an_int8_cache(model):
    check(model, requests(5), kv_cache="int8", slots=2, chunk=6, capacity=32)


@pytest.mark.thorough
def test_a_model_of_one_s_own(model):
    check(WithoutPrefill(model), requests(3), slots=2, chunk=6, capacity=32)


@pytest.mark.sample(1)
def test_requests_are_read_as_slots_become_free(model):
    read = []

    def arriving():
        for request in requests(6):
            read.append(request.name)
            yield request

    stream = serve(model, arriving(), slots=2, chunk=8, capacity=32, eos_token_id=[])
    assert read == []
    next(stream)
    assert len(read) <= 3
    assert len(list(stream)) == 5


@pytest.mark.sample(1)
def test_functions_are_compiled_once(model):
    functions = programs.take_piece, programs.advance, programs.pick_next
    list(serve(model, requests(2, temperature=1.0), slots=5, chunk=3, capacity=33, eos_token_id=[]))
    before = [f._cache_size() for f in functions]
    list(serve(model, requests(9, temperature=1.0), slots=5, chunk=3, capacity=33, eos_token_id=[]))
    assert [f._cache_size() for f in functions] == before


@pytest.mark.sample(1)
def test_a_prompt_is_taken_up_while_others_decode(model):
    engine = Engine(model, slots=2, chunk=2, capacity=40, eos_token_id=[])
    engine.submit(Request(prompt=[5], max_new_tokens=20))
    engine.step()
    engine.submit(Request(prompt=list(range(3, 23)), max_new_tokens=2))
    short, long = engine.running[0], engine.waiting[0]
    for _ in range(5):
        engine.step()
    # What the sixth step gave is still on its way.
    assert len(short.tokens) == 6 and long.taken_up == 10 and not long.tokens


@pytest.mark.sample(1)
def test_the_cache_is_donated(model):
    engine = Engine(model, slots=2, chunk=4, capacity=16, eos_token_id=[])
    engine.submit(Request(prompt=[5, 6, 7, 8, 9], max_new_tokens=4))
    for _ in range(3):
        before = jax.tree.leaves(engine._cache)
        engine.step()
        assert all(leaf.is_deleted() for leaf in before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [[5], [6]]}, "several prompts"),
        ({"prompt": [64], "max_new_tokens": 3}, "token 64 is not in"),
        ({"prompt": [5] * 30, "max_new_tokens": 3}, "30 tokens and 3 new ones; expected at most 32"),
        ({"prompt": [5], "max_new_tokens": 0}, "max_new_tokens 0"),
        ({"prompt": [5], "max_new_tokens": 3, "top_p": 0.0}, "top_p 0"),
        ({"prompt": [5], "max_new_tokens": 3, "temperature": -1.0}, "temperature -1"),
        ({"prompt": [5], "max_new_tokens": 3, "temperature": 1e-40}, "temperature 1e-40: expected 0, or"),
        ({"prompt": [5], "max_new_tokens": 3, "seed": "one"}, "seed 'one': expected a whole number"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(model, settings, message):
    engine = Engine(model, slots=2, capacity=32)
    with pytest.raises(InputError, match=message):
        engine.submit(Request(**settings))
    assert not engine.busy


@pytest.mark.parametrize("name", ["slots", "capacity", "chunk", "burst"])
def test_settings_out_of_range_are_named(model, name):
    with pytest.raises(InputError, match=f"{name} 0: expected at least"):
        serve(model, [], **{name: 0})
    with pytest.raises(InputError, match=f"{name} 4294967296: expected at most"):
        serve(model, [], **{name: 2**32})


class Failing:
    """Requests of which reading one raises, as often as it is tried."""

    def __init__(self, asked, error):
        self.asked, self.error = iter(asked), error

    def __iter__(self):
        return self

    def __next__(self):
        for request in self.asked:
            return request
        raise self.error


@pytest.mark.sample(1)
def test_bad_requests_end_no_others_and_an_error_of_the_iterable_comes_last(model):
    bad = [Request(prompt=[]), Request(prompt=[64]), Request(prompt=[5], seed=np.arange(2)), "text", None]
    bad += [Request(prompt=[5], max_new_tokens=10**30), Request(prompt=[5], temperature=float("nan"))]
    good = requests(4)
    mixed = [each for pair in zip(bad[:4], good, strict=True) for each in pair] + bad[4:]
    finished = list(serve(model, mixed, slots=2, chunk=32, capacity=32, eos_token_id=[]))
    refused = [f for f in finished if f.reason == "refused"]
    assert [f.request for f in refused] == bad and all(f.error and not f.tokens.size for f in refused)
    answered = {f.request.name: f.tokens.tolist() for f in finished if f.reason == "length"}
    assert {name: len(tokens) for name, tokens in answered.items()} == {r.name: r.max_new_tokens for r in good}
    stream, seen = serve(model, Failing(mixed, OSError("gone")), slots=2, chunk=32, capacity=32, eos_token_id=[]), []
    with pytest.raises(OSError, match="gone"):
        for each in stream:
            seen.append(each)
    assert {f.request.name: f.tokens.tolist() for f in seen if f.reason == "length"} == answered
    assert list(stream) == []


def test_a_seed_that_is_an_array_is_refused(model):
    engine = Engine(model, slots=2, capacity=32)
    for seed in (np.arange(2), np.array([1]), np.array(1), jnp.int32(1), True, None, 1.0):
        with pytest.raises(InputError, match="seed"):
            engine.submit(Request(prompt=[5], max_new_tokens=3, seed=seed))
    assert not engine.busy
