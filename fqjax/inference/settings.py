"""Settings of generation: what callers may ask for, and what a model must have."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int32

from fqjax.inference.sampling import NO_TOKEN, Kinds, Sampling
from fqjax.layers.flattened import Flattened, Structure, flattened
from fqjax.layers.modules import check_module
from fqjax.models.cache import KeyValueCache, Kind, dtype_of
from fqjax.models.causal_lm import CausalLM, GenerativeModel
from fqjax.models.checks import check_extends, check_model, check_takes
from fqjax.runtime.arguments import check_number, check_unmasked, check_whole, shown
from fqjax.runtime.errors import InputError
from fqjax.runtime.memory import memory_bytes
from fqjax.runtime.validation import MAX_FLOAT, MAX_INDEX

MAX_NEW_TOKENS = 2**30
"""Positions are int32, and a prompt has some, too."""

MIN_TEMPERATURE = 1e-6
"""Logits divided by less overflow in float32."""

MAX_PENALTY = 1e6
"""Of repetition; more changes nothing."""

ENDS_IN_BUCKETS = 8
"""Tokens that end a sequence are padded to a multiple of this, so that their number does not compile anew."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """How tokens are drawn.

    Attributes:
      temperature: 0 takes the most likely token; above 0 tokens are drawn.
      top_p: in (0, 1]; draw only from the most likely tokens that hold this much probability.
      top_k: draw only from so many of the most likely tokens; 0 for all.
      min_p: in [0, 1]; draw only tokens at least this times as likely as the most likely one; 0 for all.
      repetition_penalty: what logits of tokens are divided by that are in the prompt or the continuation already, if
        positive, and multiplied with if negative; 1 for nothing (arXiv 1909.05858, section 4.1).
      seed: of the draws, any whole number, modulo 2**32.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuses settings out of range.

        Raises:
          InputError: naming the setting.
        """
        check_whole("seed", self.seed, most=None)
        temperature = check_number("temperature", self.temperature)
        if temperature != 0 and temperature < MIN_TEMPERATURE:
            raise InputError(
                f"temperature {shown(temperature)}: expected 0, or a finite number of at least {MIN_TEMPERATURE}"
            )
        if temperature > MAX_FLOAT:
            raise InputError(f"temperature {shown(temperature)}: expected at most {MAX_FLOAT:g}")
        if not 0 < check_number("top_p", self.top_p) <= 1:
            raise InputError(f"top_p {shown(self.top_p)}: expected a number above 0, at most 1")
        check_whole("top_k", self.top_k, 0)
        if not 0 <= check_number("min_p", self.min_p) <= 1:
            raise InputError(f"min_p {shown(self.min_p)}: expected a number from 0 to 1")
        if not 1 / MAX_PENALTY <= check_number("repetition_penalty", self.repetition_penalty) <= MAX_PENALTY:
            raise InputError(
                f"repetition_penalty {shown(self.repetition_penalty)}: expected a number from {1 / MAX_PENALTY:g} to "
                f"{MAX_PENALTY:g}"
            )


def sampling_of(draws: Sequence[Draws]) -> Sampling:
    """What programs take, a row for each; checked before."""

    def column(dtype: type[np.generic], get: Callable[[Draws], float]) -> np.ndarray:
        return np.array([get(each) for each in draws], dtype)

    return Sampling(
        seed=np.array([seed_of(each.seed) for each in draws], np.uint32),  # pyright: ignore[reportArgumentType]
        temperature=column(np.float32, lambda d: d.temperature),  # pyright: ignore[reportArgumentType]
        top_p=column(np.float32, lambda d: d.top_p),  # pyright: ignore[reportArgumentType]
        min_p=column(np.float32, lambda d: d.min_p),  # pyright: ignore[reportArgumentType]
        top_k=column(np.int32, lambda d: d.top_k),  # pyright: ignore[reportArgumentType]
        penalty=column(np.float32, lambda d: d.repetition_penalty),  # pyright: ignore[reportArgumentType]
    )


def kinds_of(draws: Iterable[Draws]) -> Kinds:
    """What any of these needs."""
    drawn = is_sorted = penalized = False
    for each in draws:
        hot = each.temperature > 0
        drawn |= hot
        is_sorted |= hot and (each.top_p < 1 or each.top_k > 0)
        penalized |= each.repetition_penalty != 1
    return Kinds(drawn, is_sorted, penalized)


def check_settings(max_new_tokens: int, draws: Draws) -> int:
    """Refuses settings out of range, and gives the number of tokens as Python's integer.

    Raises:
      InputError: naming the setting.
    """
    draws.check()
    return check_whole("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS)


def eos_of(model: object, eos_token_id: int | Iterable[int] | None) -> tuple[int, ...]:
    """The tokens that end a sequence: those named, or for None the model's own.

    Raises:
      InputError: naming one that is no token id.
    """
    eos = getattr(getattr(model, "config", None), "eos_token_id", ()) if eos_token_id is None else eos_token_id
    if isinstance(eos, np.ndarray | jax.Array):
        eos = cast(int | list[int], check_unmasked("eos_token_id", eos).tolist())
    several = isinstance(eos, Iterable) and not isinstance(eos, str | bytes)
    tokens: tuple[object, ...] = tuple(cast(Iterable[object], eos)) if several else () if eos is None else (eos,)
    try:
        return tuple(check_whole("eos_token_id", token, -MAX_INDEX) for token in tokens)
    except InputError as error:
        raise InputError(f"{str(error).partition(':')[0]}: expected a token id") from None


def ends_array(eos: Sequence[int]) -> Int32[np.ndarray, " ends"]:
    """The tokens that end a sequence as programs take them; what they are filled up with is no token."""
    ends = sorted(set(eos))
    return np.array(ends + [NO_TOKEN] * (-len(ends) % ENDS_IN_BUCKETS or ENDS_IN_BUCKETS * (not ends)), np.int32)


def seed_of(seed: int) -> np.uint32:
    """The seed of a random key: any whole number, modulo 2**32."""
    return np.uint32(int(seed) % 2**32)


def runnable(model: object) -> Flattened:
    """The model as programs take it, unless generation cannot be had of it.

    Raises:
      InputError: naming a method that it lacks or that gives something else, or an array without a value.
    """
    check_generative(model)
    found = flattened(cast(nnx.Module, model))
    if not _there(found.leaves):
        check_model(model)
    if found.structure not in _tried:  # Once: it is traced.
        if not isinstance(model, CausalLM):
            check_extends(cast(nnx.Module, model))
        _tried.add(found.structure)
    return found


def _there(leaves: tuple[jax.Array, ...]) -> bool:
    """Whether all are arrays with values.  That of no type is looked at, which takes longer where they are hundreds."""
    try:
        return not any([leaf.is_deleted() for leaf in leaves])
    except AttributeError:
        return False


_tried: weakref.WeakSet[Structure] = weakref.WeakSet()


def check_generative(model: object) -> None:
    """Refuses what is no module, or lacks a method that generation needs.

    Raises:
      InputError: naming the method.
    """
    check_module(model)
    for method in ("extend", "make_cache"):
        if not callable(getattr(model, method, None)):
            raise InputError(
                f"model: {type(model).__name__} has no method {method!r}; expected one as that of "
                "fqjax.models.causal_lm.CausalLM"
            )


def check_memory(
    model: GenerativeModel, structure: Structure, batch: int, capacity: int, kv_cache: Kind | None, what: str
) -> None:
    """Refuses a cache that is larger than the device's whole memory, before anything of it is there.

    Raises:
      InputError: beginning with ``what`` was asked for.
    """
    dtype_of(kv_cache)  # It refuses what is no kind of cache, and could not be looked up.
    known = _cache_bytes.setdefault(structure, {})
    needed = known.get((batch, capacity, kv_cache))
    if needed is None:  # Once: it is traced.
        needed = known[batch, capacity, kv_cache] = cache_bytes(model, batch, capacity, kv_cache)
    there = memory_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"{what}: a cache of {batch} x {capacity} tokens takes {needed / 1e9:.4g} GB; expected at most the "
            f"{there / 1e9:.4g} GB that the device has"
        )


_cache_bytes: "weakref.WeakKeyDictionary[Structure, dict[tuple[int, int, Kind | None], int]]" = (
    weakref.WeakKeyDictionary()
)


def cache_bytes(model: GenerativeModel, batch: int, capacity: int, kv_cache: Kind | None) -> int:
    """Bytes of a cache, which is not made.

    Raises:
      InputError: for an unknown kind, or one that the model's ``make_cache`` does not make.
    """
    shapes = jax.eval_shape(lambda: empty_cache(model, batch, capacity, kv_cache))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def empty_cache(model: GenerativeModel, batch: int, capacity: int, kv_cache: Kind | None) -> KeyValueCache:
    """The model's cache, in its own dtype or of the kind named.

    Raises:
      InputError: for an unknown kind, or one that the model's ``make_cache`` does not make.
    """
    dtype = dtype_of(kv_cache)
    if dtype is None:
        return model.make_cache(batch, capacity)
    check_takes(model.make_cache, "dtype", f"kv_cache {kv_cache!r}: the model's make_cache")
    return model.make_cache(batch, capacity, dtype=dtype)
