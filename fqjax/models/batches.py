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
from fqjax.models.encodings import as_rows, rows_of
from fqjax.runtime.arguments import check_unmasked
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason
from fqjax.runtime.validation import MAX_INDEX


def checked_batches(model: nnx.Module, calibration: object) -> Iterable[PyTree]:
    """Calibration data, each batch of it checked, and made what the model is called with.

    Args:
      model: that is to run on it.  One of fqjax's own takes integer tokens [batch, length] or [length], alone, in a tuple, or
        in a mapping as a tokenizer gives it (:func:`fqjax.models.encodings.rows_of`).  Padding is cut off, and sequences of
        several lengths become several batches.
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
    numbered = ((batch, f"calibration: batch {i}") for i, batch in enumerate(calibration))
    if isinstance(model, CausalLM):
        checked = (tokens for batch, where in numbered for tokens in _tokens(model, batch, where))
    else:
        checked = (_checked(batch, where) for batch, where in numbered)
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


def _checked(batch: object, where: str) -> PyTree:
    """A batch for a model of one's own: what it is called with."""
    if isinstance(batch, list):
        batch = _as_array(batch, where)
    elif isinstance(batch, Mapping):
        batch = {name: _without_lists(value, where) for name, value in batch.items()}
    elif type(batch) is tuple:
        batch = tuple(_without_lists(value, where) for value in batch)
    leaves = jax.tree.leaves(batch)
    for leaf in leaves:
        _check_array(leaf, where)
    if not any(np.ndim(leaf) for leaf in leaves):
        raise InputError(f"{where}: expected arrays with an axis of the batch, got {_kinds(leaves)}")
    return batch


def _without_lists(value: object, where: str) -> object:
    """An argument; an array if it is lists of numbers, as a tokenizer gives them."""
    is_numbers = isinstance(value, list) and all(isinstance(leaf, int | float) for leaf in jax.tree.leaves(value))
    return _as_array(value, where) if is_numbers and value else value


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


def _tokens(model: CausalLM, batch: object, where: str) -> Iterator[np.ndarray]:
    """The tokens of a batch for one of fqjax's own models: several arrays if its sequences have several lengths.

    The array with the most tokens comes first: of all batches, the first is what sensitivities are measured on.
    """
    if isinstance(batch, tuple):
        if len(batch) != 1:
            raise InputError(f"{where}: expected tokens alone, got a tuple of {len(batch)}")
        batch = batch[0]
    if isinstance(batch, Mapping):
        rows, _ = rows_of(batch, where)
    else:
        if not isinstance(batch, list):
            _check_array(batch, where)
        rows, _ = as_rows(batch, where)
    of_length: dict[int, list[np.ndarray]] = {}
    for row in rows:
        of_length.setdefault(len(row), []).append(row)
    for alike in sorted(of_length.values(), key=lambda alike: -sum(map(len, alike))):
        tokens = np.stack(alike)
        _check_array(tokens, where)
        if not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"{where}: expected integer tokens, got {tokens.dtype}")
        try:
            check_tokens(tokens, model.config, tokens.shape[1])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        yield tokens.astype(np.int32)
