"""The Hopper kernels as functions of a matmul's operands: picks the kernel, and fits the arguments to it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.matmul.hopper import gate, kernels, ragged
from pallas_kernels.matmul.hopper.decode import DecodeConfig
from pallas_kernels.matmul.hopper.decoder import STEP_CODES
from pallas_kernels.matmul.hopper.kernels import Config
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.mosaic.compat import Kernel
from pallas_kernels.mosaic.registers import WARPGROUP_LANES

OUT_DTYPES = ("bfloat16", "float16", "float32", "int32")


def cannot_use(p: Problem) -> str | None:
    """Why the kernels cannot take a problem; None if they can."""
    decoder, block = p.decoder, STEP_CODES * p.decoder.halves
    if p.n % 64:
        return f"N = {p.n} is not a multiple of 64"
    if p.k % block:
        return f"K = {p.k} is not a multiple of {block}"
    if not decoder.flushed and p.k * 127 * decoder.largest_operand >= 2**31:
        return f"K = {p.k} could overflow int32"
    if jnp.dtype(p.out_dtype).name not in OUT_DTYPES:
        return f"the output dtype {jnp.dtype(p.out_dtype).name} is not one of {', '.join(OUT_DTYPES)}"
    if p.m < 1:
        return "there are no rows"
    reason = gate.cannot_use(p) or (ragged.cannot_use(p) if p.experts else None)
    return reason or decoder.cannot_use(p.raw)


def matmul(
    p: Problem,
    config: Config,
    x: jax.Array,
    weight: jax.Array,
    x_scale: jax.Array,
    weight_scale: jax.Array,
    group_scale: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """``p`` with a configuration; operands as in :func:`pallas_kernels.grouped_int4_matmul`, x of shape (m, k)."""
    (found,) = _launch(p, config, [x, weight, x_scale, weight_scale], (group_scale, bias))
    return found


def gated_matmul(
    p: Problem,
    config: Config,
    x: jax.Array,
    weight: jax.Array,
    x_scale: jax.Array,
    weight_scale: jax.Array,
    group_scale: jax.Array | None,
    bias: jax.Array | None,
    recipe: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """:func:`matmul` of a problem with a gate.

    ``recipe`` is its multiplier and, if it has extra channels, their sources and parts; the results are those of
    :meth:`pallas_kernels.matmul.hopper.gate.Gating.out`.
    """
    multiplier, *flattening = recipe
    lanes = [array.reshape(-1, WARPGROUP_LANES) for array in flattening]
    return _launch(p, config, [x, weight, x_scale, weight_scale], (group_scale, bias), [multiplier, *lanes])


def _launch(
    p: Problem,
    config: Config,
    operands: Sequence[jax.Array],
    optional: tuple[jax.Array | None, jax.Array | None],
    recipe: Sequence[jax.Array] = (),
) -> tuple[jax.Array, ...]:
    x, weight, x_scale, weight_scale = operands
    group_scale, bias = optional
    few = isinstance(config, DecodeConfig)
    rows = p.m if p.m % 8 == 0 or (few and p.m < 8) else -(-p.m // 8) * 8
    if rows > p.m:  # The copy engine takes rows in eights.  What is added does not reach the result.
        x = jnp.pad(x, ((0, rows - p.m), (0, 0)))
    x = p.decoder.prepare(x)
    x_scale = x_scale.reshape(-1)
    if p.per_token:
        x_scale = jnp.pad(x_scale, (0, -p.m % kernels.token_tile(p, config)))
    given = [weight, x, weight_scale.reshape(-1), x_scale]
    if group_scale is not None:
        given.append(group_scale)
    if bias is not None:
        given.append(bias.astype(jnp.float32))
    found = _kernel(p, config, rows)(*given, *recipe)
    return tuple(array[: p.m] for array in (found if isinstance(found, (tuple, list)) else (found,)))


def expert_matmul(
    p: Problem,
    config: Config,
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    x_scale: jax.Array,
    weight_scale: jax.Array,
    group_scale: jax.Array | None,
) -> jax.Array:
    """``p`` with experts; operands of :func:`pallas_kernels.expert_matmul`, weight scales one a channel."""
    tile = kernels.token_tile(p, config)
    x_scale = x_scale.reshape(-1)
    if p.per_token:
        x_scale = jnp.pad(x_scale, (0, tile))
    given = [weight.reshape(-1, weight.shape[-1]), p.decoder.prepare(x), weight_scale.reshape(-1), x_scale]
    if group_scale is not None:
        given.append(group_scale.reshape(-1, p.n))
    found = _kernel(p, config, p.m)(*given, ragged.visits(p, group_sizes, tile))
    assert isinstance(found, jax.Array)
    return found


@device.cached
def _kernel(p: Problem, config: Config, rows: int) -> Kernel:
    """Jitted, so that a model with many layers of one shape traces and lowers it once."""
    return jax.jit(kernels.build(dataclasses.replace(p, m=rows), config))
