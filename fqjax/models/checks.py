"""Checks of models, and of what they are called with, before any work."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from fqjax.layers.modules import check_module
from fqjax.runtime.errors import InputError, TooLong
from fqjax.runtime.files import reason
from fqjax.runtime.validation import MAX_INDEX

CAPACITY = 64
"""Tokens of the cache with which a model is tried out."""


def check_model(model: object) -> None:
    """Refuses what is no module, and one without values: with shapes in place of arrays, or with arrays that were deleted.

    Raises:
      InputError: naming the array.
    """
    for path, variable in nnx.to_flat_state(nnx.state(check_module(model))):
        for leaf in jax.tree.leaves(variable):
            name = ".".join(map(str, path))
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise InputError(f"model: {name} is a shape without values, as of nnx.eval_shape; expected an array")
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise InputError(f"model: {name} has been deleted, or donated; expected an array")


def check_tokens(tokens: Int[np.ndarray, "..."], config: object, length: int) -> None:
    """Refuses tokens outside the vocabulary and sequences longer than the model has positions.

    Raises:
      InputError: naming the token or the length.
    """
    limit = getattr(config, "max_length", None)
    if limit is not None and length > limit:
        raise TooLong(f"a sequence of {length} tokens is longer than the {limit} positions of the model")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or not tokens.size:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"token {low if low < 0 else high} is not in the model's vocabulary of {vocabulary}")


def check_ids(tokens: Int[np.ndarray, "..."]) -> None:
    """Refuses what int32 does not hold, of a model that does not say what its vocabulary is.

    Raises:
      InputError: naming the token.
    """
    for extreme in (int(tokens.min()), int(tokens.max())) if tokens.size else ():
        if abs(extreme) > MAX_INDEX:
            raise InputError(f"token {extreme}: expected a token id, {MAX_INDEX} at most")


def check_takes(function: Callable[..., object], argument: str, what: str) -> None:
    """Refuses a function without an argument of that name.

    Raises:
      InputError: beginning with ``what``.
    """
    if argument not in inspect.signature(function).parameters:
        raise InputError(f"{what} does not take {argument}, as fqjax.models.causal_lm.CausalLM's does")


def checked_logits(
    run: Callable[[], object], tokens: Int[Array | np.ndarray, "batch length"]
) -> Float[Array, "batch length vocabulary"]:
    """What a model gives for tokens, while it is traced.

    Args:
      run: calls the model.
      tokens: with which it does.

    Raises:
      InputError: if the model cannot be called with them, or gives no logits.
    """
    with _one_line(f"called with tokens of shape {tokens.shape}"):
        logits = run()
    if not _are_logits(logits, *tokens.shape):
        raise InputError(
            f"model: gives {_described(logits)} for tokens {tokens.shape}; expected logits [batch, length, vocabulary]"
        )
    return logits  # pyright: ignore[reportReturnType]


def check_extends(model: nnx.Module) -> None:
    """Tries a model's ``make_cache`` and ``extend`` out, with shapes alone.

    Raises:
      InputError: if they cannot be called as those of :class:`fqjax.models.causal_lm.CausalLM`, or give something else.
    """
    tokens, counts = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    with _one_line("asked for a cache of 1 sequence"):
        cache = jax.eval_shape(lambda: model.make_cache(1, CAPACITY))  # pyright: ignore[reportAttributeAccessIssue]
    with _one_line(f"extended by tokens of shape {tokens.shape}"):
        found = _extended.eval_shape(*nnx.split(model), tokens, cache, counts)
    logits, *rest = found if isinstance(found, tuple) else (found,)
    if len(rest) != 1 or not _are_logits(logits, 1):
        raise InputError(
            f"model: extend gives {_described(found)} for tokens {tokens.shape}; expected logits [batch, vocabulary] and the "
            "cache"
        )
    if _types(rest[0]) != _types(cache):
        raise InputError("model: extend gives a cache of other shapes or types than it takes; expected the same")


@functools.partial(jax.jit, static_argnums=0)
def _extended(graphdef: nnx.GraphDef, state: nnx.State, *arguments: PyTree) -> PyTree:
    return nnx.merge(graphdef, state).extend(*arguments)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """One line for whatever a model has against it; the cause stays attached."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # A model may raise anything.
        raise InputError(f"model: cannot be {what} ({type(error).__name__}: {reason(error)})") from error


def _are_logits(found: object, *axes: int) -> bool:
    """Whether it is an array of real numbers with some axes, and one more."""
    if not isinstance(found, jax.Array | jax.ShapeDtypeStruct):
        return False
    return found.shape[:-1] == axes and jnp.issubdtype(found.dtype, jnp.floating)


def _types(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def _described(found: object) -> str:
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
    return f"{dtype} {shape}" if dtype is not None else f"a {type(found).__name__}"
