"""Fused pass before a matmul: residual, norm or activation, quantization and flattening in one read of each row.

A residual is added, the row is normalised, or goes through an activation function and its gate, or is put together from the
parts of an attention; then it is quantized, with scales that are fixed or with one for every row, and its large
channels are flattened over extra ones.  XLA makes several kernels of that, as a row is needed whole before any of its codes
is known.  Here (Pallas Triton) a program holds a row in its registers: it is read once, but for the channels that extra ones
continue, which are read again, from the cache.  Of a few rows, which leave the GPU idle, every program writes a piece; where
a row is needed whole, each of its programs reads all of it.

The K channels of a row are read in runs of the powers of two that K is the sum of, since arrays in Triton have such sizes.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import device
from pallas_kernels.device import NO_GPU
from pallas_kernels.gradient import without_gradient
from pallas_kernels.mosaic.math import ACTIVATIONS
from pallas_kernels.quantize.kind import Implementation, Quantization
from pallas_kernels.quantize.triton import kernel

CHANNEL_MULTIPLE = 128
"""K and the number of extra channels are multiples of it."""
MOST_PARTS = 32
"""Parts that a kernel puts a row together from, at most."""
MOST_CHANNELS = 32768
"""Of a row: as many as the registers of 16 warps hold."""
FEW_ROWS = 264
"""Up to so many rows, two for each multiprocessor of an H100 or H200, what counts is how long one row takes."""
PROGRAMS = 528
"""Programs at most that share many rows."""
ROWS_IN_PIECES = 64
"""Up to so many rows are shared by several programs each, where no channel needs to know of others."""
WHOLE_ROWS_IN_PIECES = 16
"""The same where channels do, so that every program reads the row whole."""
FEWEST_ROWS = 8
"""Up to so many rows, pieces are smaller still."""
MOST_PIECES = 32
"""Of such a row."""
PIECE_CHANNELS = 4096
"""Of a piece, at most."""


@device.cached
def quantize(kind: Quantization, implementation: Implementation | None) -> Callable[..., tuple[Array, ...]]:
    """The quantization as a function of its operands (:meth:`Quantization.split`), with its rules for transformations."""

    def rows(*operands: Array) -> tuple[Array, ...]:
        """Any leading axes of x are rows."""
        flat = [operand.reshape(-1, operand.shape[-1]) for operand in operands[: kind.of_rows]]
        found = _run(kind, implementation, *flat, *operands[kind.of_rows :])
        leading = operands[0].shape[:-1]
        return tuple(array.reshape(*leading, *array.shape[1:]) for array in found)

    batched = jax.custom_batching.custom_vmap(rows)

    @batched.def_vmap
    def _(size: int, in_batched: list[bool], *operands: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        of_rows = kind.of_rows
        results = (True,) * (1 + kind.per_token + kind.residual)
        if all(in_batched[:of_rows]) and not any(in_batched[of_rows:]):
            return batched(*operands), results
        both = list(zip(operands, in_batched, strict=True))
        return lax.map(lambda i: rows(*(o[i] if b else o for o, b in both)), jnp.arange(size)), results

    return without_gradient(kind.name, batched)


def _run(kind: Quantization, implementation: Implementation | None, *operands: Array) -> tuple[Array, ...]:
    """The same for x of shape (rows, channels), by the implementation asked for or the fastest there is."""
    if implementation == "xla":
        return kind.xla(*operands)
    x, *_, recipe = kind.split(operands)
    reason = NO_GPU if device.capability() < (8, 0) else cannot_use(kind, x, *recipe)
    if reason and implementation == "triton":
        raise NotImplementedError(f"{kind.name}: implementation 'triton' cannot take x {x.shape} {x.dtype}: {reason}")
    device.say(kind.name, x.shape, "xla" if reason else "triton", reason or "")
    if reason:
        return kind.xla(*operands)
    triton = functools.partial(call, kind)
    return triton(*operands) if implementation else lax.platform_dependent(*operands, cuda=triton, default=kind.xla)


def cannot_use(kind: Quantization, x: Array, multiplier: Array, source: Array, part: Array) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    del part
    k, extra = multiplier.shape[0], source.shape[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if not x.size:
        return "there is nothing to do"
    if k % CHANNEL_MULTIPLE or k > MOST_CHANNELS:
        return f"{k} channels are not a multiple of {CHANNEL_MULTIPLE} up to {MOST_CHANNELS}"
    if extra % CHANNEL_MULTIPLE:
        return f"{extra} extra channels are not a multiple of {CHANNEL_MULTIPLE}"
    if kind.activation not in (None, *ACTIVATIONS):
        return f"it knows no {kind.activation}"
    if math.prod(x.shape) >= 2**31:
        return "x has 2^31 elements or more"
    if kind.parts is not None and kind.parts.count > MOST_PARTS:
        return f"x comes in {kind.parts.count} parts, more than {MOST_PARTS}"
    if not device.has_triton():
        return "this version of JAX has no Triton backend of Pallas"
    return None


def call(
    kind: Quantization,
    *operands: Array,
    piece: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The kernel, for x of shape (rows, channels).

    Args:
      kind: the operation.
      operands: as :meth:`Quantization.split` takes them.
      piece: channels of a row at most that a program writes, 0 for whole rows, and its warps; by default :func:`best_piece`.
      interpret: whether to run on the CPU.
    """
    x, sums, largest, residual, weight, bias, recipe = kind.split(operands)
    rows, (k, extra) = len(x), (recipe[0].shape[0], recipe[1].shape[0])
    size, warps = best_piece(kind, rows, k) if piece is None else piece
    pieces = [(n := math.gcd(channels, size), channels // n) for channels in (k, extra)] if size else ()
    if pieces:
        programs = rows * sum(count for _, count in pieces)
    else:  # No program has several rows where these are few, or long, as gated ones are.
        warps = _warps(kind.gated or kind.parts is not None, rows <= FEW_ROWS)
        programs = rows if kind.gated or rows <= FEW_ROWS else min(rows, PROGRAMS)
    outputs = [jax.ShapeDtypeStruct((rows, k + extra), jnp.int8)]
    if kind.per_token:
        outputs.append(jax.ShapeDtypeStruct((rows,), jnp.float32))
    if kind.residual:
        outputs.append(jax.ShapeDtypeStruct((rows, k), x.dtype))
    used = (x, sums, largest, residual, weight, bias, *(recipe if extra and not kind.per_token else recipe[:1]))
    params = None
    if not interpret:
        from jax.experimental.pallas import triton as plgpu

        params = plgpu.CompilerParams(num_warps=warps, num_stages=1)
    return tuple(
        pl.pallas_call(
            functools.partial(kernel, kind, programs, pieces, interpret),
            grid=(programs,),
            out_shape=outputs,
            interpret=interpret,
            name=kind.name,
            compiler_params=params,
        )(*(operand for operand in used if operand is not None))
    )


def _warps(much: bool, few: bool) -> int:
    """Warps that share a row, of which there is much to read or not."""
    return (32 if few else 16) if much else (16 if few else 8)


def best_piece(kind: Quantization, rows: int, k: int) -> tuple[int, int]:
    """Channels of a piece at most, 0 for whole rows, and warps.

    The best of those tried on an H200 in November 2026; ``scripts/tune_decoding.py`` tries them again.
    """
    if rows > ROWS_IN_PIECES:
        return 0, 0
    few = rows <= WHOLE_ROWS_IN_PIECES
    if kind.largest:  # Every program reads all magnitudes of its row.
        return 512 if rows <= FEWEST_ROWS else 1024, 8 if few else 4
    if not kind.whole:
        if kind.parts is not None:
            size = CHANNEL_MULTIPLE if rows <= FEWEST_ROWS else 512
            return max(kind.parts.dim, size), 8 if few and size > CHANNEL_MULTIPLE else 4
        return 512, 8 if few else 4
    if kind.parts is not None:
        return 0, 0
    much = k * (1 + kind.gated) > 8192
    if not few:  # Rows are programs enough; but extra channels have some of their own.
        wanted = not (much or kind.per_token) and k // math.gcd(k, PIECE_CHANNELS) <= MOST_PIECES // 4
        return (PIECE_CHANNELS, 16) if wanted else (0, 0)
    size = (512 if rows <= FEWEST_ROWS else PIECE_CHANNELS) if much else 256 if rows <= FEWEST_ROWS else 1024
    sizes = (size << i for i in range(PIECE_CHANNELS.bit_length()) if size << i <= PIECE_CHANNELS)
    return next(((size, 8) for size in sizes if k // math.gcd(k, size) <= MOST_PIECES), (0, 0))
