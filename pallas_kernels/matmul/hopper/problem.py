"""What the integer matmul kernels compute, and what they share at the beginning and at the end of a tile.

    out[m, n] = cast( total[m, n] * (x_scale[m] * w_scale[n]) + bias[n] )

    total[m, n] = int32(sum_k x[m, k] * w[n, k])                                    without groups
                  sum_g group_scale[g, n] * int32(sum_{k in g} x[m, k] * w[n, k])    with groups of 128 input channels
                  the same with float32(...)                                      where x is bfloat16 (weight-only)

With a gate, the first half of the output channels goes through an activation function and is multiplied with the second,
and what comes out of the kernel are codes for the next matmul (:mod:`pallas_kernels.matmul.hopper.gate`).

A code of 4 bits is left in the upper half of its byte, where it counts 16 times; the factor goes into the scale.  Only
where the group's scale is multiplied into the code (folded) are both at their true size.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic.compat import load, plgpu

ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
SHARED_MEMORY = 227 * 1024
MOST_TOKENS = 64
"""Rows that the kernel for few of them holds at once."""
STEP = 128
"""Codes of K that one wgmma group takes; also the size of a group of input channels with a scale of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """What is made of a product whose output channels are two halves: ``activation(first) * second``, quantized.

    Attributes:
      activation: a function that :mod:`pallas_kernels.quantize.dispatch` knows.
      qmax: largest code.
      extra: channels beyond the half that large ones are flattened over.
      per_token: whether every row will have a scale of its own.  Then the results are no codes but what is to be quantized,
        float32 (m, n / 2), and the largest magnitudes of it times the multiplier in every 16 channels, (m, n / 32).
    """

    activation: str
    qmax: int
    extra: int = 0
    per_token: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is multiplied, as far as a kernel is specialised for it.

    Attributes:
      m, n, k: rows of x, output channels, input channels.
      bits: of the weight codes, 8 or 4.
      per_token, per_channel: whether the scale of x has shape (m,), that of the weight (n,); otherwise (1,).
      bias: whether there is one.
      out_dtype: bfloat16, float16, float32 or int32.
      group_dtype: int16, int32 or float32, the dtype of the scales (k / 128, n) of groups; None without groups.
      folded: whether the groups' scales are integers from 1 to 15 that are multiplied into the 4-bit codes.
      weight_only: whether x is not codes but bfloat16, its columns in the order of
        :func:`pallas_kernels.matmul.hopper.unpack.reorder`; then groups have float scales, and x has none.
      experts: how many weights of n channels stand one below the other, each with scales of its own, for rows that are sorted
        by expert (:mod:`pallas_kernels.matmul.hopper.ragged`); 0 where there is one weight for all rows.
      gate: what is made of the product, then of ``out_dtype``, in the same kernel; None if nothing is.
    """

    m: int
    n: int
    k: int
    bits: Literal[4, 8]
    per_token: bool
    per_channel: bool
    bias: bool
    out_dtype: Any
    group_dtype: Any = None
    folded: bool = False
    weight_only: bool = False
    experts: int = 0
    gate: Gate | None = None

    @property
    def rows_at_once(self) -> int:
        """Rows that a kernel for few rows has to hold at once: all, or with experts twice as many as each has on average."""
        return min(self.m, -(-2 * self.m // self.experts)) if self.experts else self.m

    @property
    def halves(self) -> int:
        """Runs of 128 codes that a 128-byte row of weights holds."""
        return 8 // self.bits

    @property
    def steps(self) -> int:
        """Rows of weights of 128 bytes."""
        return self.k // (STEP * self.halves)

    @property
    def raw(self) -> bool:
        """Whether the bare accumulator is wanted."""
        return jnp.issubdtype(self.out_dtype, jnp.integer)

    @property
    def grouped(self) -> bool:
        """Whether groups have scales."""
        return self.group_dtype is not None

    @property
    def scales(self) -> str | None:
        """Of the groups: "integer", "float", or "folded"; None without groups."""
        if not self.grouped or self.folded:
            return "folded" if self.folded else None
        return "float" if jnp.issubdtype(self.group_dtype, jnp.floating) else "integer"

    @property
    def kind(self) -> str | None:
        """Of the groups in the table of measured configurations: :attr:`scales`, or "weight_only"."""
        return "weight_only" if self.weight_only else self.scales

    @property
    def flushed(self) -> bool:
        """Whether the product of every group has an accumulator of its own, and is then added to the total."""
        return self.grouped and not self.folded

    @property
    def total_dtype(self) -> Any:
        """What is added up: float32 with float scales of groups, int32 otherwise."""
        return jnp.float32 if self.scales == "float" else jnp.int32

    @property
    def shifted(self) -> bool:
        """Whether the total is 16 times itself."""
        return self.bits == 4 and not self.folded and not self.weight_only

    @property
    def x_dtype(self) -> Any:
        """Of the activations."""
        return jnp.dtype(jnp.bfloat16 if self.weight_only else jnp.int8)

    @property
    def product_dtype(self) -> Any:
        """Of an accumulator of the tensor cores."""
        return jnp.float32 if self.weight_only else jnp.int32


def finish(p: Problem, total: Any, factors: tuple[Any, Any], token_scale: Any) -> Any:
    """The epilogue on a (64, tokens) tile; ``factors`` are those of :func:`row_factors`."""
    total = plgpu.layout_cast(total, plgpu.Layout.WGMMA)
    if p.raw:
        return total >> 4 if p.shifted else total
    weight_scale, bias = factors

    def spread(value: Any, axis: int) -> Any:
        return lax.broadcast_in_dim(value, total.shape, [axis]) if value.ndim else value

    scale = spread(token_scale, 1) * spread(weight_scale, 0)
    if p.shifted:
        scale = scale * jnp.float32(1 / 16)
    y = total.astype(jnp.float32) * scale
    if bias is not None:  # Not fused with the product, as in pallas_kernels.matmul.reference.
        impossible = total != total if p.total_dtype == jnp.float32 else total == jnp.iinfo(jnp.int32).min
        y = jnp.where(impossible, jnp.float32(jnp.nan), y) + spread(bias, 0)
    return y.astype(p.out_dtype)


def row_factors(p: Problem, scale: Any, bias: Any, first: Any, expert: Any = 0) -> tuple[Any, Any]:
    """Weight scale (a scalar or a row vector) and bias (or None) of 64 channels of an expert from ``first`` on.

    Where those lie beyond the output, those of the last 64: what is made of them is not written.
    """
    rows = pl.ds(expert * p.n + jnp.minimum(first, p.n - 64), 64)

    def vector(ref: Any) -> Any:
        return load(ref.at[rows], ROW, optimized=False)

    if p.raw:
        return None, None
    return vector(scale) if p.per_channel else scale[0], vector(bias) if p.bias else None
