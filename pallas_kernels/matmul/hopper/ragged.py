"""Tiles of rows that are sorted by expert: which rows a tile has, and of whose weight.

A tile has rows of one expert.  How many tiles there are, and where they begin, is known on the device alone: a kernel is told
by an array of int32,

    count;  expert of every tile;  where it begins, in eights;  where its expert's rows end

with room for as many tiles as the worst division needs.  The copy engine takes rows in eights, so every expert's rows begin
at a multiple of 8.  A tile may reach beyond the rows of its expert: it reads what follows, and writes nothing there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import ragged
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.mosaic.compat import Ref, Scalar, plgpu
from pallas_kernels.ragged import ROW_ALIGNMENT


class Rows(NamedTuple):
    """The rows of a tile.

    Attributes:
      expert: whose weight they meet.
      begin: the first.
      end: the first that is not written any more.
    """

    expert: Scalar
    begin: Scalar
    end: Scalar


def most_tiles(p: Problem, size: int) -> int:
    """Tiles of ``size`` rows that the worst division of the rows into experts needs."""
    return ragged.most_tiles(p.experts, p.m, size, ROW_ALIGNMENT)


def visits(p: Problem, group_sizes: jax.Array, size: int) -> jax.Array:
    """The array that tells a kernel of its tiles; ``group_sizes``, rows of each expert, are multiples of 8."""
    expert, begin, ends, needed = ragged.divide(group_sizes, most_tiles(p, size), size)
    return jnp.concatenate([jnp.sum(needed)[None], expert, begin // ROW_ALIGNMENT, ends[expert]]).astype(jnp.int32)


def count(p: Problem, visits: Ref | None, size: int) -> Scalar:
    """How many tiles of ``size`` rows there are; ``visits`` is the reference to :func:`visits`, None without experts."""
    return -(-p.m // size) if visits is None else visits[0]


def rows(p: Problem, visits: Ref | None, tile: Scalar, size: int) -> Rows:
    """The rows of a tile."""
    if visits is None:
        return Rows(0, tile * size, p.m)
    most = most_tiles(p, size)
    return Rows(visits[1 + tile], visits[1 + most + tile] * ROW_ALIGNMENT, visits[1 + 2 * most + tile])


def write(p: Problem, source: Ref, out: Ref, at: Scalar, channels: object, end: Scalar) -> None:
    """Starts to copy results from shared memory to the rows from ``at`` on, up to ``end``, as one group of copies."""
    size = source.shape[0]
    if not p.experts:
        plgpu.copy_smem_to_gmem(source, out.at[pl.ds(at, size), channels])
        return

    def copy(first: int, size: int) -> None:
        part = source.at[pl.ds(first, size)]
        plgpu.copy_smem_to_gmem(part, out.at[pl.ds(at + first, size), channels], commit_group=False)

    pl.when(at + size <= end)(lambda: copy(0, size))
    for first in range(0, size, ROW_ALIGNMENT):
        cut_off = (at + size > end) & (at + first < end)
        pl.when(cut_off)(lambda first=first: copy(first, ROW_ALIGNMENT))
    plgpu.commit_smem_to_gmem_group()  # Also where nothing was copied: who waits counts on one for every call.


def cannot_use(p: Problem) -> str | None:
    """Why the kernels cannot take a problem with experts; None if they can."""
    if p.bias:
        return "experts have no biases"
    return f"{p.m} rows are not a multiple of {ROW_ALIGNMENT}" if p.m % ROW_ALIGNMENT else None


def tiles_expected(p: Problem, size: int) -> int:
    """Tiles of ``size`` rows, if experts have about as many rows each, of which the last tile is half full."""
    tiles = -(-p.m // size)
    return min(most_tiles(p, size), tiles + p.experts // 2) if p.experts else tiles
