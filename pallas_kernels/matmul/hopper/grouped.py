"""The scales of groups of input channels in a matmul's main loop.

Flushed.  Every group's product has an accumulator of its own; when it is complete it is multiplied by the group's scale and
added to the total, in int32 with integer scales, in float32 with float ones.  That work of ordinary arithmetic units has
to overlap with the tensor cores: tokens are cut into chunks, and the product of one chunk runs while that of the chunk
before is added up.

Telescoped.  With integer scales s[g] and products P[g] the accumulator need not begin at zero for every group.  Left to
grow, it is A[g] = P[0] + ... + P[g], and

    sum_g s[g] P[g]  =  sum_g (s[g] - s[g + 1]) A[g]        where s is 0 after the last group

(summation by parts).  Integers make that exact: whatever wraps on the way does so modulo 2**32, where the total is the same.
It saves the instructions that set registers to zero.  Floats would cancel.

Folded.  The scale is multiplied into the codes while they are unpacked, and one accumulator serves all groups.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic.compat import Layout, Ref, Scalar, Scratch, load, plgpu
from pallas_kernels.mosaic.registers import OPERAND_ROW, ROW


def scratch(slots: int, groups: int, channels: int, dtype: np.dtype) -> dict[str, Scratch]:
    """Shared memory for the scales of so many groups in every slot of a ring."""
    return {"groups": plgpu.SMEM((slots, groups, channels), dtype)}


def copy(source: Ref, first: Scalar, group: Scalar, scratch: Mapping[str, Ref], slot: Scalar, barrier: Ref) -> None:
    """Starts to copy a slot's scales, of the channels from ``first`` on and the groups from ``group`` on."""
    target = scratch["groups"].at[slot]
    rows = source.at[pl.ds(group, target.shape[0]), pl.ds(first, target.shape[-1])]
    plgpu.copy_gmem_to_smem(rows, target, barrier)


def rows(scratch: Mapping[str, Ref], slot: Scalar, channels: object, layout: Layout = ROW) -> list[jax.Array]:
    """The scales of 64 channels in every group of a slot, as flushing needs them."""
    ring = scratch["groups"]
    found = [load(ring.at[slot, group, channels], layout, optimized=False) for group in range(ring.shape[1])]
    return [scale if scale.dtype == jnp.float32 else scale.astype(jnp.int32) for scale in found]


def operand_rows(scratch: Mapping[str, Ref], slot: Scalar, channels: object) -> list[jax.Array]:
    """:func:`rows` as folding needs them, beside the operand's bytes."""
    return rows(scratch, slot, channels, OPERAND_ROW)


def zero(chunk: int, dtype: np.dtype) -> jax.Array:
    """A total of (64, chunk) to begin with."""
    return plgpu.layout_cast(jnp.zeros((64, chunk), dtype), plgpu.Layout.WGMMA)


def flush(
    totals: Sequence[jax.Array],
    factors: Sequence[jax.Array],
    operand: Callable[[int], jax.Array | Ref],
    activations: Callable[[int, int], Ref],
    ready: Callable[[int], None],
    done: Callable[[int], None],
    dtype: np.dtype,
    products: Sequence[Ref] = (),
) -> tuple[jax.Array, ...]:
    """Adds the products of one step, each times a factor, to the totals.

    Args:
      totals: (64, chunk), one for every chunk of tokens.
      factors: (64,), one for every half of the step: its group's scale, or what takes its place (:func:`differences`).
      operand: of a half, the weights.
      activations: of a half and a chunk, a reference to (chunk, 128) codes.
      ready: called with a half before its activations are read.
      done: called with a half once nothing of it will be read again.
      dtype: of the products.
      products: accumulators (64, chunk), one for every chunk, two at least, to which products are added; without them, every
        product has one of its own, which begins at zero.
    """
    chunk, new = totals[0].shape[1], list(totals)
    items = list(itertools.product(range(len(factors)), range(len(totals))))
    spread = [lax.broadcast_in_dim(factor, (64, chunk), [0]) for factor in factors]

    def scoped(*accumulators: Ref) -> tuple[jax.Array, ...]:
        def add(i: int, in_flight: int) -> None:
            half, part = items[i]
            product = plgpu.wgmma_accumulator_load(accumulators[i], wait_n=in_flight)
            product = plgpu.layout_cast(product, plgpu.Layout.WGMMA)
            if part == len(new) - 1:
                done(half)
            total = new[part] + product.astype(new[part].dtype) * spread[half]
            # What is yet to be added must not be left for later, when the accumulator is in use again.
            new[part] = lax.optimization_barrier(total) if products else total

        weights = None
        for i, (half, part) in enumerate(items):
            if part == 0:
                weights = operand(half)
                ready(half)
            plgpu.wgmma(accumulators[i], weights, activations(half, part).T)
            if i:
                add(i - 1, 1)
        add(len(items) - 1, 0)
        return tuple(new)

    if products:
        return scoped(*tuple(products) * len(factors))
    return pl.run_scoped(scoped, *[plgpu.ACC((64, chunk), dtype)] * len(items))


def differences(scales: Sequence[jax.Array], last: jax.Array | bool) -> list[jax.Array]:
    """The factors of products in place of their scales, where accumulators are left to grow.

    Args:
      scales: of a step's groups and the one after them.
      last: whether there is none.
    """
    *scales, after = scales
    following = [*scales[1:], jnp.where(last, 0, after)]
    return [scale - after for scale, after in zip(scales, following, strict=True)]
