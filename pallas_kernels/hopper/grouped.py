"""The scales of groups of input channels in a matmul's main loop.

Flushed.  Every group's product has an accumulator of its own; when it is complete it is multiplied by the group's scale and
added to the total, in int32 with integer scales, in float32 with float ones.  That work of ordinary arithmetic units has
to hide behind the tensor cores: tokens are cut into chunks, and the product of one chunk runs while that of the chunk
before is added up.

Folded.  The scale is multiplied into the codes while they are unpacked, and one accumulator serves all groups.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import load, plgpu
from pallas_kernels.hopper.problem import ROW, Problem
from pallas_kernels.hopper.registers import OPERAND_ROW


def scratch(p: Problem, slots: int, channels: int) -> dict[str, Any]:
    """Shared memory for the scales of a ring of ``slots`` steps; none without groups."""
    return {"groups": plgpu.SMEM((slots, p.halves, channels), p.group_dtype)} if p.grouped else {}


def slot_bytes(p: Problem, channels: int) -> int:
    """What one slot of :func:`scratch` takes."""
    return p.halves * channels * jnp.dtype(p.group_dtype).itemsize if p.grouped else 0


def copy(p: Problem, source: Any, first: Any, step: Any, target: Any, barrier: Any) -> None:
    """Starts to copy one step's scales of the channels from ``first`` on to a slot."""
    rows = source.at[pl.ds(step * p.halves, p.halves), pl.ds(first, target.shape[-1])]
    plgpu.copy_gmem_to_smem(rows, target, barrier)


def rows(p: Problem, ring: Any, slot: Any, channels: Any) -> list[Any]:
    """The scales of 64 channels in every half of a step, as flushing or folding needs them; None without groups."""
    if not p.grouped:
        return [None] * p.halves
    layout = OPERAND_ROW if p.folded else ROW
    found = [load(ring.at[slot, half, channels], layout, optimized=False) for half in range(p.halves)]
    return [scale if scale.dtype == jnp.float32 else scale.astype(jnp.int32) for scale in found]


def zero(p: Problem, chunk: int) -> Any:
    """A total of (64, chunk) to begin with."""
    return plgpu.layout_cast(jnp.zeros((64, chunk), p.total_dtype), plgpu.Layout.WGMMA)


def flush(
    totals: Sequence[Any],
    scales: Sequence[Any],
    operand: Callable[[int], Any],
    activations: Callable[[int, int], Any],
    ready: Callable[[int], None],
    done: Callable[[int], None],
    dtype: Any,
) -> tuple[Any, ...]:
    """Adds the products of one step, each times its group's scale, to the totals.

    Args:
      totals: (64, chunk), one for every chunk of tokens.
      scales: (64,), one for every half of the step.
      operand: of a half, the weights.
      activations: of a half and a chunk, a reference to (chunk, 128) codes.
      ready: called with a half before its activations are read.
      done: called with a half once nothing of it will be read again.
      dtype: of the products.
    """
    chunk, new = totals[0].shape[1], list(totals)
    items = list(itertools.product(range(len(scales)), range(len(totals))))
    spread = [lax.broadcast_in_dim(scale, (64, chunk), [0]) for scale in scales]

    def scoped(*products: Any) -> tuple[Any, ...]:
        def add(i: int, in_flight: int) -> None:
            half, part = items[i]
            product = plgpu.wgmma_accumulator_load(products[i], wait_n=in_flight)
            product = plgpu.layout_cast(product, plgpu.Layout.WGMMA)
            if part == len(new) - 1:
                done(half)
            new[part] = new[part] + product.astype(new[part].dtype) * spread[half]

        weights = None
        for i, (half, part) in enumerate(items):
            if part == 0:
                weights = operand(half)
                ready(half)
            plgpu.wgmma(products[i], weights, activations(half, part).T)
            if i:
                add(i - 1, 1)
        add(len(items) - 1, 0)
        return tuple(new)

    return pl.run_scoped(scoped, *[plgpu.ACC((64, chunk), dtype)] * len(items))


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
