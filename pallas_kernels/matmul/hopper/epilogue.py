"""Epilogues: the step from a tile's total to the results in memory.

:func:`scaled` is a plain function of a tile, which every kernel applies first.  The kernel for few rows then hands the tile
to an :class:`Epilogue`: :class:`Plain` writes it, :class:`pallas_kernels.matmul.hopper.gate.Gating` gates and quantizes it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul.hopper.exchange import Exchange
from pallas_kernels.matmul.hopper.gate import Gating
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.matmul.hopper.ragged import Rows
from pallas_kernels.mosaic import registers
from pallas_kernels.mosaic.compat import Ref, Scalar, Scratch, load, plgpu
from pallas_kernels.mosaic.registers import ROW

Factors = tuple[jax.Array | None, jax.Array | None]
"""Weight scale and bias of a tile's channels."""


def scaled(p: Problem, total: jax.Array, factors: Factors, token_scale: jax.Array | None) -> jax.Array:
    """Scales, bias and cast of a (64, tokens) tile; ``factors`` are those of :func:`row_factors`."""
    total = plgpu.layout_cast(total, plgpu.Layout.WGMMA)
    shift = p.decoder.shift
    if p.raw:
        return total >> shift if shift else total
    weight_scale, bias = factors
    assert weight_scale is not None and token_scale is not None

    def spread(value: jax.Array, axis: int) -> jax.Array:
        return lax.broadcast_in_dim(value, total.shape, [axis]) if value.ndim else value

    scale = spread(token_scale, 1) * spread(weight_scale, 0)
    if shift:
        scale = scale * jnp.float32(2.0**-shift)
    y = total.astype(jnp.float32) * scale
    if bias is not None:  # Not fused with the product, as in pallas_kernels.matmul.reference.
        exact = p.decoder.total_dtype == jnp.int32
        impossible = total == jnp.iinfo(jnp.int32).min if exact else total != total
        y = jnp.where(impossible, jnp.float32(jnp.nan), y) + spread(bias, 0)
    return y.astype(p.out_dtype)


def row_factors(p: Problem, scale: Ref, bias: Ref | None, first: Scalar, expert: Scalar = 0) -> Factors:
    """Weight scale (a scalar or a row vector) and bias (or None) of 64 channels of an expert from ``first`` on.

    Where those lie beyond the output, those of the last 64: the results are not written.
    """
    rows = pl.ds(expert * p.n + jnp.minimum(first, p.n - 64), 64)

    def vector(ref: Ref) -> jax.Array:
        return load(ref.at[rows], ROW, optimized=False)

    if p.raw:
        return None, None
    return vector(scale) if p.per_channel else scale[0], None if bias is None else vector(bias)


class Epilogue(Protocol):
    """The end of the kernel for few rows, for CTAs with some number of consumers side by side."""

    @property
    def operands(self) -> int:
        """References that it takes beside those of the matmul."""
        ...

    @property
    def warpgroups(self) -> int:
        """That it needs beside the producer and the consumers."""
        ...

    @property
    def spans(self) -> Sequence[tuple[int, int, int]]:
        """Runs of the rows of weights in a slot: where one begins, there and after a block's first channel; its length."""
        ...

    def nbytes(self) -> int:
        """Of shared memory."""
        ...

    def out(self) -> jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...]:
        """The results."""
        ...

    def scratch(self) -> Mapping[str, Scratch]:
        """Shared memory and barriers."""
        ...

    def start(self, operands: Sequence[Ref], scratch: Mapping[str, Ref]) -> None:
        """Work of the producer before its other work."""
        ...

    def leave(
        self, y: jax.Array, turn: Scalar, of: Rows, first: Scalar, outputs: Sequence[Ref], scratch: Mapping[str, Ref]
    ) -> None:
        """Takes a consumer's (64, tokens) of the scaled product, of its CTA's ``turn``-th block."""
        ...

    def finish(
        self,
        mine: Scalar,
        first_of: Callable[[Scalar], Scalar],
        operands: Sequence[Ref],
        outputs: Sequence[Ref],
        scratch: Mapping[str, Ref],
    ) -> None:
        """Work of the further warpgroup, for a CTA with so many blocks and the first channel of each."""
        ...


class Plain:
    """Writes the product as it is, after the CTAs of a cluster have exchanged their sums."""

    operands = 0
    warpgroups = 0

    def __init__(self, p: Problem, warpgroups: int, exchange: Exchange | None):
        self.p, self.exchange = p, exchange
        self.spans = [(0, 0, 64 * warpgroups)]

    def nbytes(self) -> int:
        return 0 if self.exchange is None else self.exchange.nbytes()

    def out(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.p.m, self.p.n), self.p.out_dtype)

    def scratch(self) -> Mapping[str, Scratch]:
        return {}

    def start(self, operands: Sequence[Ref], scratch: Mapping[str, Ref]) -> None:
        pass

    def leave(
        self, y: jax.Array, turn: Scalar, of: Rows, first: Scalar, outputs: Sequence[Ref], scratch: Mapping[str, Ref]
    ) -> None:
        token, end = (of.begin, of.end) if self.p.experts else (jnp.int32(0), None)
        registers.store(y, outputs[0], token, first, end=end, exchange=self.exchange)

    def finish(
        self,
        mine: Scalar,
        first_of: Callable[[Scalar], Scalar],
        operands: Sequence[Ref],
        outputs: Sequence[Ref],
        scratch: Mapping[str, Ref],
    ) -> None:
        pass


def epilogue(p: Problem, warpgroups: int, tokens: int, exchange: Exchange | None) -> Epilogue:
    """The epilogue of a problem, for CTAs with so many consumers side by side and tokens.

    Raises:
      NotImplementedError: if such CTAs cannot have it.
    """
    if p.gate is None:
        return Plain(p, warpgroups, exchange)
    return Gating(p, p.gate, warpgroups, tokens)
