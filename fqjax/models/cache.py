"""The key-value cache: static arrays that a decoding loop writes into."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the tokens seen so far, one pair of arrays a layer.

    Attributes:
      keys, values: tuples of (batch, capacity, kv_heads, head_dim), one entry a layer.
      lengths: tokens held for each sequence, int32 (batch,); positions from there on are unspecified and never read.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Int32[Array, " batch"]

    @classmethod
    def create(
        cls, layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> "KeyValueCache":
        """An empty cache for ``capacity`` tokens a sequence."""
        shape = (batch, capacity, kv_heads, head_dim)
        keys = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
        values = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
        return cls(keys, values, jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Tokens a sequence may have."""
        return self.keys[0].shape[1]

    def positions(self, length: int) -> Int32[Array, "batch length"]:
        """Positions of the next ``length`` tokens of each sequence."""
        return self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)


LayerCache = tuple[Float[Array, "batch capacity kv_heads head_dim"], Float[Array, "batch capacity kv_heads head_dim"]]
"""One layer's keys and values."""


def write(
    cache: Float[Array, "batch capacity heads dim"],
    new: Float[Array, "batch length heads dim"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch capacity heads dim"]:
    """Writes new entries behind each sequence's own length."""

    def row(old: Array, entries: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice(old, entries.astype(old.dtype), (at, 0, 0))

    return jax.vmap(row)(cache, new, lengths)
