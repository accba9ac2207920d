"""Tokens as a tokenizer gives them: under ``input_ids``, with an ``attention_mask`` that hides padding."""

from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np
from jaxtyping import Int

from fqjax.runtime.arguments import check_unmasked
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason

TOKEN_NAMES = ("tokens", "input_ids")
"""Names that a mapping may give tokens."""

MASK_NAME = "attention_mask"

OTHER_NAMES = ("labels", "special_tokens_mask", "token_type_ids")
"""Names of what no language model here reads."""


def rows_of(encoding: Mapping[str, object], where: str) -> tuple[list[Int[np.ndarray, " length"]], bool]:
    """The sequences that a tokenizer gave, without the padding that its mask hides.

    Args:
      encoding: tokens under ``input_ids`` or ``tokens``, of one sequence or of several, of one length or not; if there is an
        ``attention_mask`` of the same shape, 0 is padding, before or after a sequence.
      where: what it is, for messages.

    Returns:
      The sequences, and whether one was given without an axis of the batch.

    Raises:
      InputError: beginning with ``where``: no tokens, no row of integers, a mask of another shape, or one that hides a whole
        sequence or something within one.
    """
    names = [name for name in TOKEN_NAMES if name in encoding]
    unknown = [name for name in encoding if name not in (*TOKEN_NAMES, MASK_NAME, *OTHER_NAMES)]
    if len(names) != 1 or unknown:
        expected = f"{' or '.join(TOKEN_NAMES)}, and at most {MASK_NAME} beside them"
        raise InputError(f"{where}: expected tokens under {expected}, got {', '.join(map(str, encoding))}")
    rows, single = as_rows(encoding[names[0]], where)
    mask = encoding.get(MASK_NAME)
    if mask is None:
        return rows, single
    masks, _ = as_rows(mask, f"{where}: {MASK_NAME}")
    if [len(row) for row in rows] != [len(row) for row in masks]:
        raise InputError(f"{where}: {MASK_NAME} has another shape than {names[0]}; expected the same")
    return [_kept(row, kept, f"{where}: {MASK_NAME}") for row, kept in zip(rows, masks, strict=True)], single


def as_rows(value: object, where: str) -> tuple[list[Int[np.ndarray, " length"]], bool]:
    """Rows of integers from one row or several, of one length or not, and whether it was one.

    Raises:
      InputError: beginning with ``where``.
    """
    check_unmasked(where, value)
    expected = "expected integers [length] or [batch, length]"
    if isinstance(value, str | bytes | Mapping) or not (hasattr(value, "__array__") or isinstance(value, list | tuple)):
        raise InputError(f"{where}: {expected}, got {type(value).__name__}")
    try:
        parts = list(cast(Iterable[object], np.asarray(value) if hasattr(value, "__array__") else value))
        single = not parts or np.ndim(parts[0]) == 0  # pyright: ignore[reportArgumentType]
        rows = [np.asarray(row) for row in ([value] if single else parts)]
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{where}: {expected} ({reason(error)})") from None
    for row in rows:
        if row.ndim != 1 or not row.size or not (np.issubdtype(row.dtype, np.integer) or row.dtype == bool):
            raise InputError(f"{where}: {expected}, got {row.dtype} of shape {row.shape} in it")
    return rows, single


def _kept(row: Int[np.ndarray, " length"], mask: np.ndarray, where: str) -> Int[np.ndarray, " length"]:
    """The part of a row that its mask shows."""
    if not np.isin(mask, (0, 1)).all():
        raise InputError(f"{where} holds {mask.max()}; expected 1, and 0 for padding")
    (shown,) = np.nonzero(mask)
    if not shown.size:
        raise InputError(f"{where} hides all tokens of a sequence; expected that it shows one")
    if shown[-1] - shown[0] + 1 != shown.size:
        raise InputError(f"{where} hides tokens within a sequence; expected padding before or after it alone")
    return row[shown[0] : shown[-1] + 1]
