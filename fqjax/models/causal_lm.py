"""What every bundled language model offers: logits of a whole sequence, and logits of the next token over a cache."""

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int32

from fqjax.models.cache import KeyValueCache


class CausalLM(nnx.Module):
    """Base of the model families.

    A family supplies ``begin`` (tokens to the first block's input), the blocks, ``final_norm``, ``head`` (hidden states to
    logits) and the sizes of its cache.  :func:`fqjax.generate` and :func:`fqjax.perplexity` need no more than this class's
    public methods, so a model of your own works with them if it has the same methods.
    """

    keep_in_float: ClassVar[tuple[str, ...]] = ()
    """Regular expressions of linear layers that are not quantized."""

    config: Any
    dtype: DTypeLike

    layers: Any
    """The blocks, an ``nnx.List``; see :meth:`begin`."""

    @abc.abstractmethod
    def begin(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache | None = None
    ) -> tuple[Float[Array, "batch length hidden"], tuple[Any, ...]]:
        """What the first layer gets, and what every layer is called with besides: ``layer(x, cache, lengths, *rest)``."""

    @abc.abstractmethod
    def final_norm(self, hidden: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        """The norm behind the last block; the identity in a family without one."""

    @abc.abstractmethod
    def head(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocabulary"]:
        """Logits in float32."""

    def trunk(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache | None
    ) -> tuple[Float[Array, "batch length hidden"], KeyValueCache | None]:
        """Final hidden states, and the cache with the tokens written behind what it held (its lengths unchanged)."""
        x, rest = self.begin(tokens, cache)
        x, cache = run_layers(self.layers, x, cache, *rest)
        return self.final_norm(x), cache

    def end(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocabulary"]:
        """Logits of what the last block gives."""
        return self.head(self.final_norm(hidden))

    def __call__(self, tokens: Int32[Array, "batch length"]) -> Float32[Array, "batch length vocabulary"]:
        """Logits at every position, each seeing the tokens up to its own."""
        return self.head(self.trunk(tokens, None)[0])

    def extend(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache, counts: Int32[Array, " batch"]
    ) -> tuple[Float32[Array, "batch vocabulary"], KeyValueCache]:
        """Appends tokens to the cached sequences.

        Args:
          tokens: padded on the right where sequences differ in length.
          cache: what the sequences held so far.
          counts: how many of each row's tokens are real, at least 1.

        Returns:
          Logits behind each row's last real token, and the cache.
        """
        hidden, cache = self.trunk(tokens, cache)  # pyright: ignore[reportAssignmentType]
        last = jnp.take_along_axis(hidden, (counts - 1)[:, None, None], axis=1)[:, 0]
        return self.head(last), KeyValueCache(cache.keys, cache.values, cache.lengths + counts)

    @abc.abstractmethod
    def make_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for ``capacity`` tokens a sequence."""


def run_layers(
    layers: nnx.List, x: Float[Array, "batch length hidden"], cache: KeyValueCache | None, *args: Any
) -> tuple[Float[Array, "batch length hidden"], KeyValueCache | None]:
    """Calls ``layer(x, layer_cache, lengths, *args)`` for each layer in turn and gathers the caches.

    The layers are unrolled: a scan over stacked weights would copy every layer's weights at every step of decoding.
    """
    if cache is None:
        for layer in layers:
            x, _ = layer(x, None, None, *args)
        return x, None
    keys, values = [], []
    for layer, k, v in zip(layers, cache.keys, cache.values, strict=True):
        x, (k, v) = layer(x, (k, v), cache.lengths, *args)
        keys.append(k)
        values.append(v)
    return x, KeyValueCache(tuple(keys), tuple(values), cache.lengths)


def unembed(
    hidden: Float[Array, "... hidden"], table: Float[Array, "vocabulary hidden"]
) -> Float32[Array, "... vocabulary"]:
    """Logits from a table (vocabulary, hidden), accumulated and returned in float32."""
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def eos_ids(hf: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, from a Hugging Face configuration, where they are one number, a list, or absent."""
    eos = hf.get("eos_token_id")
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
