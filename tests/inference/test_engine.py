import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.checkpoint.hugging_face import load_hf
from fqjax.inference import slots as programs
from fqjax.inference.engine import Engine, QueueFull
from fqjax.inference.generate import generate
from fqjax.inference.requests import Request
from fqjax.models import cache
from fqjax.runtime.errors import InputError
from tests.models import variants


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return load_hf(variants.write_checkpoint(directory, variants.VARIANTS["llama-grouped"]), jnp.float32)[0]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr("fqjax.inference.memory.PAGE", 4)


def engine_of(model, **settings):
    return Engine(model, **{"slots": 3, "capacity": 32, "chunk": 8, "eos_token_id": []} | settings)


def run(engine, steps=1000):
    """Everything handed out, by ticket: the tokens as they came, and how it ended."""
    tokens, finished = {}, {}
    for _ in range(steps):
        if not engine.busy:
            break
        for output in engine.step():
            tokens.setdefault(output.ticket, []).extend(output.tokens)
            if output.finished is not None:
                assert output.finished.tokens.tolist() == tokens[output.ticket]
                finished[output.ticket] = output.finished
    return finished


def alone(model, request):
    settings = request.max_new_tokens, request.temperature, request.top_p, request.seed
    rest = {"top_k": request.top_k, "min_p": request.min_p, "repetition_penalty": request.repetition_penalty}
    return generate(model, request.prompt, *settings, [], **rest).tolist()


def prompt_of(seed, length):
    return np.random.default_rng(seed).integers(3, 64, length).tolist()


def test_tokens_come_as_they_are_made(model):
    engine = engine_of(model)
    ticket = engine.submit(Request(prompt=[5, 6], max_new_tokens=5))
    steps = []
    while engine.busy:
        steps += [(output.tokens, output.finished is not None) for output in engine.step() if output.ticket == ticket]
    assert [token for tokens, _ in steps for token in tokens] == alone(model, Request(prompt=[5, 6], max_new_tokens=5))
    assert len(steps) >= 4 and [ended for _, ended in steps] == [False] * (len(steps) - 1) + [True]


def test_requests_wait_for_memory_and_get_what_they_get_alone(model):
    engine = engine_of(model, slots=4, tokens=40)
    assert engine.tokens_in_all == 40
    asked = {engine.submit(r): r for r in (Request(prompt=prompt_of(i, 9 + i), max_new_tokens=8) for i in range(6))}
    at_once, finished = 0, {}
    while engine.busy:
        finished |= {output.ticket: output.finished for output in engine.step() if output.finished}
        at_once = max(at_once, sum(running is not None for running in engine.running))
        assert engine.tokens_held <= 40
    assert at_once == 2  # Of 17 to 22 tokens each.
    for ticket, request in asked.items():
        assert finished[ticket].tokens.tolist() == alone(model, request)
    with pytest.raises(InputError, match="expected at most 32"):
        engine.submit(Request(prompt=prompt_of(0, 30), max_new_tokens=8))
    with pytest.raises(InputError, match="expected at most 12"):
        engine_of(model, tokens=12).submit(Request(prompt=prompt_of(0, 9), max_new_tokens=4))


@pytest.mark.sample(1)
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_prompts_that_begin_alike_share_pages(model, kv_cache):
    engine, begin = engine_of(model, slots=2, kv_cache=kv_cache), prompt_of(0, 11)
    requests = [Request(prompt=[*begin, *prompt_of(i, i)], max_new_tokens=6) for i in range(1, 5)]
    first = engine.submit(requests[0])
    assert run(engine)[first].reason == "length" and engine.tokens_held == 0
    tickets = [engine.submit(request) for request in requests[1:]]
    engine.step()
    one, other = engine.running
    assert one.pages[:2] == other.pages[:2] and one.pages[2] != other.pages[2]
    finished = run(engine)
    for ticket, request in zip(tickets, requests[1:], strict=True):
        tokens = generate(model, request.prompt, 6, eos_token_id=[], kv_cache=kv_cache)
        assert finished[ticket].tokens.tolist() == tokens.tolist()
    apart = engine_of(model, slots=2, kv_cache=kv_cache, shares_prefixes=False)
    tickets = [apart.submit(request) for request in requests]
    assert [run(apart)[ticket].reason for ticket in tickets[:1]] == ["length"]


def test_all_slots_can_be_full_unless_less_memory_is_asked_for(model):
    engine = engine_of(model, slots=3, capacity=9)  # Of which the last page is not full.
    for i in range(3):
        engine.submit(Request(prompt=prompt_of(i, 3), max_new_tokens=6))
    engine.step()
    assert all(engine.running) and len(run(engine)) == 3


def test_what_is_cancelled_ends_and_changes_nobody_else(model):
    engine = engine_of(model)
    requests = [Request(prompt=prompt_of(i, 3 + 4 * i), max_new_tokens=12) for i in range(5)]
    tickets = [engine.submit(request) for request in requests]
    seen = {}
    for step in range(3):
        for output in engine.step():
            seen.setdefault(output.ticket, []).extend(output.tokens)
        if step == 0:
            engine.cancel(tickets[4])  # It waits.
            engine.cancel(tickets[2])  # Its prompt is being taken up.
    engine.cancel(tickets[0])  # It decodes.
    engine.cancel(tickets[0])
    engine.cancel(10**6)
    outputs = [output for _ in range(60) if engine.busy for output in engine.step()]
    finished = {output.ticket: output.finished for output in outputs if output.finished}
    assert finished[tickets[0]].reason == "cancelled"
    assert finished[tickets[0]].tokens.tolist() == alone(model, requests[0])[: len(finished[tickets[0]].tokens)]
    assert seen[tickets[0]] == finished[tickets[0]].tokens.tolist()
    for ticket in (1, 3):
        assert finished[tickets[ticket]].tokens.tolist() == alone(model, requests[ticket])
    assert engine.tokens_held == 0 and not engine.busy


def test_time_that_is_over_ends_a_request(model):
    engine = engine_of(model, slots=1)
    long, waits = (engine.submit(Request(prompt=[5], max_new_tokens=30, deadline=seconds)) for seconds in (60, 0.01))
    engine.step()
    time.sleep(0.02)
    finished = run(engine)
    assert finished[waits].reason == "deadline" and not len(finished[waits].tokens)
    assert finished[long].reason == "length" and len(finished[long].tokens) == 30
    with pytest.raises(InputError, match="deadline 0: expected seconds above 0"):
        engine.submit(Request(prompt=[5], deadline=0))


def test_a_full_queue_refuses(model):
    engine = engine_of(model, slots=1, queue=1)
    engine.submit(Request(prompt=[5], max_new_tokens=3))
    second = engine.submit(Request(prompt=[5], max_new_tokens=3))
    with pytest.raises(QueueFull, match="2 wait already; expected at most 1 in the queue"):
        engine.submit(Request(prompt=[5], max_new_tokens=3))
    engine.step()
    with pytest.raises(QueueFull):
        engine.submit(Request(prompt=[5], max_new_tokens=3)), engine.submit(Request(prompt=[5], max_new_tokens=3))
    assert run(engine)[second].reason == "length"


def test_each_request_is_drawn_by_its_own_settings(model):
    engine = engine_of(model, slots=6)
    settings = [
        {},
        {"temperature": 1.5, "top_k": 3, "seed": 5},
        {"temperature": 1.5, "min_p": 0.2, "seed": -1},
        {"temperature": 2.0, "top_p": 0.7, "repetition_penalty": 1.8},
        {"repetition_penalty": 1e6},
        {},
    ]
    requests = [Request(prompt=prompt_of(i, 5), max_new_tokens=10, **each) for i, each in enumerate(settings)]
    tickets = [engine.submit(request) for request in requests]
    finished = run(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        assert finished[ticket].tokens.tolist() == alone(model, request)


def test_logarithms_of_probabilities_are_the_model_s(model):
    engine, prompt = engine_of(model, burst=2), prompt_of(3, 6)
    wanted = engine.submit(Request(prompt=prompt, max_new_tokens=5, logprobs=3, temperature=1.0))
    plain = engine.submit(Request(prompt=prompt, max_new_tokens=4))
    tokens, found = [], []
    while engine.busy:
        for output in engine.step():
            if output.ticket == plain:
                assert output.logprobs is None
            elif output.tokens:
                tokens += output.tokens
                found += output.logprobs
    logits = np.asarray(model(jnp.asarray([[*prompt, *tokens]])))[0, len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert len(found) == len(tokens) == 5
    for row, token, each in zip(expected, tokens, found, strict=True):
        np.testing.assert_allclose(each.logprob, row[token], rtol=1e-4, atol=1e-4)
        assert [t for t, _ in each.top] == np.argsort(-row, kind="stable")[:3].tolist()
        np.testing.assert_allclose([value for _, value in each.top], np.sort(row)[::-1][:3], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="logprobs 21: expected at most 20"):
        engine.submit(Request(prompt=prompt, logprobs=21))
    assert wanted


def test_logits_that_are_not_finite_end_their_request_alone(model):
    """A token's embedding is NaN: what begins with it fails, and the others go on."""
    broken = nnx.clone(model)
    broken.embed_tokens.embedding.set_value(broken.embed_tokens.embedding[...].at[50].set(jnp.nan))
    if model.config.tie_word_embeddings:
        pytest.skip("the head would be NaN, too")
    engine = engine_of(broken)
    bad, good = (engine.submit(Request(prompt=[token], max_new_tokens=4)) for token in (50, 5))
    finished = run(engine)
    assert finished[bad].reason == "error" and "not finite" in finished[bad].error and not len(finished[bad].tokens)
    assert finished[good].tokens.tolist() == alone(model, Request(prompt=[5], max_new_tokens=4))


@pytest.mark.parametrize("committed", [False, True])
def test_what_is_warm_compiles_nothing_when_requests_come(model, committed):
    if committed:  # As what is loaded from an fqjax checkpoint.
        model = nnx.clone(model)
        nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    engine = engine_of(model, slots=5, capacity=31, chunk=16)
    said = []
    engine.warm_up(said.append)
    functions = (
        programs.take_piece,
        programs.begin,
        programs.decode,
        programs.advance,
        programs.pick_next,
        programs.release,
    )
    before = [function._cache_size() for function in functions]
    tickets = [engine.submit(Request(prompt=prompt_of(i, 1 + 3 * i), max_new_tokens=4)) for i in range(9)]
    engine.cancel(tickets[4])
    assert len(run(engine)) == 9
    assert [function._cache_size() for function in functions] == before
    assert said[0].startswith("prompts, 1 x") and said[-1] == "decoding, 5 slots"


def test_programs_that_hold_small_arrays_give_the_same_tokens(model):
    # The last two together are drawn by :func:`advance`, and the first goes on alone by :func:`decode`.
    requests = [Request(prompt=prompt_of(i, 3 + i), max_new_tokens=9 - 3 * i, temperature=0.4 * i) for i in range(3)]
    answers = []
    for holds in (False, True):
        engine = engine_of(model)
        engine._steps = programs.Steps.of(engine._model, holds)
        tickets = [engine.submit(request) for request in requests]
        finished = run(engine)
        answers.append([finished[ticket].tokens.tolist() for ticket in tickets])
    assert answers[0] == answers[1] and list(map(len, answers[0])) == [9, 6, 3]


def test_layers_share_arrays_of_pages_as_far_as_kernels_take_them(model, monkeypatch):
    request = Request(prompt=prompt_of(1, 9), max_new_tokens=5)
    answers, sizes = [], []
    for most in (cache.MOST_ELEMENTS, 1):
        monkeypatch.setattr(cache, "MOST_ELEMENTS", most)
        engine = engine_of(model)
        ticket = engine.submit(request)
        sizes.append(len(engine._cache.layers))
        answers.append(run(engine)[ticket].tokens.tolist())
    assert sizes == [1, len(model.layers)] and answers[0] == answers[1] == alone(model, request)


def storm(model, count):
    """Requests of random lengths, half of them cancelled, with malformed ones among them: nobody else's tokens change."""
    rng = np.random.default_rng(7)
    engine = engine_of(model, slots=6, tokens=120, queue=40)
    kinds = [{"prompt": [64]}, {"prompt": []}, {"prompt": [5], "temperature": float("nan")}]
    prompts = [prompt_of(i, int(length)) for i, length in enumerate(rng.integers(1, 20, 8))]
    expected = {i: alone(model, Request(prompt=prompt, max_new_tokens=12)) for i, prompt in enumerate(prompts)}
    asked, sizes, answered = {}, None, 0
    for i in range(count):
        if i % 10 == 3:
            with pytest.raises(InputError):
                engine.submit(Request(**{"max_new_tokens": 4} | kinds[i % 3]))
        which, limit = int(rng.integers(8)), int(rng.integers(1, 13))
        while len(engine.waiting) >= 40 or rng.random() < 0.3:
            answered += check(engine.step(), asked, expected)
        asked[engine.submit(Request(prompt=prompts[which], max_new_tokens=limit))] = (which, limit)
        if rng.random() < 0.5:
            engine.cancel(int(rng.choice(list(asked))))
        if i == count // 2:
            sizes = (
                [f._cache_size() for f in (programs.take_piece, programs.advance, programs.pick_next)],
                len(jax.live_arrays()),
            )
    while engine.busy:
        answered += check(engine.step(), asked, expected)
    assert answered == count and not asked and engine.tokens_held == 0 and not engine._by_ticket
    after = [f._cache_size() for f in (programs.take_piece, programs.advance, programs.pick_next)]
    assert (after, len(jax.live_arrays())) <= (sizes[0], sizes[1] + 8)


def check(outputs, asked, expected):
    ended = [output for output in outputs if output.finished is not None]
    for output in ended:
        which, limit = asked.pop(output.ticket)
        tokens, reason = output.finished.tokens.tolist(), output.finished.reason
        assert tokens == expected[which][: len(tokens)] and reason in ("length", "cancelled")
        assert reason == "cancelled" or len(tokens) == limit
    return len(ended)


def test_a_storm_of_requests_changes_nobody_s_tokens(model):
    storm(model, 100)


@pytest.mark.thorough
def test_a_thousand_requests(model):
    storm(model, 1000)
