"""Tokenizers, through transformers, imported only where one is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING

from fqjax.checkpoint.lazy import quiet_transformers
from fqjax.runtime.arguments import check_path
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import inside, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FOLDER = "tokenizer"
"""Where an fqjax checkpoint keeps its tokenizer."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a Hugging Face directory or of an fqjax checkpoint; None if it holds none.

    Raises:
      InputError: if there are tokenizer files that transformers cannot load.
    """
    directory = check_path("directory", directory)
    if (directory / TOKENIZER_FOLDER).is_dir():
        directory = directory / TOKENIZER_FOLDER
    present = [name for name in TOKENIZER_FILES if (directory / name).exists()]
    if not present:
        return None
    for name in present:
        inside(directory, name)
    with quiet_transformers() as transformers:
        try:
            return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # Any of a dozen kinds, by the file at fault.
            raise InputError(f"{directory}: its tokenizer cannot be loaded ({reason(error)})") from None


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int, where: str | Path) -> None:
    """Refuses a tokenizer that can give tokens which the model has no embedding for.

    Args:
      tokenizer: a transformers tokenizer; None is let pass.
      vocab_size: rows of the model's embedding.
      where: the model, for the message.

    Raises:
      InputError: naming the tokenizer's largest token.
    """
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if token is not None and vocabulary[token] >= vocab_size:
        raise InputError(
            f"{where}: its tokenizer has token {vocabulary[token]} ({token!r}), beyond the model's vocabulary of {vocab_size}"
        )
