"""The server through the client of OpenAI's interface."""

import concurrent.futures
import json
import socket
import threading
import time

import httpx2 as httpx
import numpy as np
import openai
import pytest

from fqjax.server.app import Settings
from fqjax.server.run import Limits
from tests.conftest import make_checkpoint
from tests.server.serving import running

PROMPT = "return the list of values"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("served") / "model")
    with running(directory, Limits(slots=4, queue=8), Settings(max_body=20_000)) as server:
        yield server


def test_tokens_are_those_of_generate(served):
    found = served.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert found.choices[0].text == served.expected(PROMPT, 12)
    assert found.choices[0].finish_reason in ("stop", "length") and found.object == "text_completion"
    prompt = served.tokenizer(PROMPT, add_special_tokens=False).input_ids
    assert found.usage.prompt_tokens == len(prompt) + 1 and found.usage.completion_tokens <= 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    same = served.client().completions.create(model="tiny", prompt=[1, *prompt], max_tokens=12, temperature=0)
    assert same.choices[0].text == found.choices[0].text


def test_several_prompts_and_choices(served):
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    found = served.client().completions.create(
        model="tiny", prompt=["return", [1, 5, 6]], n=2, max_tokens=6, **settings, extra_body={"top_k": 50}
    )
    asked = [("return", 7), ("return", 8), ([1, 5, 6], 7), ([1, 5, 6], 8)]
    for choice, (prompt, seed) in zip(found.choices, asked, strict=True):
        assert choice.text == served.expected(prompt, 6, **settings | {"seed": seed, "top_k": 50})
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text != found.choices[1].text


def test_pieces_are_the_whole(served):
    asked = {"model": "tiny", "prompt": [PROMPT, "class"], "max_tokens": 12, "temperature": 0}
    texts, endings, usage = ["", ""], [None, None], None
    for chunk in served.client().completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert endings[choice.index] is None
            texts[choice.index] += choice.text
            endings[choice.index] = choice.finish_reason
    whole = served.client().completions.create(**asked)
    assert texts == [choice.text for choice in whole.choices]
    assert endings == [choice.finish_reason for choice in whole.choices] and usage == whole.usage


def test_tokens_are_counted_with_every_piece(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "stream": True, "stream_options": options}
    lines = served.post("/v1/completions", json=body).text.split("\n\n")[:-2]
    counts = [json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"] for line in lines]
    assert counts[0] >= 1 and counts == sorted(counts) and counts[-1] == counts[-2]


def test_a_conversation(served):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    whole = served.client().chat.completions.create(**asked)
    ids = served.tokenizer("<system>Be brief.\n<user>Why?\n<assistant>", add_special_tokens=False).input_ids
    assert whole.choices[0].message.content == served.expected(ids, 8)
    assert whole.choices[0].message.role == "assistant" and whole.usage.prompt_tokens == len(ids)
    chunks = list(served.client().chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and all(chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    joined = served.client().chat.completions.create(model="tiny", messages=parts, max_tokens=3, temperature=0)
    ids = served.tokenizer("<user>ab\n<assistant>", add_special_tokens=False).input_ids
    assert joined.choices[0].message.content == served.expected(ids, 3)


def test_a_chat_may_fill_what_there_is_room_for(served):
    messages = [{"role": "user", "content": "x"}]
    found = served.client().chat.completions.create(model="tiny", messages=messages, temperature=0)
    assert found.choices[0].finish_reason == "stop" or found.usage.total_tokens == 128


def test_streams_end_with_a_line_that_says_so(served):
    body = {"prompt": "x", "max_tokens": 2, "stream": True, "temperature": 0}
    answer = served.post("/v1/completions", json=body)
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_string_stops_the_text(served, streamed):
    whole = served.expected(PROMPT, 20)
    stop = whole[7:10]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stop": ["never", stop]}
    found = served.client().completions.create(**asked, stream=streamed)
    choices = [chunk.choices[0] for chunk in found] if streamed else found.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"
    served.settled()


def test_logarithms_of_probabilities(served):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "logprobs": 3}
    (choice,) = served.client().completions.create(**asked).choices
    reported = choice.logprobs
    assert "".join(reported.tokens) == choice.text and len(reported.token_logprobs) == 5
    assert reported.text_offset == np.cumsum([0, *map(len, reported.tokens[:-1])]).tolist()
    for token, logprob, top in zip(reported.tokens, reported.token_logprobs, reported.top_logprobs, strict=True):
        assert logprob == max(top.values()) and top[token] == logprob < 0
    pieces = [chunk.choices[0].logprobs for chunk in served.client().completions.create(**asked, stream=True)]
    assert [token for piece in pieces if piece for token in piece.tokens] == reported.tokens
    assert [at for piece in pieces if piece for at in piece.text_offset] == reported.text_offset


def test_logarithms_of_probabilities_in_a_chat(served):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "temperature": 0}
    (choice,) = served.client().chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content and len(entries) == 4
    for entry in entries:
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob == entry.logprob
        assert bytes(entry.bytes or []).decode() == entry.token
    (plain,) = served.client().chat.completions.create(**asked).choices
    assert plain.logprobs is None and plain.message.content == choice.message.content


def test_models(served):
    assert [model.id for model in served.client().models.list()] == ["tiny"]
    assert served.client().models.retrieve("tiny").owned_by == "fqjax"
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        served.client().models.retrieve("other/one")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


REFUSED = {
    "no prompt": (400, {}, "prompt: missing"),
    "an empty prompt": (400, {"prompt": []}, "prompt"),
    "a prompt of another kind": (400, {"prompt": {"a": 1}}, "prompt of type dict: expected a text"),
    "a mixed prompt": (400, {"prompt": ["a", 5]}, "prompt 5: expected a text"),
    "a token outside the vocabulary": (400, {"prompt": [5, 99999]}, "token 99999 is not in the model's vocabulary"),
    "a token that no type holds": (400, {"prompt": [10**30]}, ""),
    "a temperature": (400, {"prompt": "x", "temperature": -1}, "temperature -1.0: expected"),
    "no number": (400, {"prompt": "x", "top_p": "high"}, "top_p 'high': expected a finite number"),
    "a number of tokens": (400, {"prompt": "x", "max_tokens": 0}, "max_tokens 0: expected at least 1"),
    "too many tokens": (400, {"prompt": "x", "max_tokens": 500}, "expected at most 128"),
    "too many choices": (400, {"prompt": ["x"] * 100, "n": 2}, "expected at most 128 continuations"),
    "a stop": (400, {"prompt": "x", "stop": 5}, "stop 5: expected a text"),
    "logprobs": (400, {"prompt": "x", "logprobs": 50}, "logprobs 50: expected at most 20"),
    "a flag": (400, {"prompt": "x", "stream": 1}, "stream 1: expected true or false"),
    "an unknown field": (400, {"prompt": "x", "colour": 1}, "'colour': no field of this call"),
    "an unknown field of surrogates": (400, {"prompt": "x", "\ud800": 1}, "no field of this call"),
    "a text of surrogates": (400, {"prompt": "\ud800"}, "which is no character"),
    "an echo": (400, {"prompt": "x", "echo": True}, "echo: not supported"),
    "a penalty": (400, {"prompt": "x", "presence_penalty": 1}, "presence_penalty: not supported"),
    "another model": (404, {"prompt": "x", "model": "gpt"}, "model 'gpt': not served here; expected 'tiny'"),
    "a list": (400, [1], "expected a JSON object"),
    "no JSON": (400, b"{", "not valid JSON"),
    "no number of JSON": (400, b'{"prompt": "x", "top_p": NaN}', "NaN is no number"),
    "no text": (400, b"\xff", "not valid JSON"),
    "nested too deeply": (400, b"[" * 19_000, "not valid JSON"),
    "a long body": (413, {"prompt": "x" * 30_000}, "expected at most 20000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_the_form_of_the_interface(served, name):
    status, body, message = REFUSED[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = served.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert served.api.engine.alive


REFUSED_CHATS = {
    "no messages": ({}, "messages: expected a list"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'; expected one of"),
    "no content": ({"messages": [{"role": "user"}]}, "content None; expected text"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "expected text"),
    "tools": ({"messages": [], "tools": [{"type": "function"}]}, "tools: not supported"),
    "JSON": ({"messages": [], "response_format": {"type": "json_object"}}, "response_format: not supported"),
    "top_logprobs": ({"messages": [], "top_logprobs": 2}, "top_logprobs: expected with logprobs true"),
    "a long conversation": ({"messages": [{"role": "user", "content": "word " * 500}]}, "expected"),
}


@pytest.mark.parametrize("name", REFUSED_CHATS)
def test_conversations_that_cannot_be_answered(served, name):
    body, message = REFUSED_CHATS[name]
    answer = served.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_model_without_a_template_completes_only(served, monkeypatch):
    monkeypatch.setattr(served.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        served.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_other_paths_methods_and_kinds_of_content(served):
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/metrics", 405)):
        answer = httpx.request(method, f"{served.url}{path}")
        assert answer.status_code == status and path in answer.json()["error"]["message"]
    answer = served.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]


def by_hand(served, *pieces, ends=False):
    """What is answered to bytes as they are, until the server closes the connection."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return b"" if ends else b"".join(iter(lambda: connection.recv(1 << 16), b""))


def head(method="POST", path="/v1/completions", **fields):
    fields = {"Host": "x", "Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in fields.items()}}
    return "\r\n".join([f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "", ""]).encode()


def test_what_only_programs_at_fault_send(served):
    body = b'{"prompt": [5], "max_tokens": 1}'
    for start, status in (
        (head("HEAD", "/", Connection="close"), b"200"),
        (head("OPTIONS", Connection="close"), b"405"),
        (head("BREW", Connection="close"), b"405"),
        (head("OPTIONS", "*", Connection="close"), b"404"),
        (head("GET", "/v1/models/%ff%00", Connection="close"), b"404"),
        (head(Content_Length="-1"), b"400"),
        (b"\x16\x03\x01\x02\r\n\r\n", b"400"),
    ):
        answer = by_hand(served, start)
        assert answer.startswith(b"HTTP/1.1 " + status), answer
    assert b"allow: POST\r\n" in by_hand(served, head("OPTIONS", Connection="close"))
    one = head(Content_Length=len(body)) + body
    last = head(Content_Length=len(body), Connection="close") + body
    assert by_hand(served, one + one + last).count(b"HTTP/1.1 200 OK") == 3  # Pipelined.


def test_a_body_that_does_not_come(served, monkeypatch, caplog):
    monkeypatch.setattr("fqjax.server.app.BODY_SECONDS", 0.2)
    answer = by_hand(served, head(Content_Length=100), b'{"prompt": ')
    assert answer.startswith(b"HTTP/1.1 408") and b"nothing more of the body has come" in answer
    monkeypatch.undo()
    before = served.metric('fqjax_requests_total{outcome="cancelled"}')
    by_hand(served, head(Content_Length=100), b'{"prompt": ', ends=True)
    until = time.monotonic() + 10
    while served.metric('fqjax_requests_total{outcome="cancelled"}') == before and time.monotonic() < until:
        time.sleep(0.02)
    assert served.metric('fqjax_requests_total{outcome="cancelled"}') == before + 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_long_bodies_are_read_elsewhere(served, monkeypatch):
    monkeypatch.setattr("fqjax.server.app.LONG_BODY", 10)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    assert served.client().completions.create(**asked).choices[0].text == served.expected(PROMPT, 4)
    with pytest.raises(openai.BadRequestError, match="top_p 7"):
        served.client().completions.create(**asked | {"top_p": 7})


def test_a_key(served, monkeypatch):
    monkeypatch.setattr(served.api, "settings", Settings(api_key="secret"))
    for key in ("none", "secre", "secret2", "sécret"):
        answer = httpx.get(f"{served.url}/v1/models", headers={"authorization": f"Bearer {key}".encode()})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError, match="API key"):
        served.client().completions.create(model="tiny", prompt="x")
    card = served.client(api_key="secret").models.list().data[0]
    assert card.id == "tiny" and card.max_model_len == 128 and card.chat
    assert httpx.get(f"{served.url}/health").status_code == 200


def slow(served, monkeypatch):
    """Has every step of the engine wait until it is let go; what lets it go."""
    gate, step = threading.Event(), served.api.engine.engine.step

    def waiting():
        gate.wait(30)
        return step()

    monkeypatch.setattr(served.api.engine.engine, "step", waiting)
    return gate


def test_a_full_queue(served):
    asked = {"model": "tiny", "prompt": [1, 5], "max_tokens": 2, "temperature": 0}
    with pytest.raises(openai.RateLimitError, match="at most 8 in the queue") as caught:
        served.client().completions.create(**asked, n=13)  # Of which 4 would get a slot.
    assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"
    served.settled()
    found = served.client().completions.create(**asked, n=12).choices
    assert [choice.text for choice in found] == [served.expected([1, 5], 2)] * 12


@pytest.mark.parametrize("streamed", [False, True])
def test_what_nobody_waits_for_is_cancelled(served, monkeypatch, streamed):
    gate, before = slow(served, monkeypatch), served.metric('fqjax_requests_total{outcome="cancelled"}')
    body = {"prompt": [1, 5], "max_tokens": 100, "temperature": 0, "stream": streamed, "n": 2}
    for _ in range(2):  # The second one comes while the engine is in a step, and leaves before it is taken.
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{served.url}/v1/completions", json=body, timeout=0.5)
    gate.set()
    served.settled()
    assert served.metric('fqjax_requests_total{outcome="cancelled"}') == before + 4
    assert served.metric("fqjax_kv_cache_tokens_held") == 0


def test_metrics(served):
    names = ["fqjax_prompt_tokens_total", "fqjax_output_tokens_total", 'fqjax_requests_total{outcome="length"}']
    names += ["fqjax_time_to_first_token_seconds_count", "fqjax_time_per_output_token_seconds_count"]
    before = [served.metric(name) for name in names]
    found = served.post("/v1/completions", json={"prompt": [1, 5, 6], "max_tokens": 4, "n": None}).json()
    tokens = found["usage"]["completion_tokens"]
    ended = int(found["choices"][0]["finish_reason"] == "length")
    after = [served.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, tokens, ended, 1, tokens - 1]
    text = httpx.get(f"{served.url}/metrics").text
    assert all(line.startswith("#") or len(line.split(" ")) == 2 for line in text.splitlines())
    assert served.metric("fqjax_kv_cache_tokens") >= 4 * 128
    assert 'le="+Inf"' in text and "# TYPE fqjax_time_to_first_token_seconds histogram" in text


def storm(served, count, workers):
    """Requests of random lengths, half given up and some malformed; the others get what ``generate`` gives."""
    rng = np.random.default_rng(0)
    asked = [(rng.integers(3, 2048, n).tolist(), new) for n, new in ((2, 24), (7, 5), (20, 16), (40, 9))]
    whole = [served.expected(prompt, new) for prompt, new in asked]
    malformed = [{"prompt": [5, 10**6]}, {"prompt": "x", "top_p": 7}, {"prompt": [5], "max_tokens": 10**6}]

    def ask(i):
        which = int(np.random.default_rng(i).integers(len(asked)))
        body = dict(zip(("prompt", "max_tokens"), asked[which], strict=True)) | {"temperature": 0}
        if i % 10 == 0:
            return served.post("/v1/completions", json=malformed[i // 10 % 3]).status_code == 400
        if i % 2:
            with httpx.stream(
                "POST", f"{served.url}/v1/completions", json=body | {"stream": True}, timeout=60
            ) as answer:
                lines = answer.iter_lines()
                for _ in range(i % 7):
                    next(lines)
            return answer.status_code == 200
        answer = served.post("/v1/completions", json=body)
        return answer.json()["choices"][0]["text"] == whole[which]

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        assert all(pool.map(ask, range(count)))
    served.settled()
    assert served.metric("fqjax_kv_cache_tokens_held") == 0 and served.api.engine.alive


def test_a_storm_changes_nobody_elses_tokens(served):
    storm(served, 60, 6)


@pytest.mark.thorough
def test_a_long_storm_changes_nobody_elses_tokens_and_takes_no_memory(served):
    def memory():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    storm(served, 500, 8)
    before = memory()
    storm(served, 1000, 8)
    assert memory() - before < 50e6
