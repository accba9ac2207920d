"""Codes of attention's output, written by the kernel that computes it (Pallas Triton).

Where one program computes the whole output of a key-value head's query heads, it can quantize it with fixed scales, and
flatten the large channels over extra ones, of which it writes those that continue its own.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.mosaic.math import code_beyond, held_before, rounded, runs
from pallas_kernels.mosaic.types import Ref


class Recipe(NamedTuple):
    """How the output is quantized, with fixed scales; see :func:`pallas_kernels.quantize_activations`."""

    qmax: int
    multiplier: Array
    source: Array
    part: Array


class Sizes(Protocol):
    """Sizes of an attention: key-value heads, query heads of each, channels of each, extra channels, largest code."""

    @property
    def kv_heads(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def extra(self) -> int: ...

    @property
    def qmax(self) -> int: ...


class Channels(NamedTuple):
    """Some of the codes that a program writes.

    Attributes:
      at: the channels of its heads that they are made of.
      multiplier: of those.
      to: where they go in the row.
      before: the magnitudes that the channels before hold, float32, and which of them are the program's; None for the heads'
        own channels.
    """

    at: Array
    multiplier: Array
    to: pl.Slice
    before: tuple[Array, Array] | None = None


def channels(p: Sizes, recipe: Sequence[Ref]) -> list[Channels]:
    """The codes that this program writes: of its heads, and of the extra channels that continue theirs.

    Args:
      p: sizes that the kernel is made for.
      recipe: references to the multiplier, and, if there are extra channels, to their sources and parts.
    """
    multiplier_ref, *flattening = recipe
    heads = p.group * p.dim
    first = pl.program_id(1) * heads
    found = []
    for start, n in runs(heads):
        to = pl.ds(first + start, n)
        found.append(Channels(start + jnp.arange(n), multiplier_ref[to], to))
    for start, n in runs(p.extra):
        source, part = (ref[pl.ds(start, n)] for ref in flattening)
        own = (source >= first) & (source < first + heads)
        to = pl.ds(p.kv_heads * heads + start, n)
        found.append(
            Channels(jnp.where(own, source - first, 0), multiplier_ref[source], to, (held_before(part, p.qmax), own))
        )
    return found


def write(p: Sizes, interpret: bool, out_ref: Ref, channels: Sequence[Channels], codes_ref: Ref) -> None:
    """Writes codes.  The output is read again, from the cache: without the rows that repeat the last, and in any order."""
    from jax.experimental.pallas import triton as plgpu

    if not interpret:
        plgpu.debug_barrier()  # Other threads wrote it.
    for at, multiplier, to, before in channels:
        y = out_ref[at // p.dim, at % p.dim].astype(jnp.float32) * multiplier
        if before is None:
            codes_ref[to] = rounded(y, p.qmax, interpret).astype(jnp.int8)
            continue
        full, own = before
        at_extra = codes_ref.at[to]
        plgpu.store(at_extra, code_beyond(y, full, p.qmax, interpret), mask=own)  # pyright: ignore[reportArgumentType]
