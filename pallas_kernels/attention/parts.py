"""Attention's output in parts, put together by the logarithms of their sums (Flash-Decoding)."""

import dataclasses
import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.attention import reference
from pallas_kernels.mosaic.types import Ref, Scalar


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a row of attention's output: (kv_heads, count, group, dim), with the logarithms of the sums.

    Attributes:
      count: of parts, each from some of the positions.
      group: query heads that share a key-value head.
      dim: of a head.
    """

    count: int
    group: int
    dim: int

    def together(self, x: Array, sums: Array) -> Array:
        """(rows, kv_heads * count * group * dim) and sums (rows, kv_heads * count * group) to rows, by XLA."""
        shape = (len(x), -1, self.count, self.group)
        return reference.together(x.reshape(*shape, self.dim), sums.reshape(shape)).reshape(len(x), -1)

    def read(self, x_ref: Ref, sums_ref: Ref, row: Scalar, at: Array | pl.Slice) -> Array:
        """Some channels of a row in a kernel, float32: those with the numbers ``at``, or a slice of whole heads."""
        by_head = isinstance(at, pl.Slice)
        if isinstance(at, pl.Slice):
            head, channel = at.start // self.dim + jnp.arange(at.size // self.dim), jnp.arange(self.dim)[None, :]
        else:
            head, channel = at // self.dim, at % self.dim

        def each(of_heads: Array) -> Array:
            return of_heads[:, None] if by_head else of_heads

        first, inside = head // self.group * self.count, head % self.group
        heads = [(first + i) * self.group + inside for i in range(self.count)]  # In every part.
        sums = [sums_ref[row, at] for at in heads]
        found = [x_ref[row, each(at * self.dim) + channel] for at in heads]
        largest = functools.reduce(jnp.maximum, sums)
        largest = jnp.where(largest > -jnp.inf, largest, 0.0)
        # A part without positions has no share, and its output means nothing.
        shares = [each(jnp.exp(s - largest)) for s in sums]
        weighed = [jnp.where(share > 0, x, 0.0) * share for x, share in zip(found, shares, strict=True)]
        return (sum(weighed[1:], weighed[0]) / sum(shares[1:], shares[0])).reshape(-1)
