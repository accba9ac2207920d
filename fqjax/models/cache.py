"""The key-value cache: static arrays that a decoding loop writes into, in floating point or in INT8.

A cache holds a row of positions for every sequence, or pages that sequences take as they need them: then a table says in
which page each of a sequence's positions lies.  Page 0 is nobody's: what belongs to no sequence is written there.

In INT8 every token has a scale of its own for each head's key and for its value, the largest magnitude over 127: what a
token is rounded to does not depend on the tokens around it, so a prompt may be taken up in pieces of any length.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Float32, Int, Int8, Int32

from fqjax.runtime.arguments import shown
from fqjax.runtime.errors import InputError
from pallas_kernels import quantize_per_token
from pallas_kernels.attention.problem import MOST_ELEMENTS

Kind = Literal["int8"]
"""Names of caches other than one of the model's own dtype."""


def dtype_of(kind: str | None) -> DTypeLike | None:
    """The dtype that :meth:`fqjax.models.causal_lm.CausalLM.make_cache` takes for a cache of that name; None for None.

    Raises:
      InputError: if there is none of that name.
    """
    if not isinstance(kind, str | None) or kind not in (None, *get_args(Kind)):
        raise InputError(
            f"kv_cache {shown(kind)}: expected {' or '.join(get_args(Kind))}, or None for the model's own dtype"
        )
    return None if kind is None else jnp.dtype(kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values.

    Attributes:
      keys, values: (batch, capacity, kv_heads, head_dim); int8 codes if there are scales.
      key_scales, value_scales: float32 (batch, capacity, kv_heads), what codes are multiplied with; None in floating point.
      pages: int32 (batch, n), the pages that hold each sequence's positions, in their order; then the other arrays are
        (pages, page_size, ...) instead of (batch, capacity, ...).  None where every sequence has a row.
    """

    keys: Array
    values: Array
    key_scales: Float32[Array, "batch capacity kv_heads"] | None = None
    value_scales: Float32[Array, "batch capacity kv_heads"] | None = None
    pages: Int32[Array, "batch n"] | None = None

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Keys and values, and their scales if there are any."""
        held = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(array for array in held if array is not None)

    @property
    def capacity(self) -> int:
        """Positions of a sequence."""
        return self.keys.shape[1] if self.pages is None else self.pages.shape[1] * self.keys.shape[1]

    def holding(self, arrays: Iterable[Array]) -> "LayerCache":
        """The same cache with other arrays, in the order of :attr:`arrays`."""
        return LayerCache(*arrays, *[None] * (4 - len(self.arrays)), pages=self.pages)

    @property
    def is_int8(self) -> bool:
        """Whether keys and values are codes with scales."""
        return self.key_scales is not None

    def write(
        self,
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        lengths: Int[Array, " batch"] | None,
    ) -> "LayerCache":
        """The cache with new entries after each sequence's own length; ``lengths`` is None where it is empty."""
        (k, k_scale), (v, v_scale) = (quantize_heads(k), quantize_heads(v)) if self.is_int8 else ((k, None), (v, None))
        new = [entries for entries in (k, v, k_scale, v_scale) if entries is not None]
        put = write if self.pages is None else functools.partial(write_to_pages, self.pages)
        return self.holding(put(o, n, lengths) for o, n in zip(self.arrays, new, strict=True))

    def rounded(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Keys and values as they would be read again from this cache, in the dtype that they have."""
        if not self.is_int8:
            return k.astype(self.keys.dtype).astype(k.dtype), v.astype(self.values.dtype).astype(v.dtype)
        return dequantize_heads(*quantize_heads(k), k.dtype), dequantize_heads(*quantize_heads(v), v.dtype)

    def read(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """All keys and values in a floating dtype."""
        if self.key_scales is None or self.value_scales is None:
            return self.keys.astype(dtype), self.values.astype(dtype)
        return (
            dequantize_heads(self.keys, self.key_scales, dtype),
            dequantize_heads(self.values, self.value_scales, dtype),
        )

    def block(self, start: Int32[Array, ""], size: int) -> "LayerCache":
        """``size`` positions from ``start`` on, which may have to be moved to the left to fit, as rows.

        Of a cache of pages, whole ones: ``start`` and ``size`` are multiples of their size.
        """
        if self.pages is None:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1), self)
        page = self.keys.shape[1]
        pages = jax.lax.dynamic_slice_in_dim(self.pages, start // page, size // page, axis=1)
        return LayerCache(*(leaf[pages].reshape(len(pages), size, *leaf.shape[2:]) for leaf in self.arrays))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the tokens seen so far.

    Attributes:
      layers: one :class:`LayerCache` a layer; of pages, one for several layers that follow one another, as many for each but
        the last, whose pages stand one layer's after the other's (:meth:`pooled`).
      lengths: tokens held for each sequence, int32 (batch,); positions from there on are unspecified and never read.
      pages: int32 (batch, n), the pages of each sequence in all layers; None where every sequence has a row.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int32[Array, " batch"]
    pages: Int32[Array, "batch n"] | None = None

    @classmethod
    def create(
        cls, layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> "KeyValueCache":
        """An empty cache for ``capacity`` tokens a sequence; with the dtype int8, of codes with scales.

        Raises:
          InputError: if the dtype is neither int8 nor a floating one.
        """
        dtype = jnp.dtype(dtype)
        if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(f"key-value cache of {dtype}: expected int8 or a floating dtype")
        shape = (batch, capacity, kv_heads, head_dim)
        scales = shape[:3] if dtype == jnp.int8 else None

        def layer() -> LayerCache:
            arrays = [jnp.zeros(shape, dtype) for _ in range(2)]
            return LayerCache(*arrays, *([] if scales is None else [jnp.zeros(scales) for _ in range(2)]))

        return cls(tuple(layer() for _ in range(layers)), jnp.zeros(batch, jnp.int32))

    def pooled(self) -> "KeyValueCache":
        """An empty cache like this one, of pages, in which layers share arrays as far as kernels take them.

        A program that is given an array for each layer takes the host longer to call than decoding takes a GPU.
        """
        first, count = self.layers[0], len(self.layers)
        pools = -(-count // max(MOST_ELEMENTS // first.keys.size, 1))
        together = -(-count // pools)
        sizes = [min(together, count - at) for at in range(0, count, together)]
        made = (first.holding(jnp.zeros((n * a.shape[0], *a.shape[1:]), a.dtype) for a in first.arrays) for n in sizes)
        return dataclasses.replace(self, layers=tuple(made))

    def of_layer(self, at: int, count: int) -> LayerCache:
        """What one of a model's ``count`` layers runs with: its pages are in it only while it does."""
        pool, place = divmod(at, self._together(count))
        held = self.layers[pool]
        if self.pages is None or not place:
            return dataclasses.replace(held, pages=self.pages)
        before = place * (self.layers[0].keys.shape[0] // self._together(count))  # Pages of the layers before it there.
        return dataclasses.replace(held, pages=self.pages + before)

    def with_layer(self, at: int, count: int, layer: LayerCache) -> "KeyValueCache":
        """The cache with what that layer has written."""
        pool, layers = at // self._together(count), list(self.layers)
        layers[pool] = dataclasses.replace(layer, pages=None)
        return dataclasses.replace(self, layers=tuple(layers))

    def _together(self, count: int) -> int:
        """How many of a model's layers share arrays; the last ones may be fewer."""
        return -(-count // len(self.layers))

    @property
    def capacity(self) -> int:
        """Tokens a sequence may have."""
        return dataclasses.replace(self.layers[0], pages=self.pages).capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on the device, scales and lengths among them."""
        leaves = jax.tree.leaves(self)
        return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)

    def positions(self, length: int) -> Int32[Array, "batch length"]:
        """Positions of the next ``length`` tokens of each sequence."""
        return self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)


def quantize_heads(x: Float[Array, "*rows dim"]) -> tuple[Int8[Array, "*rows dim"], Float32[Array, "*rows"]]:
    """Codes in [-127, 127] and one scale for every row, from the row's largest magnitude; rounding half to even."""
    ones = jnp.ones(x.shape[-1])
    return quantize_per_token(x, ones, qmax=127, width=x.shape[-1], implementation="xla")


def dequantize_heads(
    codes: Int8[Array, "*rows dim"], scale: Float32[Array, "*rows"], dtype: DTypeLike
) -> Float[Array, "*rows dim"]:
    """Keys or values from their codes and scales."""
    return (codes.astype(jnp.float32) * scale[..., None]).astype(dtype)


def write(
    cache: Array,
    new: Array,
    lengths: Int[Array, " batch"] | None,
) -> Array:
    """Writes new entries (batch, length, ...) into (batch, capacity, ...) after each sequence's own length, or at 0."""
    new = new.astype(cache.dtype)
    if lengths is None:
        return jax.lax.dynamic_update_slice(cache, new, (0,) * cache.ndim)

    def row(old: Array, entries: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice(old, entries, (at, *(0,) * (old.ndim - 1)))

    return jax.vmap(row)(cache, new, lengths)


def write_to_pages(
    pages: Int32[Array, "batch n"], pool: Array, new: Array, lengths: Int[Array, " batch"] | None
) -> Array:
    """Writes new entries (batch, length, ...) into a pool (pages, page_size, ...) after each sequence's own length, or at 0.

    What would stand after a sequence's last page goes to page 0.
    """
    (batch, length), size = new.shape[:2], pool.shape[1]
    new = new.astype(pool.dtype)
    # No two entries go to one place, but for those that go to page 0, where it does not matter which stays: so each is simply
    # stored.  Otherwise a GPU would exchange byte for byte, atomically.
    stored = {"unique_indices": True, "mode": "promise_in_bounds"}
    if lengths is None and length % size == 0 and length // size <= pages.shape[1]:
        whole = new.reshape(batch, length // size, *pool.shape[1:])
        return pool.at[pages[:, : length // size]].set(whole, **stored)
    start = jnp.zeros(batch, jnp.int32) if lengths is None else lengths
    position = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    page = jnp.take_along_axis(pages, position // size, axis=1, mode="fill", fill_value=0)
    return pool.at[page, position % size].set(new, **stored)
