"""The Hopper kernels as one function: picks the kernel, fits the arguments to it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.hopper import decode, gate, grouped, tuning, unpack
from pallas_kernels.matmul.hopper import ragged as experts
from pallas_kernels.matmul.hopper.problem import Problem

OUT_DTYPES = ("bfloat16", "float16", "float32", "int32")


def cannot_use(p: Problem) -> str | None:
    """Why the kernels cannot take a problem; None if they can."""
    block = 128 * p.halves
    largest = 8 * 16 if p.shifted else 127  # of what a code is multiplied as
    if p.n % 64:
        return f"N = {p.n} is not a multiple of 64"
    if p.k % block:
        return f"K = {p.k} is not a multiple of {block}"
    if not p.flushed and p.k * 127 * largest >= 2**31:
        return f"K = {p.k} could overflow int32"
    if jnp.dtype(p.out_dtype).name not in OUT_DTYPES:
        return f"the output dtype {jnp.dtype(p.out_dtype).name} is not one of {', '.join(OUT_DTYPES)}"
    if p.m < 1:
        return "there are no rows"
    reason = gate.cannot_use(p) or (experts.cannot_use(p) if p.experts else None)
    return reason or (grouped.cannot_use(p) if p.grouped else None)


def matmul(
    p: Problem,
    config: tuning.Config,
    x: jax.Array,
    weight: jax.Array,
    x_scale: jax.Array,
    weight_scale: jax.Array,
    group_scale: jax.Array | None,
    bias: jax.Array | None,
    recipe: Sequence[jax.Array] = (),
) -> Any:
    """``p`` with a configuration; operands as in :func:`pallas_kernels.grouped_int4_matmul`, x of shape (m, k).

    With a gate ``recipe`` is its multiplier and, if it has extra channels, their sources and parts, and the results are a
    tuple (:meth:`pallas_kernels.matmul.hopper.gate.Gating.out`).
    """
    few = isinstance(config, decode.DecodeConfig)
    rows = p.m if p.m % 8 == 0 or (few and p.m < 8) else -(-p.m // 8) * 8
    tile = decode.token_tile(p.m) if few else config.tokens
    if rows > p.m:  # The copy engine takes rows in eights.  What is added does not reach the result.
        x = jnp.pad(x, ((0, rows - p.m), (0, 0)))
    if p.weight_only:
        x = unpack.reorder(x)
    x_scale = x_scale.reshape(-1)
    if p.per_token:
        x_scale = jnp.pad(x_scale, (0, -p.m % tile))
    operands = [weight, x, weight_scale.reshape(-1), x_scale]
    if group_scale is not None:
        operands.append(group_scale)
    if bias is not None:
        operands.append(bias.astype(jnp.float32))
    multiplier, *flattening = recipe or (None,)
    if multiplier is not None:
        operands += [multiplier, *(array.reshape(-1, gate.LANES) for array in flattening)]
    found = _kernel(p, config, rows)(*operands)
    return jax.tree.map(lambda array: array[: p.m], found)


def expert_matmul(
    p: Problem,
    config: tuning.Config,
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    x_scale: jax.Array,
    weight_scale: jax.Array,
    group_scale: jax.Array | None,
) -> jax.Array:
    """``p`` with experts; operands of :func:`pallas_kernels.matmul.experts.expert_matmul`, weight scales one a channel."""
    tile = decode.token_tile(p.rows_at_once) if isinstance(config, decode.DecodeConfig) else config.tokens
    if p.weight_only:
        x = unpack.reorder(x)
    x_scale = x_scale.reshape(-1)
    if p.per_token:
        x_scale = jnp.pad(x_scale, (0, tile))
    operands = [weight.reshape(-1, weight.shape[-1]), x, weight_scale.reshape(-1), x_scale]
    if group_scale is not None:
        operands.append(group_scale.reshape(-1, p.n))
    return _kernel(p, config, p.m)(*operands, experts.visits(p, group_sizes, tile))


@functools.cache
def _kernel(p: Problem, config: tuning.Config, rows: int) -> Any:
    """Jitted, so that a model with many layers of one shape traces and lowers it once."""
    return jax.jit(tuning.build(dataclasses.replace(p, m=rows), config))
