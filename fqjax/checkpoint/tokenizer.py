"""Tokenizers, through transformers, imported only where one is loaded."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fqjax.checkpoint.checksums import verify_files
from fqjax.checkpoint.foreign import foreign
from fqjax.checkpoint.lazy import quiet_transformers
from fqjax.checkpoint.manifest import read_manifest_if_any
from fqjax.runtime.arguments import check_path, shown
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import exists, inside, linked, reason
from fqjax.runtime.panics import Panicked, panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FOLDER = "tokenizer"
"""Where an fqjax checkpoint keeps its tokenizer."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""What transformers reads beside these, and takes for absent where it is no file."""

SENTENCEPIECE_FILE, SENTENCEPIECE_PACKAGES = (
    "tokenizer.model",
    {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"},
)
"""The file of the sentencepiece library, and the modules that transformers reads it with, by the package to install."""


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a Hugging Face directory or of an fqjax checkpoint; None if it holds none.

    Raises:
      InputError: if there is no such directory, or there are tokenizer files that transformers cannot load.
    """
    directory = check_path("directory", directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: {foreign(directory) or 'no such directory'}")
    own = exists(directory / TOKENIZER_FOLDER)
    if own:
        verify_files(read_manifest_if_any(directory), directory, TOKENIZER_FOLDER)
        directory = directory / TOKENIZER_FOLDER
    present = [name for name in TOKENIZER_FILES if exists(directory / name)]
    if not present:
        return None
    for name in present:
        (inside if own else linked)(directory, name)
    for path in (directory / name for name in SIDE_FILES):
        if exists(path) and not path.is_file():
            raise InputError(f"{path}: no file; expected a file of the tokenizer, or nothing")
    if present == [SENTENCEPIECE_FILE]:
        _check_sentencepiece(directory / SENTENCEPIECE_FILE)
    with quiet_transformers() as transformers:
        try:
            with panics_as_errors():
                return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # Any of a dozen kinds, by the file at fault.
            raise InputError(f"{directory}: its tokenizer cannot be loaded ({reason(error)})") from None


def check_writable(tokenizer: object) -> None:
    """Refuses what is to be saved as a tokenizer and is none of transformers'; None is let pass.

    Raises:
      InputError: naming the argument.
    """
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise InputError(f"tokenizer {shown(tokenizer)}: expected a tokenizer of transformers")


def _check_sentencepiece(path: Path) -> None:
    """Refuses a tokenizer.model that nothing here can read: transformers would ask for a package that does not help."""
    lacking = [package for module, package in SENTENCEPIECE_PACKAGES.items() if not _is_there(module)]
    if lacking:
        raise InputError(f"{path}: needs {' and '.join(lacking)} to be read; pip install {' '.join(lacking)}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Of the package above it.
        return False


def added_before(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before a text; none if it has no tokens for the plainest one.

    Raises:
      InputError: if its template for them is broken.
    """
    try:
        with panics_as_errors():
            whole, bare = (cast(list[int], tokenizer("a", add_special_tokens=s).input_ids) for s in (True, False))
    except Panicked as error:
        raise InputError(f"the tokenizer cannot encode a text with its special tokens ({error})") from None
    except Exception:  # Whatever is wrong shows when a text is encoded.
        return ()
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return tuple(whole[: starts[0]]) if bare and starts else ()


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokens that no text encodes to unless it holds their names: of control, padding, and the like."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token for token in tokenizer.all_special_ids if token is not None} | {
        token for token, about in added.items() if about.special
    }


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Those of :func:`special_tokens` that can mean something, which the one for what is unknown cannot."""
    return special_tokens(tokenizer) - {cast(int, tokenizer.unk_token_id)}


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int, where: str | Path) -> None:
    """Refuses a tokenizer that makes tokens of a text which the model has no embedding for.

    Special tokens beyond the embedding are let pass, as a padding token often is one: a text that holds their names is
    refused when it is used.

    Args:
      tokenizer: a transformers tokenizer; None is let pass.
      vocab_size: rows of the model's embedding.
      where: the model, for the message.

    Raises:
      InputError: naming the tokenizer's largest token.
    """
    if tokenizer is None:
        return
    try:
        with panics_as_errors():
            vocabulary, special = tokenizer.get_vocab(), special_tokens(tokenizer)
    except Exception as error:  # As in loading.
        raise InputError(f"{where}: its tokenizer has no vocabulary to be read ({reason(error)})") from None
    ordinary = {token: number for token, number in vocabulary.items() if number not in special}
    token = max(ordinary, key=ordinary.__getitem__, default=None)
    if token is not None and ordinary[token] >= vocab_size:
        raise InputError(
            f"{where}: its tokenizer has token {ordinary[token]} ({token!r}), beyond the model's vocabulary of {vocab_size}"
        )
