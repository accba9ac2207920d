"""Text generation: the prompts, in pieces if they are long, then one jitted loop over a static, donated cache.

Prompts of different lengths share a batch by padding on the right.  Every sequence keeps its own length and writes after
it, so positions are those it would have alone, and padding is overwritten before it could be seen.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from fqjax.inference.sampling import is_end, sample
from fqjax.layers.record import automatic_axes, split_to_run
from fqjax.models.cache import KeyValueCache, Kind, dtype_of
from fqjax.models.causal_lm import CausalLM, GenerativeModel
from fqjax.models.checks import check_extends, check_ids, check_model, check_takes, check_tokens
from fqjax.runtime.arguments import check_number, check_unmasked, check_whole, shown
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason
from fqjax.runtime.memory import memory_bytes
from fqjax.runtime.validation import MAX_FLOAT, MAX_INDEX

GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
"""How loops over tokens are compiled: what XLA puts into CUDA graphs by default, and loops.  Without these the host waits for
the device in every turn, to see whether there is another, and then launches some hundred kernels one by one."""
BUCKET = 64
"""Prompts are padded to a multiple of this, so that lengths share compiled programs."""

MAX_NEW_TOKENS = 2**30
"""Positions are int32, and a prompt has some, too."""

MIN_TEMPERATURE = 1e-6
"""Logits divided by less overflow in float32."""

CHUNK = 2048
"""Tokens of a prompt taken up at once, unless told otherwise."""


Carry = tuple[Array, Array, Array, Array, KeyValueCache]
"""State of the decoding loop: its step, the tokens so far, the last of them, which sequences have ended, and the cache."""


class Sampling(NamedTuple):
    """How tokens are drawn: arrays, so that changing them does not compile again."""

    temperature: Float32[Array, ""]
    top_p: Float32[Array, ""]


@automatic_axes()
def generate(
    model: GenerativeModel,
    prompt_tokens: object,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Iterable[int] | None = None,
    *,
    kv_cache: Kind | None = None,
    prefill_chunk: int = CHUNK,
) -> Int32[np.ndarray, "*batch new"]:
    """Continues one prompt or a batch of prompts.

    Args:
      model: a bundled model, quantized or not, or any NNX module with ``extend`` and ``make_cache``
        (:class:`fqjax.models.causal_lm.CausalLM`); ``prefill`` is used if there is one.
      prompt_tokens: tokens of one prompt, or several prompts of any lengths, each with at least one token.
      max_new_tokens: how many tokens to append at most.
      temperature: 0 takes the most likely token; above 0 tokens are drawn.
      top_p: in (0, 1]; draw only from the most likely tokens that hold this much probability.
      seed: of the draws, any whole number, modulo 2**32; row i of a batch is drawn with seed ``seed + i``.
      eos_token_id: token or tokens that end a sequence; None takes the model's own, an empty list none.
      kv_cache: "int8" keeps keys and values as INT8 codes with a scale for each token and head; None in the model's dtype.
      prefill_chunk: tokens of a prompt taken up at once: longer prompts go in piece by piece, in memory that their length
        does not change but for the cache.

    Returns:
      The new tokens, int32: (new,) for one prompt, (batch, new) for several, with ``new = max_new_tokens``; after its
      end a sequence is filled up with the token that ended it.  Every row is what its prompt gives alone.

    Raises:
      InputError: for an empty prompt, a token outside the vocabulary, more tokens than the model has positions, or
        settings out of range.
    """
    check_generative(model)
    prompts, single = as_prompts(prompt_tokens)
    max_new_tokens = check_settings(max_new_tokens, temperature, top_p, seed)
    prefill_chunk = check_whole("prefill_chunk", prefill_chunk, 1)
    _check_prompts(model, prompts, max_new_tokens)
    eos = eos_of(model, eos_token_id)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(prompts), dtype=jnp.uint32) + seed_of(seed))
    sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p)) if temperature > 0 else None
    tokens, counts = _padded(prompts)
    capacity = tokens.shape[1] + max_new_tokens
    check_memory(model, len(prompts), capacity, kv_cache, f"max_new_tokens {max_new_tokens}")
    cache = empty_cache(model, len(prompts), capacity, kv_cache)
    graphdef, state = split_to_run(cast(nnx.Module, model))
    logits, cache = _take_up(graphdef, state, tokens, counts, cache, prefill_chunk)
    new, _ = decode(graphdef, state, cache, logits, keys, sampling, max_new_tokens, eos)
    return np.asarray(new)[0] if single else np.asarray(new)


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


def seed_of(seed: int) -> np.uint32:
    """The seed of a random key: any whole number, modulo 2**32."""
    return np.uint32(int(seed) % 2**32)


def check_generative(model: object) -> None:
    """Refuses what is no module or has no values, and what lacks a method that generation needs, or has one of another kind.

    Raises:
      InputError: naming the method.
    """
    check_model(model)
    for method in ("extend", "make_cache"):
        if not callable(getattr(model, method, None)):
            raise InputError(
                f"model: {type(model).__name__} has no method {method!r}; expected one as that of "
                "fqjax.models.causal_lm.CausalLM"
            )
    if not isinstance(model, CausalLM):
        check_extends(cast(nnx.Module, model))


def check_memory(model: GenerativeModel, batch: int, capacity: int, kv_cache: Kind | None, what: str) -> None:
    """Refuses a cache that is larger than the device's whole memory, before anything of it is there.

    Raises:
      InputError: beginning with ``what`` was asked for.
    """
    shapes = jax.eval_shape(lambda: empty_cache(model, batch, capacity, kv_cache))
    needed, there = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)), memory_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"{what}: a cache of {batch} x {capacity} tokens takes {needed / 1e9:.4g} GB; expected at most the "
            f"{there / 1e9:.4g} GB that the device has"
        )


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


def take_up(
    model: GenerativeModel, tokens: Array | np.ndarray, cache: KeyValueCache, counts: Array | np.ndarray
) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
    """The model's ``prefill`` of an empty cache, or its ``extend`` if it has no other."""
    return getattr(model, "prefill", model.extend)(tokens, cache, counts)


def _check_prompts(model: GenerativeModel, prompts: list[np.ndarray], max_new_tokens: int) -> None:
    """Refuses tokens outside the vocabulary, and more positions than the model has for the longest prompt."""
    config = getattr(model, "config", None)
    longest = max(map(len, prompts))
    for prompt in prompts:
        check_tokens(prompt, config, longest + max_new_tokens)


def _padded(prompts: list[np.ndarray]) -> tuple[Int32[np.ndarray, "batch width"], Int32[np.ndarray, " batch"]]:
    width = -(-max(map(len, prompts)) // BUCKET) * BUCKET
    tokens = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in prompts]).astype(np.int32)
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def _take_up(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: np.ndarray,
    counts: np.ndarray,
    cache: KeyValueCache,
    chunk: int,
) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
    """Logits after each prompt, and the cache; piece by piece, of which shorter prompts fill fewer."""
    logits = None
    for start in range(0, tokens.shape[1], chunk):
        here = np.clip(counts - start, 0, chunk).astype(np.int32)
        if not here.any():
            break  # Nothing but padding.
        piece = tokens[:, start : start + chunk]
        if logits is None:
            logits, cache = prefill(graphdef, state, piece, cache, here)
        else:
            logits, cache = _extend(graphdef, state, piece, cache, here, logits)
    assert logits is not None
    return logits, cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def prefill(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int32[Array, "batch width"] | np.ndarray,
    cache: KeyValueCache,
    counts: Int32[Array, " batch"] | np.ndarray,
) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
    """Logits after each prompt (:func:`take_up`), and the cache with the prompts in it; the empty one is donated."""
    return take_up(nnx.merge(graphdef, state), tokens, cache, counts)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 5))
def _extend(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int32[Array, "batch width"],
    cache: KeyValueCache,
    counts: Int32[Array, " batch"],
    before: Float32[Array, "batch vocabulary"],
) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
    """Logits of rows whose prompt has ended stay what they were."""
    logits, cache = nnx.merge(graphdef, state).extend(tokens, cache, counts)
    return jnp.where(counts[:, None] > 0, logits, before), cache


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2, compiler_options=GRAPHS)
def decode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: KeyValueCache,
    logits: Float32[Array, "batch vocabulary"],
    keys: Array,
    sampling: Sampling | None,
    steps: int,
    eos: tuple[int, ...],
) -> tuple[Int32[Array, "batch steps"], KeyValueCache]:
    """The loop: append the last token, pick the next; until there are enough, or all sequences have ended.

    Args:
      graphdef, state: the model, as ``nnx.split`` gives it.
      cache: what the sequences hold; it is donated.
      logits: of the tokens after them.
      keys: a random key for each row; not looked at without ``sampling``.
      sampling: None takes the most likely tokens.
      steps: how many tokens are wanted, the first of which ``logits`` gives.
      eos: tokens that end a sequence.
    """
    model = nnx.merge(graphdef, state)
    batch = logits.shape[0]

    def pick(logits: Array, step: Array) -> Array:
        if sampling is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), *sampling)

    def body(carry: Carry) -> Carry:
        step, out, token, ended, cache = carry
        logits, cache = model.extend(token[:, None], cache, jnp.ones(batch, jnp.int32))
        # A sequence that has ended repeats its last token.
        token = jnp.where(ended, token, pick(logits, step))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        return step + 1, out, token, ended | is_end(token, eos), cache

    def unfinished(carry: Carry) -> Array:
        step, _, _, ended, _ = carry
        return (step < steps) & ~jnp.all(ended)

    first = pick(logits, jnp.int32(0))
    out = jnp.zeros((batch, steps), jnp.int32).at[:, 0].set(first)
    start = (jnp.int32(1), out, first, is_end(first, eos), cache)
    done, out, token, _, cache = jax.lax.while_loop(unfinished, body, start)
    # Where all ended early, the rest is filled with each sequence's last token.
    return jnp.where(jnp.arange(steps) < done, out, token[:, None]), cache


def as_prompts(prompt_tokens: object) -> tuple[list[np.ndarray], bool]:
    """A list of prompts, and whether one alone was given."""
    is_array = isinstance(prompt_tokens, np.ndarray | jax.Array)
    if not (is_array or isinstance(prompt_tokens, Sequence)) or isinstance(prompt_tokens, str | bytes):
        raise InputError(f"prompt: expected token ids, got {type(prompt_tokens).__name__}")
    if is_array and not prompt_tokens.ndim:
        raise InputError(f"prompt: expected a row of token ids, got {prompt_tokens.dtype} of shape ()")
    if len(prompt_tokens) == 0:
        raise InputError("prompt: empty; expected at least one token")
    check_unmasked("prompt", prompt_tokens)
    try:
        single = np.ndim(prompt_tokens[0]) == 0
        prompts = [np.asarray(p) for p in ([prompt_tokens] if single else prompt_tokens)]
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"prompt: expected a row of integer token ids ({reason(error)})") from None
    for prompt in prompts:
        if not prompt.size:
            raise InputError("prompt: empty; expected at least one token")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise InputError(f"prompt: expected a row of integer token ids, got {prompt.dtype} of shape {prompt.shape}")
        check_ids(prompt)
    return prompts, single


def check_settings(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> int:
    """Refuses settings out of range.

    Returns:
      ``max_new_tokens`` as Python has it, whose sums do not overflow.

    Raises:
      InputError: naming the setting.
    """
    check_whole("seed", seed, most=None)
    count = check_whole("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS)
    temperature = check_number("temperature", temperature)
    if temperature != 0 and temperature < MIN_TEMPERATURE:
        raise InputError(
            f"temperature {shown(temperature)}: expected 0, or a finite number of at least {MIN_TEMPERATURE}"
        )
    if temperature > MAX_FLOAT:
        raise InputError(f"temperature {shown(temperature)}: expected at most {MAX_FLOAT:g}")
    if not 0 < check_number("top_p", top_p) <= 1:
        raise InputError(f"top_p {shown(top_p)}: expected a number above 0, at most 1")
    return count
