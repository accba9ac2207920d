"""What the kernels do with single registers, below what Pallas expresses."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic.compat import arith, ir, llvm, memref, mgpu, plgpu, vector

ACC = plgpu.Layout.WGMMA
"""Layout of accumulators: a lane has two consecutive columns of two rows, eight apart, in every eight columns."""
OPERAND = plgpu.Layout.WGMMA_8BIT
"""Layout of an 8-bit operand in registers."""
OPERAND_ROW = OPERAND.reduce(1)
"""Layout of a value for every row of an operand."""


def i32(value: int) -> Any:
    """A constant 32-bit word."""
    return arith.constant(ir.IntegerType.get_signless(32), value - (1 << 32) if value >= 1 << 31 else value)


def shared_address(ref: Any) -> Any:
    """Where a reference to shared memory points to, i32."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def scalars(register: Any) -> list[Any]:
    """The elements that one register of an array holds."""
    if not isinstance(register.type, ir.VectorType):
        return [register]
    positions = [ir.DenseI64ArrayAttr.get([i]) for i in range(ir.VectorType(register.type).shape[0])]
    return [vector.extract(register, dynamic_position=[], static_position=at) for at in positions]


def concatenate(parts: Sequence[Any], interpret: bool) -> Any:
    """Arrays (64, columns) in the layout ``ACC``, side by side."""
    if interpret or len(parts) == 1:
        return jnp.concatenate(parts, axis=1)
    columns = sum(part.shape[1] for part in parts)
    whole = plgpu.ShapeDtypeStruct((64, columns), parts[0].dtype, layout=ACC)

    @plgpu.inline_mgpu(arg_types=(ACC,) * len(parts), return_type=whole)
    def emit(ctx: Any, *parts: Any) -> Any:
        del ctx
        registers = np.concatenate([part.registers for part in parts], axis=1)  # Axis 1 counts tiles of 8 columns.
        return mgpu.FragmentedArray(_registers=registers, _layout=parts[0].layout, _is_signed=parts[0].is_signed)

    return emit(*parts)


def store(value: Any, out: Any, token: Any, channel: Any, *, end: Any = None, exchange: Any = None) -> None:
    """Writes a (64, tokens) tile to its place in (M, N), transposed, leaving out tokens beyond M.

    Args:
      value: results of a warpgroup, in the layout of accumulators.
      out: reference to the whole output in device memory.
      token, channel: where the tile begins, int32 scalars; nothing is written from a channel beyond N on.
      end: the first token that is not written any more, an int32 scalar; M by default.
      exchange: if there was one (the decoding matmul's), only the warps whose rows their unit finishes write.
    """
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(), *[scalar] * (2 if end is None else 3)))
    def emit(ctx: Any, value: Any, out: Any, *scalars: Any) -> None:
        del ctx
        index = ir.IndexType.get()
        limits = [arith.constant(index, size) for size in ir.MemRefType(out.type).shape]
        token, channel, *others = (arith.index_cast(index, at.registers.item()) for at in scalars)
        limits[:1] = others or limits[:1]
        writes = arith.cmpi(arith.CmpIPredicate.ult, channel, limits[1])
        if exchange is not None:
            unit, target, *_ = exchange.place()
            writes = arith.andi(writes, arith.cmpi(arith.CmpIPredicate.eq, unit, target))

        def element(scalar: Any, position: tuple[Any, Any]) -> None:
            row = arith.addi(position[1], token)
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, row, limits[0])):
                memref.store(scalar, out, [row, arith.addi(position[0], channel)])

        with mgpu.utils.when(writes):
            value.foreach(element)

    emit(value, out, token, channel, *(() if end is None else (end,)))
