"""Batches of calibration data: what they may be, checked before anything is computed with them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from fqjax.layers.surgery import spoken
from fqjax.models.causal_lm import CausalLM
from fqjax.models.checks import check_tokens
from fqjax.runtime.arguments import check_unmasked
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason
from fqjax.runtime.validation import MAX_INDEX

TOKEN_NAMES = ("tokens", "input_ids")
"""Names that a mapping may give a language model's tokens."""


def checked_batches(model: nnx.Module, calibration: object) -> Iterable[PyTree]:
    """Calibration data, each batch of it checked, and made what the model is called with.

    Args:
      model: that is to run on it.  One of fqjax's own takes integer tokens [batch, length], alone, in a tuple, or in a
        mapping as a tokenizer gives it, without padding.
      calibration: batches; those of a list or tuple are checked now, those of any other iterable as they come.

    Raises:
      InputError: naming ``calibration``, or the batch at fault: no iterable of batches; an entry that is empty, ragged, a
        scalar, a text, an object or complex; tokens of another shape or outside the vocabulary.
    """
    if not callable(model):
        raise InputError(f"model: {type(model).__name__} cannot be called; expected a module with a method __call__")
    if isinstance(calibration, str | bytes | Mapping) or hasattr(calibration, "__array__"):
        kind = "array" if hasattr(calibration, "__array__") else type(calibration).__name__
        raise InputError(f"calibration: expected an iterable of batches, got one {kind}; pass a list of it")
    if not isinstance(calibration, Iterable):
        raise InputError(f"calibration: expected an iterable of batches, got {type(calibration).__name__}")
    checked = (_checked(model, batch, f"calibration: batch {i}") for i, batch in enumerate(calibration))
    return list(checked) if isinstance(calibration, list | tuple) else checked


@contextlib.contextmanager
def running(path: str, number: int, arguments: Callable[[], PyTree]) -> Iterator[None]:
    """Turns whatever a model has against a batch that it is called with into one line; the cause stays attached.

    Args:
      path: of the block that runs; empty for the whole model.
      number: of the batch.
      arguments: what the block is called with.

    Raises:
      InputError: naming the batch and its shapes.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # A model may raise anything for an input that it was not made for.
        shapes = ", ".join(_described(leaf) for leaf in jax.tree.leaves(arguments())) or "nothing"
        raise InputError(
            f"calibration: batch {number}: {spoken(path)} cannot be called with {shapes} ({type(error).__name__}: "
            f"{reason(error)})"
        ) from error


def _described(leaf: object) -> str:
    shape, dtype = np.shape(leaf), getattr(leaf, "dtype", type(leaf).__name__)  # pyright: ignore[reportArgumentType]
    return f"{dtype} {shape}"


def _checked(model: nnx.Module, batch: object, where: str) -> PyTree:
    if isinstance(model, CausalLM):
        return _tokens(model, batch, where)
    if isinstance(batch, list):
        batch = _as_array(batch, where)
    elif isinstance(batch, Mapping):
        batch = dict(batch)
    leaves = jax.tree.leaves(batch)
    for leaf in leaves:
        _check_array(leaf, where)
    if not any(np.ndim(leaf) for leaf in leaves):
        raise InputError(f"{where}: expected arrays with an axis of the batch, got {_kinds(leaves)}")
    return batch


def _kinds(leaves: list[object]) -> str:
    return ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in leaves)) or "nothing"


def _as_array(batch: object, where: str) -> np.ndarray:
    check_unmasked(where, batch)
    try:
        return np.asarray(batch)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: expected an array, or lists of equal lengths ({reason(error)})") from None


def _check_array(leaf: object, where: str) -> None:
    """Refuses what is no array of real numbers that 32 bits hold."""
    array = leaf if isinstance(leaf, jax.Array) else _as_array(leaf, where)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.integer, jnp.floating, np.bool_)):
        raise InputError(f"{where}: expected real numbers, got {array.dtype} of shape {array.shape}")
    if not array.size:
        raise InputError(f"{where}: empty, of shape {array.shape}; expected at least one row")
    wide = isinstance(array, np.ndarray) and array.dtype.itemsize > 4 and array.dtype.kind in "iu"
    if wide and (int(array.max()) > MAX_INDEX or int(array.min()) < -MAX_INDEX):
        raise InputError(f"{where}: a whole number beyond {MAX_INDEX}, which 32 bits do not hold")


def _tokens(model: CausalLM, batch: object, where: str) -> np.ndarray:
    """The tokens of a batch for one of fqjax's own models."""
    if isinstance(batch, Mapping):
        batch = _without_padding(batch, where)
    if isinstance(batch, tuple) and len(batch) == 1:
        batch = batch[0]
    tokens = _as_array(batch, where)
    _check_array(tokens, where)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(
            f"{where}: expected integer tokens [batch, length], got {tokens.dtype} of shape {tokens.shape}"
        )
    try:
        check_tokens(tokens, model.config, tokens.shape[1])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return tokens.astype(np.int32)


def _without_padding(batch: Mapping[str, object], where: str) -> object:
    """The tokens of what a tokenizer gives, where its mask hides none of them."""
    names = [name for name in TOKEN_NAMES if name in batch]
    unknown = [str(name) for name in batch if name not in (*TOKEN_NAMES, "attention_mask", "token_type_ids")]
    if len(names) != 1 or unknown:
        raise InputError(f"{where}: expected tokens under {' or '.join(TOKEN_NAMES)}, got {', '.join(map(str, batch))}")
    if not np.all(_as_array(batch.get("attention_mask", 1), where) == 1):
        raise InputError(f"{where}: its attention_mask hides tokens; expected a batch without padding")
    return batch[names[0]]
