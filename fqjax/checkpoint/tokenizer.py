"""Tokenizers, through transformers, imported only where one is loaded."""

from pathlib import Path
from typing import Any

from fqjax.checkpoint.lazy import import_transformers
from fqjax.errors import InputError

FOLDER = "tokenizer"
"""Where an fqjax checkpoint keeps its tokenizer."""

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory or of an fqjax checkpoint; None if it holds none.

    Raises:
      InputError: if there are tokenizer files that transformers cannot load.
    """
    directory = Path(directory)
    if (directory / FOLDER).is_dir():
        directory = directory / FOLDER
    if not any((directory / name).is_file() for name in FILES):
        return None
    transformers = import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # Any of a dozen kinds, by the file at fault.
        raise InputError(f"{directory}: its tokenizer cannot be loaded ({' '.join(str(error).split())})") from None
