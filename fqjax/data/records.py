"""Texts in JSON: a record a line, or a list of them, as datasets are handed around."""

from pathlib import Path
from typing import cast

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import parse_json

JSON_SUFFIXES = (".json", ".jsonl", ".jsonlines", ".ndjson")
"""Endings of files that hold records and no plain text."""

TEXT_FIELD = "text"
"""The field of a record that holds its text."""

BYTE_ORDER_MARK = "\ufeff"
"""What some programs begin a UTF-8 file with."""

BETWEEN_TEXTS = "\n\n"
"""Characters between one record's text and the next."""


def text_of_records(path: Path, content: str) -> str:
    """The texts of all records, one after the other, with an empty line between.

    Args:
      path: of the file, for messages.
      content: JSON, either a list or a value a line; each an object with a field "text", or a text.

    Raises:
      InputError: naming the first record that is something else, and its fields.
    """
    texts = [_text(f"{path}: {where}", record) for where, record in _records(path, content)]
    return BETWEEN_TEXTS.join(text for text in texts if text.strip())


def _records(path: Path, content: str) -> list[tuple[str, object]]:
    """Records, each with its place in the file."""
    content = content.removeprefix(BYTE_ORDER_MARK)
    if content.lstrip().startswith("["):
        try:
            return [(f"record {i}", record) for i, record in enumerate(cast(list[object], parse_json(content)), 1)]
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}); expected a list of records, or one a line") from None
    lines = [(f"line {i}", line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [(where, _parsed(f"{path}: {where}", line)) for where, line in lines]


def _parsed(where: str, line: str) -> object:
    try:
        return parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); expected a record a line, or a file of plain text") from None


def _text(where: str, record: object) -> str:
    text = record.get(TEXT_FIELD) if isinstance(record, dict) else record
    if isinstance(text, str):
        return text.removeprefix(BYTE_ORDER_MARK)  # Of the file that it was taken from.
    fields = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
    raise InputError(f"{where}: expected a field {TEXT_FIELD!r} with a text, got {fields or 'no field'}")
