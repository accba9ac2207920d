"""Packed 4-bit codes to operands of the tensor cores, in registers.

A byte holds two 4-bit codes (see :mod:`pallas_kernels.packing`).  A code left in the high half of its byte is 16 times
itself as int8, so four codes take one mask (high nibbles) or a shift and a mask (low nibbles); the factor 16 goes into the
scale.  Small integer scales can be multiplied into the codes on the way (:func:`scaled`).  A 64 x 128
tile of bytes loaded in the layout of a tensor-core operand becomes two operands without any code changing its lane.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic.compat import FragmentedArray, LaunchContext, Layout, arith, ir, mgpu, plgpu, vector
from pallas_kernels.mosaic.registers import ACC, OPERAND, OPERAND_ROW, i32, scalars


def _map_words(fn: Callable[..., ir.Value], *vectors: Layout) -> Callable[..., jax.Array]:
    """A function of four packed bytes in a 32-bit word, applied to all registers of a (64, 128) operand.

    Args:
      fn: takes the word, and the word of the same row of every vector.
      vectors: layouts of int32 arrays (64,) with a value for every row.
    """
    operand = plgpu.ShapeDtypeStruct((64, 128), jnp.int8, layout=OPERAND)

    @plgpu.inline_mgpu(arg_types=(OPERAND, *vectors), return_type=operand)
    def mapped(ctx: LaunchContext, packed: FragmentedArray, *rows: FragmentedArray) -> FragmentedArray:
        del ctx
        word, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        spread = [row.broadcast_in_dim(packed.shape, (0,), packed.layout).registers for row in rows]
        registers = np.empty_like(packed.registers)
        for index, register in np.ndenumerate(packed.registers):
            values = [scalars(row[index])[0] for row in spread]  # pyright: ignore[reportArgumentType]
            registers[index] = mgpu.utils.bitcast(fn(mgpu.utils.bitcast(register, word), *values), four)
        return mgpu.FragmentedArray(_registers=registers, _layout=packed.layout, _is_signed=True)

    return mapped


def shifted(packed: jax.Array, half: int) -> jax.Array:
    """16 times the codes of the low (0) or high (1) nibbles: (64, 128) bytes to a (64, 128) int8 operand."""
    mask = 0xF0F0F0F0
    return _map_words(lambda w: arith.andi(w if half else arith.shli(w, i32(4)), i32(mask)))(packed)


def scaled(packed: jax.Array, half: int, scale: jax.Array) -> jax.Array:
    """The codes of the low or high nibbles times an integer from 1 to 15 for every row.

    With u = code + 8 in 0 .. 15, u * scale + 128 - 8 * scale lies in 8 .. 233: one multiplication and one addition do
    four bytes without a carry from one to the next, and flipping the highest bits takes the 128 away again.

    Args:
      packed: (64, 128) bytes.
      half: 0 for the low nibbles, 1 for the high ones.
      scale: (64,) int32 in the layout ``OPERAND_ROW``.
    """

    def times(word: ir.Value, scale: ir.Value) -> ir.Value:
        word = arith.shrui(word, i32(4)) if half else word
        u = arith.andi(arith.xori(word, i32(0x08080808)), i32(0x0F0F0F0F))
        offset = arith.subi(i32(0x80808080), arith.muli(scale, i32(0x08080808)))
        return arith.xori(arith.addi(arith.muli(u, scale), offset), i32(0x80808080))

    return _map_words(times, OPERAND_ROW)(packed, scale)


def bfloat16(packed: jax.Array, half: int) -> jax.Array:
    """The codes of the low or high nibbles as bfloat16, columns in the order of ``decoders.reorder``.

    With u = code + 8, the bits 0x4300 + u are 128 + u in bfloat16, from which 136 is subtracted.  Four bytes of a lane
    become the two pairs of columns that a lane holds of a 16-bit operand, so that none changes its lane.
    """
    operand = plgpu.ShapeDtypeStruct((64, 128), jnp.bfloat16, layout=ACC)

    @plgpu.inline_mgpu(arg_types=(OPERAND,), return_type=operand)
    def emit(ctx: LaunchContext, packed: FragmentedArray) -> FragmentedArray:
        del ctx
        word, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        pair = ir.VectorType.get((2,), bf16)
        bias = vector.broadcast(pair, arith.constant(bf16, ir.FloatAttr.get(bf16, 136.0)))
        registers = np.empty((1, 16, *packed.registers.shape[2:]), dtype=object)
        for index, register in np.ndenumerate(packed.registers):
            w = mgpu.utils.bitcast(register, word)
            w = arith.shrui(w, i32(4)) if half else w
            u = arith.andi(arith.xori(w, i32(0x08080808)), i32(0x0F0F0F0F))
            for i, selection in enumerate((0x4140, 0x4342)):
                biased = mgpu.utils.bitcast(mgpu.utils.prmt(u, i32(0x43434343), i32(selection)), pair)
                registers[0, 2 * index[1] + i, *index[2:]] = arith.subf(biased, bias)
        return mgpu.FragmentedArray(_registers=registers, _layout=ACC.to_mgpu(), _is_signed=None)

    return emit(packed)
