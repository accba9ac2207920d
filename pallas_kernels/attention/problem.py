"""The problem that an attention kernel is made for, and how the Triton kernel's work is cut up."""

import dataclasses
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.attention.codes import Recipe

MOST_ELEMENTS = 2**31 - 1
"""Of an operand: kernels number them in 32 bits."""
PROGRAMS = 132
"""Programs that are wanted on a GPU at least: one for each multiprocessor of an H100 or H200."""
MANY_HEADS = 3 * PROGRAMS
"""Key-value heads of all sequences from which on every multiprocessor has several programs at once."""
UPPER_CODE_UNIT = 128
"""Value of one in the upper of a query's two codes, each of which fits into int8."""
MMA_ROWS = 16
"""Of a matrix product on tensor cores, at least; fewer query heads are filled up."""
LIGHT_DIM = 128
"""Of a head whose output for the least rows fits into the registers of one warp, at most."""
WHOLE_HEADS = 112
"""Key-value heads from which on one program for each computes its whole output."""
WHOLE_CAPACITY = 1024
"""Capacity of the cache up to which it does."""
MMA_CODES = 32
"""That a matrix product of integers adds up on tensor cores, at least."""


def capacity_of(cache: Sequence[Array], pages: Array | None) -> int:
    """Positions of a sequence, in a cache of rows or of pages."""
    return cache[0].shape[1] if pages is None else pages.shape[1] * cache[0].shape[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How the work is cut up.

    Attributes:
      splits: programs for each key-value head of a sequence; None for so many that the GPU is filled.
      block: positions that a program reads at once.
      warps, stages: of a program, and blocks that it has on their way.
      integers: whether queries are multiplied with a cache's INT8 codes as integers, of 15 bits in two parts.
    """

    splits: int | None = None
    block: int = 64
    warps: int = 4
    stages: int = 3
    integers: bool = False

    def programs(self, heads: int, capacity: int) -> int:
        """For each of so many key-value heads of all sequences together, with a cache of that capacity."""
        return self.splits or min(-(-PROGRAMS // heads), -(-capacity // self.block))


def best_cut(heads: int, group: int, dim: int, codes: bool, *, whole: bool = False) -> Cut:
    """The fastest of those tried on an H200 in November 2026; ``scripts/tune_decoding.py`` tries them again.

    Args:
      heads: key-value heads of all sequences together.
      group: query heads that share one.
      dim: of a head.
      codes: whether the cache is INT8.
      whole: whether the output is to be quantized with fixed scales, which one program for each key-value head can do
        itself, and the cache is so short that one is enough.
    """
    if group > MMA_ROWS or dim > LIGHT_DIM:  # One warp or two cannot hold the output.
        return Cut()
    if heads >= MANY_HEADS:
        return Cut(block=32, warps=1, integers=codes and dim >= MMA_CODES)
    if whole and WHOLE_HEADS <= heads:
        return Cut(splits=1, block=128, integers=codes and dim >= MMA_CODES)
    return Cut() if codes or heads < PROGRAMS // 2 else Cut(warps=2)


class Schedule(Protocol):
    """How the work is cut up: a :class:`Cut`, or one of :mod:`pallas_kernels.attention.hopper`; hashable."""

    @property
    def warps(self) -> int:
        """Of a program."""
        ...

    def programs(self, heads: int, capacity: int) -> int:
        """For each of so many key-value heads of all sequences together, with a cache of that capacity."""
        ...


ScheduleT = TypeVar("ScheduleT", bound=Schedule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Generic[ScheduleT]):
    """Sizes that a kernel is made for, the factor of the scores, and how the work is cut up.

    Where one program finds all of a head's output, it can quantize it: then ``qmax`` is the largest code, and ``extra`` how
    many channels there are for large ones to continue in.  ``page`` is how many positions a page of the cache holds, and
    ``pool`` how many pages there are; 0 where every sequence has a row of ``capacity`` positions.
    """

    batch: int
    capacity: int
    kv_heads: int
    group: int
    dim: int
    dtype: np.dtype
    cache_dtype: np.dtype
    codes: bool
    rotates: bool
    scale: float
    window: int | None
    cut: ScheduleT
    qmax: int = 0
    extra: int = 0
    page: int = 0
    pool: int = 0

    @classmethod
    def of(
        cls,
        qkv: Array,
        rotation: Sequence[Array],
        cache: Sequence[Array],
        scale: float,
        window: int | None,
        cut: ScheduleT,
        pages: Array | None = None,
    ) -> "Problem[ScheduleT]":
        """For such operands."""
        (batch, heads, dim), (pool, size, kv_heads, _) = qkv.shape, cache[0].shape
        capacity = capacity_of(cache, pages)
        return cls(
            batch=batch,
            capacity=capacity,
            kv_heads=kv_heads,
            group=heads // kv_heads - 2,
            dim=dim,
            dtype=qkv.dtype,
            cache_dtype=cache[0].dtype,
            codes=len(cache) > 2,
            rotates=bool(rotation),
            scale=scale,
            window=window,
            cut=cut,
            page=0 if pages is None else size,
            pool=0 if pages is None else pool,
        )

    def quantizing(self, recipe: Recipe) -> "Problem[ScheduleT]":
        """The same for a kernel that quantizes its output."""
        return dataclasses.replace(self, qmax=recipe.qmax, extra=len(recipe.source))

    @property
    def table(self) -> int:
        """Pages of a sequence; 0 where it has a row."""
        return self.capacity // self.page if self.page else 0

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Of keys and values: (batch, capacity, kv_heads, dim), or (pool, page, kv_heads, dim)."""
        held = (self.pool, self.page) if self.page else (self.batch, self.capacity)
        return (*held, self.kv_heads, self.dim)

    @property
    def splits(self) -> int:
        return self.cut.programs(self.batch * self.kv_heads, self.capacity)

    @property
    def rows(self) -> int:
        return max(MMA_ROWS, pl.next_power_of_2(self.group))
