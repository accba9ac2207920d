"""Weight formats of the matmuls: how bytes in memory become an operand of the tensor cores.

A format is one frozen class.  It says what XLA computes (:meth:`Decoder.accumulate`), and, where the Hopper kernels take it,
what they need to know of it: the kernels ask their problem's decoder, and know no format by name.  An instance is static: it
is part of a weight's type (:class:`pallas_kernels.Weight`) and of a kernel's.  A new format is a class here, or anywhere
else, and, to be tested and tuned with the others, a line of :data:`DECODERS`.

What the instructions of Mosaic GPU are emitted by is imported where it is called, so that XLA can multiply without it.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from pallas_kernels.matmul import reference
from pallas_kernels.mosaic.types import Ref, Scalar, Scratch
from pallas_kernels.packing import unpack_int4

FLOAT32 = jnp.dtype(jnp.float32)
STEP_CODES = 128
"""Codes of K that one group of ``wgmma`` takes; also the input channels of a group with a scale of its own."""
LARGEST_FOLDED_SCALE = 15
"""Of a group, where it is multiplied into 4-bit codes: -8 times 15 fits into int8, and -8 times 16 is its end."""
WEIGHT_ONLY_ROWS = 2048
"""From so many rows on XLA, which dequantizes first, multiplies faster than the kernel for weights alone: between 1024, where
it does not, and 4096 rows by what ``scripts/tune_kernels.py`` printed on an H100 in November 2026."""


@dataclasses.dataclass(frozen=True)
class Decoder(abc.ABC):
    """A weight format; by default int8 activations, int32 sums, and operands that come from shared memory as they are.

    Attributes:
      scale_dtype: of the scales (groups, n) of groups of input channels: int16, int32 or float32; None without groups.
      bits: of a stored code; 8 / bits codes share a byte.
      shift: the accumulator is the sum times 2 ** shift; the epilogue divides.
      in_registers: whether codes reach the tensor cores through registers, in which :meth:`operand` makes an operand of them.
      largest_operand: the largest magnitude that is multiplied with an activation code.
      release_half: after the product with which half of a step nothing of its bytes and scales is read any more.
      rows_for_xla: from so many rows on XLA is faster than the kernels; None for never.
    """

    scale_dtype: np.dtype | None = None

    bits: ClassVar[int]
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
        if raw and self.total_dtype == jnp.float32:
            return "with float scales there is no bare accumulator"
        return None

    def prepare(self, x: Array) -> Array:
        """Activations with their columns in the order in which the kernels' operands have them."""
        return x

    # In a kernel.  What belongs to the groups' scales; a format with other arrays has its own.

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


@dataclasses.dataclass(frozen=True)
class Int8(Decoder):
    """8-bit codes, one a byte; groups, if there are any, have a scale each, and no kernel."""

    bits = 8

    @property
    def name(self) -> str:
        return "int8" if self.scale_dtype is None else "grouped_int8"

    @property
    def kind(self) -> str | None:
        return None if self.scale_dtype is None else "integer" if self.telescopes else "float"

    def accumulate(self, x: Array, codes: Array, group_scale: Array | None) -> Array:
        if group_scale is None:
            return reference.product(x, codes)
        return reference.grouped_product(x, codes, group_scale)

    def cannot_use(self, raw: bool) -> str | None:
        if self.scale_dtype is not None:
            return f"weights of {self.bits} bits have no kernel with groups"
        return super().cannot_use(raw)


@dataclasses.dataclass(frozen=True)
class Int8Folded(Int8):
    """8-bit codes in groups whose integer scales times the codes fit into int8; there is no kernel for them."""

    @property
    def kind(self) -> str | None:
        return "folded"

    @property
    def flushed(self) -> bool:
        return False

    def accumulate(self, x: Array, codes: Array, group_scale: Array | None) -> Array:
        assert group_scale is not None
        return reference.folded_product(x, codes, group_scale)

    def check(self, name: str, x: Array, codes: Array, group_scale: Array | None) -> None:
        super().check(name, x, codes, group_scale)
        _check_integer(name, group_scale)


@dataclasses.dataclass(frozen=True)
class Int4Shifted(Decoder):
    """4-bit codes, two a byte, left in the upper half of an int8, where they count 16 times.

    Four codes then take one mask (high nibbles) or a shift and a mask (low nibbles).  Groups, if there are any, are flushed.
    """

    bits = 4
    shift = 4
    in_registers = True
    largest_operand = 8 * 16

    @property
    def name(self) -> str:
        return "int4" if self.scale_dtype is None else "grouped_int4"

    @property
    def kind(self) -> str | None:
        return None if self.scale_dtype is None else "integer" if self.telescopes else "float"

    def accumulate(self, x: Array, codes: Array, group_scale: Array | None) -> Array:
        if group_scale is None:
            return reference.product(x, unpack_int4(codes))
        return reference.grouped_product(x, unpack_int4(codes), group_scale)

    def operand(self, packed: jax.Array, half: int, aux: Sequence[jax.Array]) -> jax.Array:
        from pallas_kernels.matmul.hopper import unpack

        return unpack.shifted(packed, half)

    def decoded(self, packed: jax.Array, half: int, aux: Sequence[jax.Array]) -> jax.Array:
        wide = packed.astype(jnp.int32)
        return ((wide if half else wide << 4) & 0xF0).astype(jnp.int8)


@dataclasses.dataclass(frozen=True)
class Int4Folded(Decoder):
    """4-bit codes in groups whose integer scales, from 1 to 15, are multiplied into the codes; one sum serves all groups."""

    bits = 4
    in_registers = True
    largest_operand = 8 * LARGEST_FOLDED_SCALE
    release_half = 1

    @property
    def name(self) -> str:
        return "grouped_int4"

    @property
    def kind(self) -> str | None:
        return "folded"

    @property
    def flushed(self) -> bool:
        return False

    @property
    def folds(self) -> bool:
        return True

    def most_consumers(self, tokens: int) -> int:
        return super().most_consumers(tokens) + (tokens > 16)

    def without_folding(self) -> Decoder:
        return Int4Shifted(self.scale_dtype)

    def accumulate(self, x: Array, codes: Array, group_scale: Array | None) -> Array:
        assert group_scale is not None
        return reference.folded_product(x, unpack_int4(codes), group_scale)

    def check(self, name: str, x: Array, codes: Array, group_scale: Array | None) -> None:
        super().check(name, x, codes, group_scale)
        _check_integer(name, group_scale)

    def aux(self, scratch: Mapping[str, Ref], slot: Scalar, channels: object) -> list[jax.Array]:
        from pallas_kernels.matmul.hopper import grouped

        return grouped.operand_rows(scratch, slot, channels)

    def operand(self, packed: jax.Array, half: int, aux: Sequence[jax.Array]) -> jax.Array:
        from pallas_kernels.matmul.hopper import unpack

        return unpack.scaled(packed, half, aux[half])

    def decoded(self, packed: jax.Array, half: int, aux: Sequence[jax.Array]) -> jax.Array:
        wide = packed.astype(jnp.int32)
        high = (wide if half else wide << 4) & 0xF0
        return (((high << 24) >> 28) * aux[half][:, None]).astype(jnp.int8)


@dataclasses.dataclass(frozen=True)
class Int4Bf16(Decoder):
    """4-bit codes in groups with float scales, for bfloat16 activations (W4A16): codes become bfloat16, groups flushed."""

    scale_dtype: np.dtype | None = FLOAT32

    bits = 4
    in_registers = True
    rows_for_xla = WEIGHT_ONLY_ROWS

    @property
    def name(self) -> str:
        return "weight_only_int4"

    @property
    def kind(self) -> str | None:
        return "weight_only"

    @property
    def x_dtype(self) -> np.dtype:
        return jnp.dtype(jnp.bfloat16)

    @property
    def product_dtype(self) -> np.dtype:
        return jnp.dtype(jnp.float32)

    @property
    def most_tokens(self) -> int:
        return 64

    @property
    def most_at_once(self) -> int:
        return 16

    def most_consumers(self, tokens: int) -> int:
        return 3 if tokens <= 16 else 2

    def accumulate(self, x: Array, codes: Array, group_scale: Array | None) -> Array:
        assert group_scale is not None
        return reference.dequantized_product(x, unpack_int4(codes), group_scale)

    def check(self, name: str, x: Array, codes: Array, group_scale: Array | None) -> None:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: x must have a floating dtype, got {x.dtype}{x.shape}")
        if codes.dtype != jnp.int8:
            raise ValueError(f"{name}: the weight must be int8, got {codes.dtype}{codes.shape}")
        if group_scale is not None and group_scale.dtype != jnp.float32:
            raise ValueError(f"{name}: group_scale must be float32, got {group_scale.dtype}")

    def cannot_use(self, raw: bool) -> str | None:
        if self.total_dtype != jnp.float32:
            return "weight-only matmuls need float scales"
        return super().cannot_use(raw)

    def prepare(self, x: Array) -> Array:
        return reorder(x)

    def operand(self, packed: jax.Array, half: int, aux: Sequence[jax.Array]) -> jax.Array:
        from pallas_kernels.matmul.hopper import unpack

        return unpack.bfloat16(packed, half)

    def decoded(self, packed: jax.Array, half: int, aux: Sequence[jax.Array]) -> jax.Array:
        wide = packed.astype(jnp.int32)
        return reorder(((wide if half else wide << 4) << 24) >> 28).astype(jnp.bfloat16)


DECODERS: dict[str, Decoder] = {
    "int8": Int8(),
    "int4": Int4Shifted(),
    "integer": Int4Shifted(jnp.dtype(jnp.int16)),
    "float": Int4Shifted(jnp.dtype(jnp.float32)),
    "folded": Int4Folded(jnp.dtype(jnp.int16)),
    "weight_only": Int4Bf16(),
}
"""Formats that have a kernel, by the name under which they are tested and tuned."""


def decoder_for(
    bits: int, *, group_dtype: DTypeLike | None = None, folded: bool = False, weight_only: bool = False
) -> Decoder:
    """The format of plain integer codes.

    Args:
      bits: of a code, 8 or 4; of 4-bit codes two share a byte (:func:`pallas_kernels.pack_int4`).
      group_dtype: of the scales of groups of input channels; None without groups.
      folded: promises that these are integers, and that every code times its scale fits into int8 (scales from 1 to 15 for
        4-bit codes).
      weight_only: whether activations are real numbers.

    Raises:
      ValueError: if there is no such format.
    """
    scale_dtype = None if group_dtype is None else jnp.dtype(group_dtype)
    if bits not in (4, 8):
        raise ValueError(f"weight codes have 4 or 8 bits, got {bits}")
    if scale_dtype is None and (folded or weight_only):
        raise ValueError("only scales of groups can be folded, and real activations need scales of groups")
    if weight_only:
        if bits != 4 or folded:
            raise ValueError("real activations need 4-bit codes with scales that are not folded")
        return Int4Bf16(scale_dtype)
    if folded:
        return Int4Folded(scale_dtype) if bits == 4 else Int8Folded(scale_dtype)
    return Int4Shifted(scale_dtype) if bits == 4 else Int8(scale_dtype)


def reorder(x: Array) -> Array:
    """The order of columns that bfloat16 operands have in registers: of every 16, 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 4, 2, 2)
    return jnp.swapaxes(pairs, -3, -2).reshape(x.shape)


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


def _check_integer(name: str, group_scale: Array | None) -> None:
    if group_scale is not None and not jnp.issubdtype(group_scale.dtype, jnp.integer):
        raise ValueError(f"{name}: only integer scales can be folded, got {group_scale.dtype}")
