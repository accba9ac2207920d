"""The interface of a weight format: how bytes in memory become an operand of the tensor cores.

A format is one frozen class derived from :class:`Decoder`.  It defines the accumulator that XLA computes
(:meth:`Decoder.accumulate`), and, where the Hopper kernels take it, all that they need to know: the kernels ask their
problem's decoder, and know no format by name.  An instance is static: it is part of a weight's type
(:class:`pallas_kernels.Weight`) and of a kernel's.  This package's formats: :mod:`pallas_kernels.matmul.hopper.decoders`.

The emitters of Mosaic GPU's instructions are imported where they are called, so that XLA can multiply without them.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.mosaic.types import Ref, Scalar, Scratch

STEP_CODES = 128
"""Codes of K that one group of ``wgmma`` takes; also the input channels of a group with a scale of its own."""


@dataclasses.dataclass(frozen=True)
class Decoder(abc.ABC):
    """A weight format; by default int8 activations, int32 sums, and operands that come from shared memory as they are.

    Attributes:
      scale_dtype: of the scales (groups, n) of groups of input channels: int16, int32 or float32; None without groups.
      bits: of a stored code; 8 / bits codes share a byte.
      has_kernel: whether the Hopper kernels take it.
      shift: the accumulator is the sum times 2 ** shift; the epilogue divides.
      in_registers: whether codes reach the tensor cores through registers, in which :meth:`operand` makes an operand of them.
      largest_operand: the largest magnitude that is multiplied with an activation code.
      release_half: after the product with which half of a step nothing of its bytes and scales is read any more.
      rows_for_xla: from so many rows on XLA is faster than the kernels; None for never.
    """

    scale_dtype: np.dtype | None = None

    bits: ClassVar[int]
    has_kernel: ClassVar[bool] = False
    shift: ClassVar[int] = 0
    in_registers: ClassVar[bool] = False
    largest_operand: ClassVar[int] = 127
    release_half: ClassVar[int] = 0
    rows_for_xla: ClassVar[int | None] = None

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Of the entry point, in messages."""

    @property
    @abc.abstractmethod
    def kind(self) -> str | None:
        """Of the groups' scales, in the tables of measured configurations; None without groups."""

    @abc.abstractmethod
    def accumulate(self, x: Array, codes: Array, group_scale: Array | None) -> Array:
        """The accumulator by XLA: (..., n), of x (..., k) and stored codes (n, k * bits / 8)."""

    @property
    def operands(self) -> int:
        """Arrays beside the codes of which every step has a part."""
        return int(self.scale_dtype is not None)

    @property
    def halves(self) -> int:
        """Runs of 128 codes that a 128-byte row of weights holds."""
        return 8 // self.bits

    @property
    def x_dtype(self) -> np.dtype:
        """Of the activations."""
        return jnp.dtype(jnp.int8)

    @property
    def product_dtype(self) -> np.dtype:
        """Of an accumulator of the tensor cores."""
        return jnp.dtype(jnp.int32)

    @property
    def total_dtype(self) -> np.dtype:
        """Of the sum over groups: float32 with float scales, int32 otherwise."""
        exact = self.scale_dtype is None or jnp.issubdtype(self.scale_dtype, jnp.integer)
        return jnp.dtype(jnp.int32 if exact else jnp.float32)

    @property
    def flushed(self) -> bool:
        """Whether the product of every group has an accumulator of its own, and is then added to the total."""
        return self.scale_dtype is not None

    @property
    def telescopes(self) -> bool:
        """Whether accumulators may grow from group to group (:mod:`pallas_kernels.matmul.hopper.grouped`)."""
        return self.flushed and self.total_dtype == jnp.int32

    @property
    def most_tokens(self) -> int:
        """Tokens of a tile for many rows whose totals fit into registers beside the products, as compiling them showed."""
        return 128

    @property
    def most_at_once(self) -> int:
        """Tokens of a chunk where there are few rows, likewise."""
        return 32

    def most_consumers(self, tokens: int) -> int:
        """Warpgroups of a CTA for few rows that find registers for all they hold, likewise."""
        return 4 if tokens <= 16 else {32: 3, 64: 2}[tokens]

    @property
    def folds(self) -> bool:
        """Whether the kernel for few rows may multiply scales into codes, and need not (:meth:`without_folding`)."""
        return False

    def without_folding(self) -> "Decoder":
        """The format that gives the same sums without multiplying scales into codes; itself, if it does not do that."""
        return self

    def check(self, name: str, x: Array, codes: Array, group_scale: Array | None) -> None:
        """Checks dtypes.

        Raises:
          ValueError: if an operand is not of the format.
        """
        for operand, array in (("x", x), ("the weight", codes)):
            if array.dtype != jnp.int8:
                raise ValueError(f"{name}: {operand} must be int8, got {array.dtype}{array.shape}")
        del group_scale

    def cannot_use(self, raw: bool) -> str | None:
        """Why the kernels cannot take the format, if the bare accumulator is wanted or not; None if they can."""
        if not self.has_kernel:
            return f"weights in the format {self.name!r} have no kernel"
        if raw and self.total_dtype == jnp.float32:
            return "with float scales there is no bare accumulator"
        return None

    def prepare(self, x: Array) -> Array:
        """Activations with their columns in the order in which the kernels' operands have them."""
        return x

    # In a kernel: the groups' scales; a format with other arrays has methods of its own.

    def slot_bytes(self, channels: int, ahead: int = 0) -> int:
        """Shared memory of a step's scales, and of those of ``ahead`` groups beyond it."""
        return 0 if self.scale_dtype is None else (self.halves + ahead) * channels * self.scale_dtype.itemsize

    def scratch(self, slots: int, channels: int, ahead: int = 0) -> Mapping[str, Scratch]:
        """Shared memory for the scales of a ring of ``slots`` steps, and of ``ahead`` groups beyond each."""
        from pallas_kernels.matmul.hopper import grouped

        if self.scale_dtype is None:
            return {}
        return grouped.scratch(slots, self.halves + ahead, channels, self.scale_dtype)

    def copy(
        self,
        operands: Sequence[Ref],
        first: Scalar,
        step: Scalar,
        scratch: Mapping[str, Ref],
        slot: Scalar,
        barrier: Ref,
    ) -> None:
        """Starts to copy one step's scales of the channels from ``first`` on to a slot."""
        from pallas_kernels.matmul.hopper import grouped

        if self.scale_dtype is not None:
            grouped.copy(operands[0], first, step * self.halves, scratch, slot, barrier)

    def aux(self, scratch: Mapping[str, Ref], slot: Scalar, channels: object) -> list[jax.Array]:
        """The scales of 64 channels in every group of a slot, as flushing needs them; none without groups."""
        from pallas_kernels.matmul.hopper import grouped

        return [] if self.scale_dtype is None else grouped.rows(scratch, slot, channels)

    def operand(self, packed: jax.Array, half: int, aux: Sequence[jax.Array]) -> jax.Array:
        """The operand that a half of (64, 128) bytes becomes, in registers."""
        raise NotImplementedError(f"{self} is not decoded in registers")

    def decoded(self, packed: jax.Array, half: int, aux: Sequence[jax.Array]) -> jax.Array:
        """:meth:`operand` in jax.numpy, for the interpreter."""
        raise NotImplementedError(f"{self} is not decoded in registers")


def staged_operand(decoder: Decoder, packed: jax.Array, half: int, aux: Sequence[jax.Array], staged: Ref) -> Ref:
    """:meth:`Decoder.operand` for the interpreter, which can emit none, through shared memory.

    Args:
      decoder: the format.
      packed, half, aux: as there.
      staged: reference to (halves, 64, 128) of this warpgroup's own.
    """
    from pallas_kernels.mosaic.compat import plgpu

    staged[half] = decoder.decoded(packed, half, aux)
    plgpu.commit_smem()
    return staged.at[half]
