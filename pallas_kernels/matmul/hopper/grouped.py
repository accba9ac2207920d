"""The scales of groups of input channels in a matmul's main loop.

Flushed.  Every group's product has an accumulator of its own; when it is complete it is multiplied by the group's scale and
added to the total, in int32 with integer scales, in float32 with float ones.  That work of ordinary arithmetic units has
to hide behind the tensor cores: tokens are cut into chunks, and the product of one chunk runs while that of the chunk
before is added up.

Telescoped.  With integer scales s[g] and products P[g] the accumulator need not begin at zero for every group.  Left to
grow, it is A[g] = P[0] + ... + P[g], and

    sum_g s[g] P[g]  =  sum_g (s[g] - s[g + 1]) A[g]        where s is 0 after the last group

(summation by parts).  Integers make that exact: whatever wraps on the way does so modulo 2**32, where the total is what it
was.  It saves the instructions that set registers to zero.  Floats would cancel.

Folded.  The scale is multiplied into the codes while they are unpacked, and one accumulator serves all groups.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul.hopper.problem import ROW, Problem
from pallas_kernels.mosaic.compat import load, plgpu
from pallas_kernels.mosaic.registers import OPERAND_ROW


def scratch(p: Problem, slots: int, channels: int, ahead: int = 0) -> dict[str, Any]:
    """Shared memory for the scales of a ring of ``slots`` steps, and ``ahead`` groups beyond each; none without groups."""
    return {"groups": plgpu.SMEM((slots, p.halves + ahead, channels), p.group_dtype)} if p.grouped else {}


def slot_bytes(p: Problem, channels: int, ahead: int = 0) -> int:
    """What one slot of :func:`scratch` takes."""
    return (p.halves + ahead) * channels * jnp.dtype(p.group_dtype).itemsize if p.grouped else 0


def copy(p: Problem, source: Any, first: Any, step: Any, target: Any, barrier: Any) -> None:
    """Starts to copy one step's scales of the channels from ``first`` on to a slot."""
    rows = source.at[pl.ds(step * p.halves, target.shape[0]), pl.ds(first, target.shape[-1])]
    plgpu.copy_gmem_to_smem(rows, target, barrier)


def rows(p: Problem, ring: Any, slot: Any, channels: Any) -> list[Any]:
    """The scales of 64 channels in every group of a slot, as flushing or folding needs them; None without groups."""
    if not p.grouped:
        return [None] * p.halves
    layout = OPERAND_ROW if p.folded else ROW
    found = [load(ring.at[slot, group, channels], layout, optimized=False) for group in range(ring.shape[1])]
    return [scale if scale.dtype == jnp.float32 else scale.astype(jnp.int32) for scale in found]


def zero(p: Problem, chunk: int) -> Any:
    """A total of (64, chunk) to begin with."""
    return plgpu.layout_cast(jnp.zeros((64, chunk), p.total_dtype), plgpu.Layout.WGMMA)


def flush(
    totals: Sequence[Any],
    factors: Sequence[Any],
    operand: Callable[[int], Any],
    activations: Callable[[int, int], Any],
    ready: Callable[[int], None],
    done: Callable[[int], None],
    dtype: Any,
    products: Sequence[Any] = (),
) -> tuple[Any, ...]:
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

    def scoped(*accumulators: Any) -> tuple[Any, ...]:
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


def differences(scales: Sequence[Any], last: Any) -> list[Any]:
    """What products are multiplied by in place of their scales where accumulators are left to grow.

    Args:
      scales: of a step's groups and the one after them.
      last: whether there is none.
    """
    *scales, after = scales
    following = [*scales[1:], jnp.where(last, 0, after)]
    return [scale - after for scale, after in zip(scales, following, strict=True)]


def most_tokens(p: Problem) -> int:
    """Tokens of a tile for many rows whose totals fit into the registers beside the products, as compiling them showed."""
    return 64 if p.weight_only else 128


def most_consumers(p: Problem, tokens: int) -> int:
    """Warpgroups of a CTA for few rows that find registers for all they hold, likewise."""
    if p.weight_only:
        return 3 if tokens <= 16 else 2
    return 4 if tokens <= 16 else {32: 3, 64: 2}[tokens] + p.folded


def most_at_once(p: Problem) -> int:
    """Tokens of a chunk where there are few rows, likewise."""
    return 16 if p.weight_only else 32


def cannot_use(p: Problem) -> str | None:
    """Why the kernels cannot take a problem with groups; None if they can."""
    if p.weight_only and p.scales != "float":
        return "weight-only matmuls need float scales"
    if p.bits != 4:
        return f"weights of {p.bits} bits have no kernel with groups"
    if p.raw and p.total_dtype == jnp.float32:
        return "with float scales there is no bare accumulator"
    return None
