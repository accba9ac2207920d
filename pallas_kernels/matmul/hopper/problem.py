"""The function that an integer matmul kernel computes, as far as the kernel is specialised for it.

    out[m, n] = cast( total[m, n] * (x_scale[m] * w_scale[n]) + bias[n] )

    total[m, n] = int32(sum_k x[m, k] * w[n, k])                                    without groups
                  sum_g group_scale[g, n] * int32(sum_{k in g} x[m, k] * w[n, k])    with groups of 128 input channels
                  the same with float32(...)                                      where x is bfloat16 (weight-only)

With a gate, the first half of the output channels goes through an activation function and is multiplied with the second,
and the results are codes for the next matmul (:mod:`pallas_kernels.matmul.hopper.gate`).

How weights are stored is the decoder's (:mod:`pallas_kernels.matmul.hopper.decoders`): it may leave the total 2 ** shift
times itself, which the epilogue takes back.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul.hopper.decoder import STEP_CODES, Decoder

SHARED_MEMORY_BYTES = 227 * 1024
"""Of a CTA."""
DECODE_ROWS = 64
"""Rows of x that the kernel for few of them holds at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """The epilogue of a product whose output channels are two halves: ``activation(first) * second``, quantized.

    Attributes:
      activation: a function that :mod:`pallas_kernels.mosaic.math` knows.
      qmax: largest code.
      extra: channels beyond the half that large ones are flattened over.
      per_token: whether every row will have a scale of its own.  Then the results are not codes but the values to be
        quantized, float32 (m, n / 2), and their largest magnitudes times the multiplier in every 16 channels, (m, n / 32).
    """

    activation: str
    qmax: int
    extra: int = 0
    per_token: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A matmul, as far as a kernel is specialised for it.

    Attributes:
      m, n, k: rows of x, output channels, input channels.
      decoder: the weight format; its groups, if it has any, are of 128 input channels.
      per_token, per_channel: whether the scale of x has shape (m,), that of the weight (n,); otherwise (1,).
      bias: whether there is one.
      out_dtype: bfloat16, float16, float32 or int32.
      experts: how many weights of n channels stand one below the other, each with scales of its own, for rows that are sorted
        by expert (:mod:`pallas_kernels.matmul.hopper.ragged`); 0 where there is one weight for all rows.
      gate: the epilogue that gates and quantizes the product, then of ``out_dtype``; None for the product itself.
    """

    m: int
    n: int
    k: int
    decoder: Decoder
    out_dtype: np.dtype
    per_token: bool = False
    per_channel: bool = False
    bias: bool = False
    experts: int = 0
    gate: Gate | None = None

    @property
    def rows_at_once(self) -> int:
        """Rows that a kernel for few rows has to hold at once: all, or with experts twice as many as each has on average."""
        return min(self.m, -(-2 * self.m // self.experts)) if self.experts else self.m

    @property
    def steps(self) -> int:
        """Rows of weights of 128 bytes."""
        return self.k // (STEP_CODES * self.decoder.halves)

    @property
    def raw(self) -> bool:
        """Whether the bare accumulator is wanted."""
        return jnp.issubdtype(self.out_dtype, jnp.integer)
