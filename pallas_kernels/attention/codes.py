"""Codes of attention's output, written by the kernel that finds it (Pallas Triton).

Where one program finds all that a key-value head's query heads give, it can quantize it with fixed scales, and flatten the
large channels over extra ones, of which it writes those that continue its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.quantize.triton import code_beyond, held_before, rounded, runs


class Recipe(NamedTuple):
    """How the output is quantized, with fixed scales; see :func:`pallas_kernels.quantize_activations`."""

    qmax: int
    multiplier: Array
    source: Array
    part: Array


class Channels(NamedTuple):
    """Some of the codes that a program writes.

    Attributes:
      at: the channels of its heads that they are made of.
      multiplier: of those.
      to: where they go in the row.
      before: what the channels before hold, float32, and which of them are the program's; None for the heads' own channels.
    """

    at: Array
    multiplier: Array
    to: Any
    before: tuple[Array, Array] | None = None


def channels(p: Any, recipe: Sequence[Any]) -> list[Channels]:
    """The codes that this program writes: of its heads, and of the extra channels that continue theirs.

    Args:
      p: what the kernel is made for.
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


def write(p: Any, interpret: bool, out_ref: Any, channels: Sequence[Channels], codes_ref: Any) -> None:
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
        plgpu.store(codes_ref.at[to], code_beyond(y, full, p.qmax, interpret), mask=own)
