"""Base of the bundled language models: logits of a whole sequence, and logits of the next token over a cache."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int32, PyTree

from fqjax.models.cache import KeyValueCache, LayerCache
from fqjax.runtime.files import JsonMapping


class GenerativeModel(Protocol):
    """NNX module that :func:`fqjax.generate` and :func:`fqjax.serve` take; :class:`CausalLM`, or one of your own."""

    @property
    def make_cache(self) -> Callable[..., KeyValueCache]:
        """As :meth:`CausalLM.make_cache`; it may lack ``dtype``, and then makes caches of its own dtype alone."""
        ...

    @property
    def extend(self) -> Callable[..., tuple[Array, KeyValueCache]]:
        """As :meth:`CausalLM.extend`."""
        ...


class TextConfig(Protocol):
    """Special tokens of a language model, which every family's configuration has."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None for none."""
        ...

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ...


class CausalLM(nnx.Module):
    """Base of the model families.

    A family supplies ``begin`` (tokens to the first block's input), the blocks, ``final_norm``, ``head`` (hidden states to
    logits) and the sizes of its cache.  :func:`fqjax.generate` and :func:`fqjax.perplexity` need no more than this class's
    public methods, so a model of your own works with them if it has the same methods.
    """

    keep_in_float: ClassVar[tuple[str, ...]] = ()
    """Regular expressions of linear layers that are not quantized."""

    reads_pages: ClassVar[bool] = True
    """Whether :meth:`extend` and :meth:`prefill` take caches of pages (:class:`fqjax.models.cache.KeyValueCache`)."""

    config: Any
    dtype: DTypeLike

    layers: nnx.List
    """The blocks, an ``nnx.List`` of :class:`Block`."""

    @property
    def head_name(self) -> str:
        """The module that :meth:`head` multiplies with, which :func:`fqjax.layers.head.with_int8_head` makes INT8."""
        return "embed_tokens" if self.config.tie_word_embeddings else "lm_head"

    @abc.abstractmethod
    def begin(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache | None = None
    ) -> tuple[Float[Array, "batch length hidden"], tuple[PyTree, ...]]:
        """The first block's input, and the further arguments of every block."""

    @abc.abstractmethod
    def final_norm(self, hidden: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        """The norm after the last block; the identity in a family without one."""

    @abc.abstractmethod
    def head(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocabulary"]:
        """Logits in float32."""

    def trunk(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache | None, *, fresh: bool = False
    ) -> tuple[Float[Array, "batch length hidden"], KeyValueCache | None]:
        """Final hidden states, and the cache with the tokens written after what it held (its lengths unchanged).

        ``fresh`` promises that the cache is empty; its lengths are then not read.
        """
        x, rest = self.begin(tokens, None if fresh else cache)
        x, cache = run_layers(self.layers, x, cache, *rest, fresh=fresh)
        return self.final_norm(x), cache

    def end(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocabulary"]:
        """Logits of what the last block gives."""
        return self.head(self.final_norm(hidden))

    def __call__(
        self, tokens: Int32[Array, "batch length"], cache_dtype: DTypeLike | None = None
    ) -> Float32[Array, "batch length vocabulary"]:
        """Logits at every position, each seeing the tokens up to its own.

        With ``cache_dtype`` they are those that decoding over a cache of that dtype would give: every query sees keys and
        values rounded as the cache holds them, its own among them.
        """
        batch, length = tokens.shape
        cache = None if cache_dtype is None else self.make_cache(batch, length, cache_dtype)
        return self.head(self.trunk(tokens, cache, fresh=cache is not None)[0])

    def prefill(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache, counts: Int32[Array, " batch"]
    ) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
        """:meth:`extend` of an empty cache, from which nothing is read: the tokens attend to each other.

        A cache that held something counts as empty.
        """
        hidden, cache = self.trunk(tokens, cache, fresh=True)  # pyright: ignore[reportAssignmentType]
        return self.head(_last(hidden, counts)), dataclasses.replace(cache, lengths=counts)

    def extend(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache, counts: Int32[Array, " batch"]
    ) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
        """Appends tokens to the cached sequences.

        Args:
          tokens: padded on the right where sequences differ in length.
          cache: what the sequences held so far.
          counts: how many of each row's tokens are real.  A row with none keeps what it had, and its logits mean nothing.

        Returns:
          Logits after each row's last real token, and the cache.
        """
        hidden, cache = self.trunk(tokens, cache)  # pyright: ignore[reportAssignmentType]
        return self.head(_last(hidden, counts)), dataclasses.replace(cache, lengths=cache.lengths + counts)

    @abc.abstractmethod
    def make_cache(self, batch: int, capacity: int, dtype: DTypeLike | None = None) -> KeyValueCache:
        """An empty cache for ``capacity`` tokens a sequence.

        Args:
          batch: sequences.
          capacity: tokens of each.
          dtype: of keys and values; None takes the model's, int8 codes with a scale for each token and head.
        """


class Block(nnx.Module):
    """Base of the blocks, each of which ends with something that is added to its residual stream.

    What it adds is handed on beside the stream, since the norm that the next block begins with can take it up in the same
    pass (:func:`fqjax.models.fused.after_norm`).
    """

    @abc.abstractmethod
    def step(
        self,
        x: Float[Array, "batch length hidden"],
        pending: Float[Array, "batch length hidden"] | None,
        cache: LayerCache | None,
        lengths: Int32[Array, " batch"] | None,
        *rest: PyTree,
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"] | None, LayerCache | None]:
        """Runs the block.

        Args:
          x: the stream.
          pending: what the block before adds to it; None if that has been done.
          cache: this block's keys and values; None without a cache.
          lengths: tokens that each sequence has in it; None if it is empty, or there is none.
          rest: what :meth:`CausalLM.begin` gives besides.

        Returns:
          The stream, what is still to be added to it, and the cache.
        """

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        cache: LayerCache | None,
        lengths: Int32[Array, " batch"] | None,
        *rest: PyTree,
    ) -> tuple[Float[Array, "batch length hidden"], LayerCache | None]:
        """The block alone, with everything added."""
        x, pending, cache = self.step(x, None, cache, lengths, *rest)
        return x if pending is None else x + pending, cache


def run_layers(
    layers: nnx.List,
    x: Float[Array, "batch length hidden"],
    cache: KeyValueCache | None,
    *args: PyTree,
    fresh: bool = False,
) -> tuple[Float[Array, "batch length hidden"], KeyValueCache | None]:
    """Runs one block after the other (:meth:`Block.step`) and gathers the caches.

    ``lengths`` is None where the cache is ``fresh``, that is, empty.  The layers are unrolled: a scan over stacked weights
    would copy every layer's weights at every step of decoding.
    """
    pending, lengths = None, None if cache is None or fresh else cache.lengths
    for at, layer in enumerate(layers):
        before = None if cache is None else cache.of_layer(at, len(layers))
        x, pending, after = layer.step(x, pending, before, lengths, *args)
        cache = None if cache is None else cache.with_layer(at, len(layers), after)
    return x if pending is None else x + pending, cache


def _last(hidden: Float[Array, "batch length hidden"], counts: Int32[Array, " batch"]) -> Float[Array, "batch hidden"]:
    """Hidden states of each row's last real token."""
    return jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]


def eos_ids(hf: JsonMapping) -> tuple[int, ...]:
    """The tokens that end a text, from a Hugging Face configuration, where they are one number, a list, or absent."""
    eos = cast(list[int] | int | None, hf.get("eos_token_id"))
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
