"""Rows sorted by expert, cut into tiles of rows of one expert each."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

ROW_ALIGNMENT = 8
"""Rows: the kernels take experts whose numbers of rows are multiples of it, as the copy engine takes rows in eights."""


class Division(NamedTuple):
    """Where tiles of rows sorted by expert begin.

    Attributes:
      expert, begin: of each tile, and its first row; of tiles that are not needed, anything.
      ends: the row after the last one of each expert.
      needed: tiles of each expert.
    """

    expert: Int32[Array, " tiles"]
    begin: Int32[Array, " tiles"]
    ends: Int32[Array, " experts"]
    needed: Int32[Array, " experts"]


def most_tiles(experts: int, rows: int, size: int, alignment: int = 1) -> int:
    """Tiles of ``size`` rows that the worst division of the rows needs, experts having multiples of ``alignment``."""
    fullest = min(experts, rows // alignment)
    return fullest + (rows - alignment * fullest) // size


def divide(group_sizes: Int32[Array, " experts"], count: int, size: int) -> Division:
    """Where ``count`` tiles of ``size`` rows begin, which are enough."""
    ends, needed = jnp.cumsum(group_sizes), -(-group_sizes // size)
    tile_ends, tile = jnp.cumsum(needed), jnp.arange(count)
    expert = jnp.searchsorted(tile_ends, tile, side="right").clip(max=len(group_sizes) - 1)
    begin = (ends - group_sizes)[expert] + (tile - (tile_ends - needed)[expert]) * size
    return Division(expert.astype(jnp.int32), begin.astype(jnp.int32), ends, needed)
