"""Texts in JSON: what datasets hold is read, what holds no text is named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fqjax.data.text import MAX_TEXT_BYTES, encode_prompt, read_text
from fqjax.runtime.errors import InputError
from tests.conftest import refused

TEXTS = ["One text,\nof two lines\u2028or three.", "Ein anderer, mit ä."]


def written(tmp_path, content, name="calibration.jsonl"):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.json"])
def test_a_record_a_line(tmp_path, name):
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in TEXTS]
    assert read_text(written(tmp_path, "\n".join([*lines, ""]), name)) == "\n\n".join(TEXTS)


@pytest.mark.parametrize("records", [TEXTS, [{"text": text} for text in [*TEXTS, " "]]])
def test_a_list_of_records_and_texts_alone(tmp_path, records):
    assert read_text(written(tmp_path, "\ufeff" + json.dumps(records, indent=1), "a.json")) == "\n\n".join(TEXTS)
    assert read_text(written(tmp_path, "\n\n".join(map(json.dumps, records)))) == "\n\n".join(TEXTS)


def test_files_without_an_end_and_too_large_ones(tmp_path):
    for name in ("zero", "null"):
        refused(f"/dev/{name}: a device; expected a text file", read_text, Path("/dev", name))
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    refused("large.txt: 4294967297 bytes; expected 4294967296 at most", read_text, tmp_path / "large.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\n{"prompt": "a", "response": "b"}',
            "line 2: expected a field 'text' .*, got 'prompt', 'response'",
        ),
        ('{"text": "a"}\n\n{"text": null}', "line 3: expected a field 'text'"),
        ('{"text": ["a"]}', "line 1: expected a field 'text'"),
        ("{}", "line 1: expected a field 'text' with a text, got no field"),
        ("3", "line 1: expected a field 'text' with a text, got int"),
        ('[{"text": "a"}, 3]', "record 2: expected a field 'text'"),
        ("[3", "not JSON"),
        ("just text", "line 1: not JSON .* a file of plain text"),
        ('{"text": "a"', "line 1: not JSON"),
        ('{"text": ""}', "empty; expected text"),
        ("", "empty; expected text"),
    ],
)
def test_records_without_a_text(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_plain_text_is_what_it_is(tmp_path):
    assert read_text(written(tmp_path, '{"text": "a"}\n', "a.txt")) == '{"text": "a"}\n'


MARK = "\ufeff"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    records = "\n".join(json.dumps({"text": MARK + text}, ensure_ascii=False) for text in TEXTS)
    content = {"a.txt": "\n\n".join(TEXTS), "a.jsonl": records, "a.json": json.dumps([MARK + text for text in TEXTS])}
    assert read_text(written(tmp_path, MARK + content[name], name)) == "\n\n".join(TEXTS)
    with pytest.raises(InputError, match="empty"):
        read_text(written(tmp_path, MARK, name))


def test_a_byte_order_mark_is_no_part_of_a_prompt():
    def tokenizer(text, **options):
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    assert encode_prompt(tokenizer, SimpleNamespace(bos_token_id=1), MARK + "ab") == [1, 97, 98]
