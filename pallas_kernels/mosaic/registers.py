"""Single registers of a kernel, below what Pallas expresses."""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic.compat import (
    FragmentedArray,
    LaunchContext,
    Layout,
    Ref,
    Scalar,
    arith,
    ir,
    llvm,
    memref,
    mgpu,
    plgpu,
    vector,
)

ACC: Layout = plgpu.Layout.WGMMA
"""Layout of accumulators: a lane has two consecutive columns of two rows, eight apart, in every eight columns."""
OPERAND: Layout = plgpu.Layout.WGMMA_8BIT
"""Layout of an 8-bit operand in registers."""
OPERAND_ROW: Layout = plgpu.Layout.WGMMA_8BIT.reduce(1)
"""Layout of a value for every row of an operand."""
ROW: Layout = plgpu.Layout.WGMMA.reduce(1)
"""Layout of a value for every row of accumulators."""
COLUMN: Layout = plgpu.Layout.WGMMA.reduce(0)
"""Layout of a value for every column of accumulators."""

WARPGROUP_LANES = 128


class Dealt(Protocol):
    """Warps whose rows are dealt out to units, each of which finishes those of its own."""

    def place(self) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Of this warp, all i32: its unit, the unit that finishes its rows, its number among those, and its lane."""
        ...


def i32(value: int) -> ir.Value:
    """A constant 32-bit word."""
    return arith.constant(ir.IntegerType.get_signless(32), value - (1 << 32) if value >= 1 << 31 else value)


def shared_address(ref: ir.Value) -> ir.Value:
    """The address of a reference to shared memory, i32."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def scalars(register: ir.Value) -> list[ir.Value]:
    """The elements that one register of an array holds."""
    if not isinstance(register.type, ir.VectorType):
        return [register]
    positions = [ir.DenseI64ArrayAttr.get([i]) for i in range(ir.VectorType(register.type).shape[0])]
    return [vector.extract(register, dynamic_position=[], static_position=at) for at in positions]


def concatenate(parts: Sequence[jax.Array], interpret: bool) -> jax.Array:
    """Arrays (64, columns) in the layout ``ACC``, side by side."""
    if interpret or len(parts) == 1:
        return jnp.concatenate(parts, axis=1)
    columns = sum(part.shape[1] for part in parts)
    whole = plgpu.ShapeDtypeStruct((64, columns), parts[0].dtype, layout=ACC)

    @plgpu.inline_mgpu(arg_types=(ACC,) * len(parts), return_type=whole)
    def emit(ctx: LaunchContext, *parts: FragmentedArray) -> FragmentedArray:
        del ctx
        registers = np.concatenate([part.registers for part in parts], axis=1)  # Axis 1 counts tiles of 8 columns.
        return mgpu.FragmentedArray(_registers=registers, _layout=parts[0].layout, _is_signed=parts[0].is_signed)

    return emit(*parts)


def store(
    value: jax.Array,
    out: Ref,
    token: Scalar,
    channel: Scalar,
    *,
    end: Scalar | None = None,
    exchange: Dealt | None = None,
) -> None:
    """Writes a (64, tokens) tile to its place in (M, N), transposed, leaving out tokens beyond M.

    Args:
      value: results of a warpgroup, in the layout of accumulators.
      out: reference to the whole output in device memory.
      token, channel: where the tile begins, int32 scalars; nothing is written from a channel beyond N on.
      end: the first token that is not written any more, an int32 scalar; M by default.
      exchange: if the sums were exchanged, only the warps whose rows their unit finishes write.
    """
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(), *[scalar] * (2 if end is None else 3)))
    def emit(ctx: LaunchContext, value: FragmentedArray, out: ir.Value, *scalars: FragmentedArray) -> None:
        del ctx
        index = ir.IndexType.get()
        limits = [arith.constant(index, size) for size in ir.MemRefType(out.type).shape]
        token, channel, *others = (arith.index_cast(index, at.registers.item()) for at in scalars)
        limits[:1] = others or limits[:1]
        writes = arith.cmpi(arith.CmpIPredicate.ult, channel, limits[1])
        if exchange is not None:
            unit, target, *_ = exchange.place()
            writes = arith.andi(writes, arith.cmpi(arith.CmpIPredicate.eq, unit, target))

        def element(scalar: ir.Value, position: tuple[ir.Value, ...]) -> None:
            row = arith.addi(position[1], token)
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, row, limits[0])):
                memref.store(scalar, out, [row, arith.addi(position[0], channel)])

        with mgpu.utils.when(writes):
            value.foreach(element)

    emit(value, out, token, channel, *(() if end is None else (end,)))


def lane() -> ir.Value:
    """Number of this lane in its warpgroup, i32."""
    return arith.remui(mgpu.utils.thread_idx(), i32(WARPGROUP_LANES))


def offset(base: ir.Value, count: ir.Value, size: int, more: int = 0) -> ir.Value:
    """An address ``count`` times ``size`` bytes further on, and ``more``."""
    return arith.addi(arith.addi(base, arith.muli(count, i32(size))), i32(more))


def words(array: FragmentedArray) -> list[ir.Value]:
    """The elements a lane has, two 16-bit ones a word."""
    word = ir.IntegerType.get_signless(32)
    whole = [array.registers.flat, (s for r in array.registers.flat for s in scalars(r))][
        mgpu.bitwidth(array.mlir_dtype) == 32
    ]
    return [mgpu.utils.bitcast(value, word) for value in whole]


def from_words(words: Sequence[ir.Value], like: FragmentedArray) -> FragmentedArray:
    """Undoes :func:`words`, for an array that is distributed as another one is."""
    found = like.registers.copy()
    for i, register in enumerate(like.registers.flat):
        if mgpu.bitwidth(like.mlir_dtype) == 32:
            both = [mgpu.utils.bitcast(word, like.mlir_dtype) for word in words[2 * i : 2 * i + 2]]
            found.flat[i] = vector.from_elements(register.type, both)
        else:
            found.flat[i] = mgpu.utils.bitcast(words[i], register.type)
    return mgpu.FragmentedArray(_registers=found, _layout=like.layout, _is_signed=like.is_signed)
