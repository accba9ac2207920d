"""What stands in front of an integer matmul, in one pass over the rows of activations.

A residual is added, the row is normalised, or goes through an activation function and its gate, or is put together of what
parts of an attention found; then it is quantized, with scales that are fixed or with one for every row, and its large
channels are flattened over extra ones.  XLA makes several kernels of that, as a row is needed whole before any of its codes
is known.  Here (Pallas Triton) a program holds a row in its registers: what it reads, it reads once, and what the extra
channels continue is read again, from the cache.  Of a few rows, which leave the GPU idle, every program writes a piece; where
a row is needed whole, each of its programs reads all of it.

The K channels of a row are read in runs of the powers of two that K is the sum of, since arrays in Triton have such sizes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.attention.parts import MOST_PARTS, Parts
from pallas_kernels.matmul import reference
from pallas_kernels.matmul.dispatch import NO_GPU, capability, has_triton, say, without_gradient
from pallas_kernels.quantize.triton import ACTIVATIONS, kernel

Implementation = Literal["triton", "xla"]
STEP = 128
"""K and the number of extra channels are multiples of it."""
MOST_CHANNELS = 32768
"""What the registers of 16 warps hold."""
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
MOST_PIECES, LARGEST_PIECE = 32, 4096
"""Of such a row; channels of one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which of the operations is meant; see :func:`pallas_kernels.quantize_normalized` and its neighbours.

    Attributes:
      name: of the entry point.
      qmax: largest code.
      per_token: whether every row gets a scale of its own.
      residual: whether something is added to x first.
      epsilon: of the norm; None for no norm.
      center: whether the norm subtracts the mean.
      weight, bias: whether the norm has them.
      activation: function that x goes through; None for none.
      gated: whether the second half of x is multiplied with the activated first.
      parts: what x comes in; None if it is whole.
      largest: whether the largest magnitudes of x times its multiplier, of as many channels each as there may be, are known
        already, so that a scale for every row needs no more than them.
    """

    name: str
    qmax: int
    per_token: bool
    residual: bool = False
    epsilon: float | None = None
    center: bool = False
    weight: bool = False
    bias: bool = False
    activation: str | None = None
    gated: bool = False
    parts: Parts | None = None
    largest: bool = False

    @property
    def whole(self) -> bool:
        """Whether a row is needed whole before any of its codes is known."""
        return (self.per_token and not self.largest) or self.epsilon is not None

    @property
    def of_rows(self) -> int:
        """How many of the operands have a row for every row of x, itself one of them."""
        return 1 + (self.parts is not None) + self.largest + self.residual

    def split(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """x, its parts' sums, largest magnitudes, residual, weight and bias, each None if not there; and the recipe.

        That is the multiplier, the sources and the parts.
        """
        there = (True, self.parts is not None, self.largest, self.residual, self.weight, self.bias)
        given = iter(operands)
        return *(next(given) if is_there else None for is_there in there), tuple(given)

    def xla(self, *operands: Array) -> tuple[Array, ...]:
        """The reference: codes, then the scales and what was normalised, as far as they are asked for."""
        x, sums, _, residual, weight, bias, recipe = self.split(operands)
        y = x.astype(jnp.float32)
        if self.parts is not None:
            y = self.parts.together(y, sums)
        if residual is not None:
            y = y + residual.astype(jnp.float32)
            x = y.astype(x.dtype)
        if self.epsilon is not None:
            y = reference.normalized(y, self.epsilon, self.center, weight, bias)
        if self.activation is not None:
            y = reference.activated(y, self.activation, self.gated)
        found = reference.quantized(y, *recipe, qmax=self.qmax, per_token=self.per_token)
        return (*found, x) if self.residual else found


@functools.cache
def quantize(kind: Quantization, implementation: Implementation | None) -> Callable[..., tuple[Array, ...]]:
    """The function of what :meth:`Quantization.split` takes, with its rules for transformations."""

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
    reason = NO_GPU if capability() < (8, 0) else cannot_use(kind, x, *recipe)
    if reason and implementation == "triton":
        raise NotImplementedError(f"{kind.name}: implementation 'triton' cannot take x {x.shape} {x.dtype}: {reason}")
    say(kind.name, x.shape, "xla" if reason else "triton", reason or "")
    if reason:
        return kind.xla(*operands)
    triton = functools.partial(call, kind)
    return triton(*operands) if implementation else lax.platform_dependent(*operands, cuda=triton, default=kind.xla)


def cannot_use(kind: Quantization, x: Any, multiplier: Any, source: Any, part: Any) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    del part
    k, extra = multiplier.shape[0], source.shape[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if not x.size:
        return "there is nothing to do"
    if k % STEP or k > MOST_CHANNELS:
        return f"{k} channels are not a multiple of {STEP} up to {MOST_CHANNELS}"
    if extra % STEP:
        return f"{extra} extra channels are not a multiple of {STEP}"
    if kind.activation not in (None, *ACTIVATIONS):
        return f"it knows no {kind.activation}"
    if math.prod(x.shape) >= 2**31:
        return "x has 2^31 elements or more"
    if kind.parts is not None and kind.parts.count > MOST_PARTS:
        return f"x comes in {kind.parts.count} parts, more than {MOST_PARTS}"
    if not has_triton():
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
      kind: what it is to do.
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
    settings: dict[str, Any] = {}
    if not interpret:
        from jax.experimental.pallas import triton as plgpu

        settings["compiler_params"] = plgpu.CompilerParams(num_warps=warps, num_stages=1)
    return tuple(
        pl.pallas_call(
            functools.partial(kernel, kind, programs, pieces, interpret),
            grid=(programs,),
            out_shape=outputs,
            interpret=interpret,
            name=kind.name,
            **settings,
        )(*(operand for operand in used if operand is not None))
    )


def _warps(much: bool, few: bool) -> int:
    """Warps that share a row, of which there is much to read or not."""
    return (32 if few else 16) if much else (16 if few else 8)


def best_piece(kind: Quantization, rows: int, k: int) -> tuple[int, int]:
    """Channels of a piece at most, 0 for whole rows, and warps.

    What was best of those tried on an H200 in November 2026; ``scripts/tune_decoding.py`` tries them again.
    """
    if rows > ROWS_IN_PIECES:
        return 0, 0
    few = rows <= WHOLE_ROWS_IN_PIECES
    if kind.largest:  # Every program reads all magnitudes of its row.
        return 512 if rows <= FEWEST_ROWS else 1024, 8 if few else 4
    if not kind.whole:
        if kind.parts is not None:
            size = STEP if rows <= FEWEST_ROWS else 512
            return max(kind.parts.dim, size), 8 if few and size > STEP else 4
        return 512, 8 if few else 4
    if kind.parts is not None:
        return 0, 0
    much = k * (1 + kind.gated) > 8192
    if not few:  # Rows are programs enough; but extra channels have some of their own.
        wanted = not (much or kind.per_token) and k // math.gcd(k, LARGEST_PIECE) <= MOST_PIECES // 4
        return (LARGEST_PIECE, 16) if wanted else (0, 0)
    size = (512 if rows <= FEWEST_ROWS else LARGEST_PIECE) if much else 256 if rows <= FEWEST_ROWS else 1024
    sizes = (size << i for i in range(LARGEST_PIECE.bit_length()) if size << i <= LARGEST_PIECE)
    return next(((size, 8) for size in sizes if k // math.gcd(k, size) <= MOST_PIECES), (0, 0))
