"""Tiles of rows that are sorted by expert: which rows a tile has, and of whose weight.

A tile has rows of one expert.  How many tiles there are, and where they begin, is known on the device alone: a kernel is told
by an array of int32,

    count;  expert of every tile;  where it begins, in eights;  where its expert's rows end

with room for as many tiles as the worst division needs.  The copy engine takes rows in eights, so every expert's rows begin
at a multiple of 8.  A tile may reach beyond the rows of its expert: it reads what follows, and writes nothing there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.matmul import experts
from pallas_kernels.matmul.experts import ALIGNMENT
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.mosaic.compat import plgpu


class Rows(NamedTuple):
    """The rows of a tile.

    Attributes:
      expert: whose weight they meet.
      begin: the first.
      end: the first that is not written any more.
    """

    expert: Any
    begin: Any
    end: Any


def most_tiles(p: Problem, size: int) -> int:
    """Tiles of ``size`` rows that the worst division of the rows into experts needs."""
    return experts.most_tiles(p.experts, p.m, size, ALIGNMENT)


def visits(p: Problem, group_sizes: jax.Array, size: int) -> jax.Array:
    """The array that tells a kernel of its tiles; ``group_sizes``, rows of each expert, are multiples of 8."""
    expert, begin, ends, needed = experts.divide(group_sizes, most_tiles(p, size), size)
    return jnp.concatenate([jnp.sum(needed)[None], expert, begin // ALIGNMENT, ends[expert]]).astype(jnp.int32)


def count(p: Problem, visits: Any, size: int) -> Any:
    """How many tiles of ``size`` rows there are; ``visits`` is the reference to :func:`visits`, None without experts."""
    return visits[0] if p.experts else -(-p.m // size)


def rows(p: Problem, visits: Any, tile: Any, size: int) -> Rows:
    """The rows of a tile."""
    if not p.experts:
        return Rows(0, tile * size, p.m)
    most = most_tiles(p, size)
    return Rows(visits[1 + tile], visits[1 + most + tile] * ALIGNMENT, visits[1 + 2 * most + tile])


def write(p: Problem, source: Any, out: Any, at: Any, channels: Any, end: Any) -> None:
    """Starts to copy results from shared memory to the rows from ``at`` on, up to ``end``, as one group of copies."""
    size = source.shape[0]
    if not p.experts:
        plgpu.copy_smem_to_gmem(source, out.at[pl.ds(at, size), channels])
        return

    def copy(first: int, size: int) -> None:
        part = source.at[pl.ds(first, size)]
        plgpu.copy_smem_to_gmem(part, out.at[pl.ds(at + first, size), channels], commit_group=False)

    pl.when(at + size <= end)(lambda: copy(0, size))
    for first in range(0, size, ALIGNMENT):
        cut_off = (at + size > end) & (at + first < end)
        pl.when(cut_off)(lambda first=first: copy(first, ALIGNMENT))
    plgpu.commit_smem_to_gmem_group()  # Also where nothing was copied: who waits counts on one for every call.


def cannot_use(p: Problem) -> str | None:
    """Why the kernels cannot take a problem with experts; None if they can."""
    if p.bias:
        return "experts have no biases"
    return f"{p.m} rows are not a multiple of {ALIGNMENT}" if p.m % ALIGNMENT else None


def tiles_expected(p: Problem, size: int) -> int:
    """Tiles of ``size`` rows, if experts have about as many rows each, of which the last tile is half full."""
    tiles = -(-p.m // size)
    return min(most_tiles(p, size), tiles + p.experts // 2) if p.experts else tiles
