"""From text files to the token batches that calibration and evaluation take."""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import ArrayLike, Int, Int32

from fqjax.data.records import BYTE_ORDER_MARK, JSON_SUFFIXES, text_of_records
from fqjax.models.causal_lm import TextConfig
from fqjax.models.checks import check_ids, check_tokens
from fqjax.models.encodings import rows_of
from fqjax.runtime.arguments import check_unmasked, check_whole
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason
from fqjax.runtime.panics import panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 2
"""Windows in a calibration batch; sensitivities are measured on the first batch."""

MAX_CHARACTERS_PER_TOKEN = 16
"""Characters that the tokens of a long prompt have on average at most; those of ordinary text have four."""


MAX_TEXT_BYTES = 2**32
"""Bytes of a file of text beyond which it is not read: all of it is encoded at once."""

USUAL_WINDOW = 512
"""Tokens in a window, where nothing else is asked for and the model has as many positions."""


def usual_window(window: int | None, config: object) -> int:
    """A window's tokens: those asked for, or for None the usual number, or as many as the model has positions.

    Raises:
      InputError: if it is no whole number of at least 2.
    """
    if window is not None:
        return check_whole("window", window, 2, None)
    return min(USUAL_WINDOW, getattr(config, "max_length", None) or USUAL_WINDOW)


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file, or the texts of the records that a file of JSON holds (:mod:`fqjax.data.records`).

    The byte-order mark that some programs put at the beginning is no part of the text.

    Raises:
      InputError: if it is missing, unreadable, a device, too large, not UTF-8, or empty, or a record holds no text.
    """
    try:
        with open(path, encoding="utf-8") as file:
            _check_finite(path, os.fstat(file.fileno()))
            text = file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a text file on this machine, no name of a data set") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    text = text.removeprefix(BYTE_ORDER_MARK)
    if path.suffix.lower() in JSON_SUFFIXES:
        text = text_of_records(path, text)
    if not text.strip():
        raise InputError(f"{path}: empty; expected text")
    return text


def _check_finite(path: Path, status: os.stat_result) -> None:
    """Refuses a file that has no end, as some devices, or too much of it; a pipe has what its writer gives it."""
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        raise InputError(f"{path}: a device; expected a text file")
    if status.st_size > MAX_TEXT_BYTES:
        raise InputError(
            f"{path}: {status.st_size} bytes; expected {MAX_TEXT_BYTES} at most, for instance a part of it"
        )


def check_characters(text: str, what: str) -> None:
    """Refuses half a character, as bytes that are no UTF-8 and escapes in JSON leave them; no tokenizer takes it.

    Raises:
      InputError: showing what was found.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds {text[error.start]!r}, which is no character; expected UTF-8") from None


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> Int[np.ndarray, " tokens"]:
    """Token ids of a text, without special tokens.

    Raises:
      InputError: if the tokenizer cannot encode it.
    """
    check_characters(text, "the text")
    try:
        # verbose=False: a whole file is longer than the model's context, which is no reason to warn.
        with panics_as_errors():
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # The tokenizers package raises nothing more precise, for instance of a missing [UNK].
        raise InputError(f"the tokenizer cannot encode the text ({reason(error)})") from None
    return np.asarray(ids, np.int64)


def calibration_batches(
    token_ids: Int[np.ndarray, " tokens"], config: TextConfig, *, samples: int, window: int
) -> list[Int32[np.ndarray, "batch window"]]:
    """Cuts windows evenly spread over a text.

    Args:
      token_ids: the whole text.
      config: the model's configuration, for its BOS token and its limits.
      samples: windows to take; fewer if the text has fewer.
      window: tokens in a window, BOS among them if there is one.

    Raises:
      InputError: if the text does not fill one window, or tokens or window do not fit the model.
    """
    samples, window = check_whole("--samples", samples, 1, None), check_whole("window", window, 2, None)
    if not hasattr(config, "bos_token_id"):
        raise InputError(f"config: expected the model's configuration, as model.config, got {type(config).__name__}")
    windows = cut_windows(token_ids, window, config.bos_token_id)
    check_tokens(windows, config, window)
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(samples, len(windows))).round().astype(int))
    return [windows[chosen[i : i + BATCH]] for i in range(0, len(chosen), BATCH)]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", config: TextConfig, prompt: str) -> list[int]:
    """Token ids of a prompt, with the BOS token before it if the model has one; without a byte-order mark.

    Raises:
      InputError: if nothing would remain, or more than the model has positions for.
    """
    positions = getattr(config, "max_length", None)
    if positions is not None and len(prompt) > MAX_CHARACTERS_PER_TOKEN * positions:
        raise InputError(f"prompt: {len(prompt)} characters; expected less, as the model has {positions} positions")
    ids = encode(tokenizer, prompt.removeprefix(BYTE_ORDER_MARK)).tolist()
    bos = config.bos_token_id
    ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
    if not ids:
        raise InputError("prompt: empty; expected text")
    if positions is not None and len(ids) > positions:
        raise InputError(f"prompt: {len(ids)} tokens; expected {positions} at most, the positions of the model")
    return ids


def decode_new(
    tokenizer: "PreTrainedTokenizerBase", config: TextConfig, prompt_ids: list[int], new: Int32[np.ndarray, " new"]
) -> str:
    """The text that new tokens add to a prompt, up to the first that ends it, which is no text unless it is a plain token.

    Raises:
      InputError: if the tokenizer cannot decode them.
    """
    ends = np.flatnonzero(np.isin(new, config.eos_token_id))
    kept = new[: ends[0] + 1].tolist() if len(ends) else new.tolist()
    kept = kept[:-1] if len(ends) and kept[-1] == tokenizer.eos_token_id else kept
    try:
        with panics_as_errors():
            # Decoding the whole keeps a space, or a character split over tokens, that decoding the new part would lose.
            before = cast(str, tokenizer.decode(prompt_ids, skip_special_tokens=True))
            return cast(str, tokenizer.decode([*prompt_ids, *kept], skip_special_tokens=True))[len(before) :]
    except Exception as error:  # As in encoding.
        raise InputError(f"the tokenizer cannot decode the model's tokens ({reason(error)})") from None


def cut_windows(
    token_ids: ArrayLike | Sequence[int] | Mapping[str, object],
    window: int,
    bos_token_id: int | None,
    windows: int | None = None,
) -> Int32[np.ndarray, "windows window"]:
    """Cuts a text's tokens into windows of BOS and ``window - 1`` tokens, or of ``window`` tokens if there is no BOS.

    Args:
      token_ids: the whole text, without special tokens; see :func:`as_tokens`.
      window: tokens in a window, BOS among them; at least 2.
      bos_token_id: what every window begins with; None for nothing but the text.
      windows: only so many, from the beginning; None for all.

    Raises:
      InputError: if the text does not fill one window, or a token does not fit into int32.
    """
    token_ids = as_tokens(token_ids, bos_token_id)
    window = check_whole("window", window, 2, None)
    windows = None if windows is None else check_whole("windows", windows, 1, None)
    taken = window if bos_token_id is None else window - 1
    count = len(token_ids) // taken
    if not count:
        raise InputError(f"the text has {len(token_ids)} tokens, expected at least {taken} for one window")
    count = min(count, windows or count)
    body = token_ids[: count * taken].reshape(count, taken)
    check_ids(body)
    begin = [] if bos_token_id is None else [np.full((count, 1), bos_token_id)]
    return np.concatenate([*begin, body], axis=1).astype(np.int32)


def as_tokens(token_ids: object, bos_token_id: int | None = None) -> Int[np.ndarray, " tokens"]:
    """A text's tokens as an array of one axis.

    Args:
      token_ids: the tokens; or what a tokenizer gives, of which padding is cut off, and the token that begins every text.
      bos_token_id: that token; None for none.

    Raises:
      InputError: if they are none.
    """
    if isinstance(token_ids, Mapping):
        rows, _ = rows_of(token_ids, "token_ids")
        token_ids = np.concatenate([row[1:] if row[0] == bos_token_id else row for row in rows])
    check_unmasked("token_ids", token_ids)
    try:
        tokens = np.asarray(token_ids)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"token_ids: expected a row of integer token ids ({reason(error)})") from None
    if not tokens.ndim or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise InputError(f"token_ids: expected a row of integer token ids, got {tokens.dtype} of shape {tokens.shape}")
    return tokens.reshape(-1)
