"""The page in a browser."""

import json
import threading

import pytest

from fqjax.server.app import Settings
from fqjax.server.run import Limits
from tests.conftest import make_checkpoint
from tests.server.browser import browser
from tests.server.serving import running

pytestmark = pytest.mark.thorough

SENT = "document.getElementById('send').textContent === 'Send'"
SPEED = "document.querySelector('.assistant .speed')?.textContent"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("served") / "model")
    with running(directory, Limits(slots=2), Settings()) as server:
        yield server


@pytest.fixture
def page(served):
    with browser() as page:
        page.open(served.url)
        page.wait("document.title === 'tiny'")
        settle(page, temperature="0", top_p="1")
        yield page


def settle(page, **settings):
    """Sets fields as a person would."""
    for name, value in settings.items():
        page.value(f"var field = document.getElementById('{name}'); field.value = {json.dumps(value)}; 0")
        page.value("for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind))")


def texts(page, kind):
    """What is shown of that kind, without the line on speed."""
    of = "[...e.childNodes].filter(n => n.className !== 'speed').map(n => n.textContent).join('')"
    return page.value(f"[...document.querySelectorAll('.{kind}')].map(e => {of})")


def chat(served, messages, **asked):
    """The answer that the client of the interface gets."""
    asked = {"model": "tiny", "messages": messages, "temperature": 0} | asked
    return served.client().chat.completions.create(**asked).choices[0].message.content


def test_a_conversation(served, page):
    settle(page, max_tokens="9", system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for turn, text in enumerate(("Why?", "<b>list</b>")):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": chat(served, messages, max_tokens=9)})
        page.type(text)
        page.wait(f"document.querySelectorAll('.assistant .speed').length === {turn + 1} && {SENT}")
    assert texts(page, "user") == ["Why?", "<b>list</b>"]
    assert texts(page, "assistant") == [each["content"] for each in messages if each["role"] == "assistant"]
    assert " tokens a second" in page.value(SPEED)
    page.value("document.getElementById('clear').click()")
    page.type("Why?")
    page.wait(f"document.querySelectorAll('.assistant').length === 1 && {SPEED} && {SENT}")
    assert texts(page, "assistant") == [messages[2]["content"]] and not page.complaints()


def test_an_answer_is_shown_while_it_comes_and_can_be_stopped(served, page, monkeypatch):
    whole = chat(served, [{"role": "user", "content": "Why?"}])
    permits, step = threading.Semaphore(0), served.api.engine.engine.step
    monkeypatch.setattr(served.api.engine.engine, "step", lambda: permits.acquire(timeout=60) and step())
    before = served.metric('fqjax_requests_total{outcome="cancelled"}')
    page.type("Why?")
    permits.release(8)
    some = page.wait("document.querySelector('.assistant')?.firstChild.data")
    assert len(some) < len(whole) and whole.startswith(some)
    page.value("document.getElementById('send').click()")
    page.wait(SENT)
    permits.release(1000)
    served.settled()
    assert served.metric('fqjax_requests_total{outcome="cancelled"}') == before + 1
    assert whole.startswith(texts(page, "assistant")[0]) and not texts(page, "error")


def test_a_model_without_a_template_continues_texts(served, monkeypatch):
    monkeypatch.setattr(served.tokenizer, "chat_template", None)
    with browser() as page:
        page.open(served.url)
        page.wait("document.title === 'tiny'")
        assert page.value("document.getElementById('of_chat').hidden")
        settle(page, temperature="0", top_p="1", max_tokens="12")
        page.type("return the list of")
        page.wait(f"{SPEED} && {SENT}")
        assert texts(page, "assistant") == ["return the list of" + served.expected("return the list of", 12)]
        assert "cut off at the limit" in page.value(SPEED) and not page.complaints()


def test_what_goes_wrong_is_said_and_can_be_asked_again(served, page):
    settle(page, top_p="7")
    page.type("Why?")
    page.wait("!!document.querySelector('.error')")
    assert "top_p 7" in texts(page, "error")[0] and not texts(page, "user")
    assert page.value("document.getElementById('text').value") == "Why?"
    settle(page, top_p="1", max_tokens="3")
    page.type("")
    page.wait(f"{SPEED} && {SENT}")
    assert texts(page, "user") == ["Why?"] and not texts(page, "error")


def test_a_key_is_asked_for(served, monkeypatch):
    monkeypatch.setattr(served.api, "settings", Settings(api_key="schlüssel"))
    with browser() as page:
        page.open(served.url)
        page.wait("!!document.querySelector('.error')")
        assert "enter it in the settings" in texts(page, "error")[0]
        assert page.value("document.activeElement.id") == "key"
        page.type("schlüssel")
        page.value("document.activeElement.blur()")
        page.wait("document.title === 'tiny'")
        assert not texts(page, "error")
