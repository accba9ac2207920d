"""The weight formats of the matmuls.

A new one is a class here, or anywhere else (:mod:`pallas_kernels.matmul.hopper.decoder`); a line of :data:`DECODERS` has it
tested and tuned with the others.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from pallas_kernels.matmul import reference
from pallas_kernels.matmul.hopper.decoder import Decoder
from pallas_kernels.mosaic.types import Ref, Scalar
from pallas_kernels.packing import unpack_int4

FLOAT32 = jnp.dtype(jnp.float32)
LARGEST_FOLDED_SCALE = 15
"""Of a group, where it is multiplied into 4-bit codes: -8 times 15 fits into int8, and -8 times 16 is its end."""
WEIGHT_ONLY_ROWS = 2048
"""From so many rows on XLA, which dequantizes first, multiplies faster than the kernel for weights alone: between 1024, where
it does not, and 4096 rows, as ``scripts/tune_kernels.py`` printed on an H100 in November 2026."""


@dataclasses.dataclass(frozen=True)
class Int8(Decoder):
    """8-bit codes, one a byte; groups, if there are any, have a scale each, and no kernel."""

    bits = 8
    has_kernel = True

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
    has_kernel = True
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
    has_kernel = True
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
    has_kernel = True
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


def _check_integer(name: str, group_scale: Array | None) -> None:
    if group_scale is not None and not jnp.issubdtype(group_scale.dtype, jnp.integer):
        raise ValueError(f"{name}: only integer scales can be folded, got {group_scale.dtype}")
