import types

import numpy as np
import pytest

from fqjax.checkpoint.tokenizer import load_tokenizer
from fqjax.data.chat import chat_prompt
from fqjax.data.incremental import new_text
from fqjax.data.text import decode_new, encode
from fqjax.demo.run import CHECKPOINT
from fqjax.runtime.errors import InputError

CONFIG = types.SimpleNamespace(eos_token_id=(0,), bos_token_id=None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


class Bytes:
    """A tokenizer of UTF-8 bytes, whose characters are split over tokens."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


def pieces(text, stop=(), prompt="a"):
    return list(new_text(Bytes(), CONFIG, list(prompt.encode()), list(text.encode()), stop))


@pytest.mark.parametrize("text", ["plain", "é", "naïve 日本語 🙂!", "🙂🙂"])
def test_pieces_are_whole_characters(text):
    found = pieces(text)
    assert "".join(found) == text and found == list(text)


def test_bytes_that_are_no_character_come_at_the_end():
    assert "".join(new_text(Bytes(), CONFIG, [97], [98, 0xF0, 0x9F])) == "b\ufffd"


@pytest.mark.parametrize("seed", range(3))
def test_together_they_are_what_decoding_all_gives(tokenizer, seed):
    rng = np.random.default_rng(seed)
    config = types.SimpleNamespace(eos_token_id=(tokenizer.eos_token_id,), bos_token_id=tokenizer.bos_token_id)
    prompt = encode(tokenizer, "Return a list of the").tolist()
    text = encode(tokenizer, "words in naïve 日本語 (🙂), one by one.\n\n  def f(x):  return x").tolist()
    new = [*text, *rng.integers(3, len(tokenizer), 40).tolist(), tokenizer.eos_token_id, 5, 6]
    found = "".join(new_text(tokenizer, config, prompt, new))
    assert found.startswith("words in naïve 日本語 (🙂)") or found.startswith(" words")
    whole = decode_new(tokenizer, config, prompt, np.array(new, np.int32))
    assert found.rstrip("\ufffd") == whole.rstrip("\ufffd")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "one two "),
        (("two", "END"), "one "),
        (("one",), ""),
        (("never",), "one two END three"),
        (("e t",), "on"),
    ],
)
def test_a_string_stops_the_text_and_is_not_part_of_it(stop, expected):
    found = pieces("one two END three", stop)
    assert "".join(found) == expected and "" not in found


def test_what_could_begin_such_a_string_is_held_back():
    given = []

    def tokens():
        for byte in b"ab\n\nUserX":
            yield byte
            given.append("".join(seen))

    seen = []
    for piece in new_text(Bytes(), CONFIG, [97], tokens(), ["\n\nUser:"]):
        seen.append(piece)
    assert given[3] == "ab" and given[7] == "ab" and "".join(seen) == "ab\n\nUserX"


def test_no_further_token_is_asked_for():
    def tokens():
        yield from b"ab."
        raise AssertionError("asked for more")

    assert list(new_text(Bytes(), CONFIG, [97], tokens(), ["."])) == ["a", "b"]
    assert list(new_text(Bytes(), CONFIG, [97], iter([98, 0, 99]), [])) == ["b"]


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def test_a_conversation_is_written_by_the_template(tokenizer, monkeypatch):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(InputError, match="no chat template"):
        chat_prompt(tokenizer, messages)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    ids = chat_prompt(tokenizer, messages)
    assert tokenizer.decode(ids).strip() == "<system>Be brief.\n<user>Why?\n<assistant>"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system') }}", "{{ messages[", "{{ ''.__class__.__mro__[1].__subclasses__() }}"],
)
def test_a_template_that_fails_or_reaches_out_is_one_line(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="chat template does not take these messages") as error:
        chat_prompt(tokenizer, [{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)
