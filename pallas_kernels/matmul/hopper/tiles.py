"""Tiles: how they lie in shared memory, and in which order they are computed."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic.compat import Ref, Scalar, Scratch, plgpu

SWIZZLE_BYTES = 128
"""Bytes of a row of an operand tile, and of its swizzle."""


def operand(bits: int = 8) -> tuple[object, ...]:
    """Shared-memory layout that the copy engine writes and the tensor cores read: 8 x 128-byte tiles, swizzled."""
    return plgpu.TilingTransform((8, 8 * SWIZZLE_BYTES // bits)), plgpu.SwizzleTransform(SWIZZLE_BYTES)


def activations(dtype: np.dtype, *shape: int) -> Scratch:
    """Shared memory for activations, or for operands that are multiplied with them."""
    return plgpu.SMEM(shape, dtype, transforms=operand(8 * dtype.itemsize))


def optional(references: Sequence[Ref], *there: bool) -> tuple[list[Ref | None], list[Ref]]:
    """The optional references at the beginning of some, None for each that is not there; and the rest."""
    rest = iter(references)
    return [next(rest) if given else None for given in there], list(rest)


def slot(i: Scalar, slots: int) -> Scalar:
    """Place of step i in a ring."""
    return lax.rem(i, jnp.int32(slots))


def drain(empty: Ref, count: Scalar, slots: int) -> None:
    """Waits until the last ``slots`` of ``count`` copies have been given back: no arrival may be pending when a CTA ends."""

    def wait(i: Scalar, _: None) -> None:
        plgpu.barrier_wait(empty.at[slot(i, slots)])

    lax.fori_loop(jnp.maximum(count - slots, 0), count, wait, None)


def order(t: Scalar, m_tiles: Scalar, n_tiles: int, width: int) -> tuple[Scalar, Scalar]:
    """The (m, n) of the t-th tile: stripes of ``width`` tiles along m, every other one walked backwards.

    Tiles that run at the same time then form a nearly square block, and share their operands in the L2 cache.  The last
    stripe is as narrow as is left.
    """
    if isinstance(m_tiles, int):
        width = min(width, m_tiles)
        full = m_tiles // width
        left = jnp.int32(m_tiles - full * width or 1)
    else:
        full = lax.div(m_tiles, jnp.int32(width))
        left = jnp.maximum(m_tiles - full * width, 1)
    stripe = lax.div(t, jnp.int32(width * n_tiles))
    rest = t - stripe * (width * n_tiles)
    narrow = jnp.where(stripe < full, jnp.int32(width), left)
    n = lax.div(rest, narrow)
    m = stripe * width + lax.rem(rest, narrow)
    return m, jnp.where(lax.rem(stripe, jnp.int32(2)) == 1, n_tiles - 1 - n, n)
