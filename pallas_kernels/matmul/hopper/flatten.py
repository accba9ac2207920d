"""Extra channels of a gated product: the codes that continue the large channels of a warpgroup.

The recipe (:func:`pallas_kernels.quantize_activations`) says which channel an extra one continues, and what those before it
hold; a warpgroup first lists the extra channels that continue its own (:func:`find`), then writes them (:func:`flatten`).
"""

from collections.abc import Mapping

import jax

from pallas_kernels.matmul.hopper.problem import Gate, Problem
from pallas_kernels.mosaic.compat import (
    FragmentedArray,
    LaunchContext,
    Ref,
    Scalar,
    arith,
    ir,
    memref,
    mgpu,
    plgpu,
    ptx,
)
from pallas_kernels.mosaic.math import WIDE_CODE_LIMIT
from pallas_kernels.mosaic.registers import ACC, WARPGROUP_LANES, i32, lane, offset, scalars, shared_address

PLACE_BITS = 6
"""Bits that hold a channel's place among the 64 of a warpgroup."""
SPARE_WORDS = 4
"""Words by which rows of kept codes are longer, so that eight of them begin in different banks."""


def find(p: Problem, gate: Gate, source: Ref, part: Ref, found: Ref, first: Scalar) -> None:
    """Lists the extra channels that continue one of the 64 from ``first`` on.

    Their count comes first.  Then there are two words for each: its number with the channel it continues, and the magnitude
    that those before it hold.
    """

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, plgpu.Layout.WG_SPLAT(())))
    def emit(ctx: LaunchContext, source: ir.Value, part: ir.Value, found: ir.Value, first: FragmentedArray) -> None:
        del ctx
        own_lane, count = lane(), shared_address(found)
        index = ir.IndexType.get()
        place = arith.index_cast(index, own_lane)
        rows = [arith.constant(index, row) for row in range(gate.extra // WARPGROUP_LANES)]
        channels, parts = ([memref.load(ref, [row, place]) for row in rows] for ref in (source, part))
        blocks = i32(p.n // 2 // 64)
        block = arith.divui(first.registers.item(), i32(64))
        mgpu.utils.warpgroup_barrier()  # Nobody reads the last block's list any more.
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, own_lane, i32(0))):
            ptx("st.shared.b32 [$0], $1;", count, i32(0))
        mgpu.utils.warpgroup_barrier()
        for row, (channel, before) in enumerate(zip(channels, parts, strict=True)):
            number = arith.addi(own_lane, i32(WARPGROUP_LANES * row))
            before = arith.minsi(before, i32(WIDE_CODE_LIMIT))
            at = arith.subi(channel, first.registers.item())
            own = arith.cmpi(arith.CmpIPredicate.ult, at, i32(64))
            # Padding, which nothing reaches, may all continue one channel.  It is dealt out to all.
            padding = arith.cmpi(arith.CmpIPredicate.eq, before, i32(WIDE_CODE_LIMIT))
            dealt = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(number, blocks), block)
            with mgpu.utils.when(arith.select(padding, dealt, own)):
                (place,) = ptx("atom.shared.add.u32 $0, [$1], $2;", count, i32(1), results=1)
                channel = arith.andi(at, i32((1 << PLACE_BITS) - 1))
                entry = arith.ori(arith.shli(number, i32(PLACE_BITS)), channel)
                full = arith.muli(before, i32(gate.qmax))
                ptx("st.shared.v2.b32 [$0], {$1, $2};", offset(count, place, 8, 8), entry, full)

    emit(source, part, found, first)


def flatten(p: Problem, gate: Gate, tokens: int, c: jax.Array, scratch: Mapping[str, Ref], out: Ref) -> None:
    """Writes the extra channels that are listed: the rest of ``c``, at most 16 bits, beyond those before them."""

    @plgpu.inline_mgpu(arg_types=(ACC, *[plgpu.RefType()] * 3))
    def emit(ctx: LaunchContext, c: FragmentedArray, held: ir.Value, found: ir.Value, out: ir.Value) -> None:
        del ctx
        index, word, byte = ir.IndexType.get(), i32(0).type, ir.IntegerType.get_signless(8)
        rows, own_lane = arith.constant(index, ir.MemRefType(out.type).shape[0]), lane()
        held, count = shared_address(held), shared_address(found)

        def where(channel: ir.Value, token: ir.Value) -> ir.Value:
            return offset(offset(held, channel, 4 * (tokens // 2 + SPARE_WORDS)), token, 2)

        mgpu.utils.warpgroup_barrier()  # All have taken the results that were left, in whose place codes are kept.
        for position, register in zip(c.layout.thread_idxs(c.shape), c.registers.flat, strict=True):
            one, other = scalars(register)
            both = arith.ori(arith.andi(one, i32(0xFFFF)), arith.shli(other, i32(16)))
            ptx("st.shared.b32 [$0], $1;", where(*(arith.index_cast(word, at) for at in position)), both)
        mgpu.utils.warpgroup_barrier()
        (listed,) = ptx("ld.shared.b32 $0, [$1];", count, results=1)
        turns = arith.muli(listed, i32(tokens))
        turns = arith.divui(arith.subi(arith.addi(turns, i32(WARPGROUP_LANES - 1)), own_lane), i32(WARPGROUP_LANES))

        @mgpu.utils.fori(turns, [])
        def _(turn: ir.Value, carry: list[ir.Value]) -> list[ir.Value]:
            i = arith.addi(own_lane, arith.muli(turn, i32(WARPGROUP_LANES)))
            at, token = arith.divui(i, i32(tokens)), arith.remui(i, i32(tokens))
            entry, full = ptx("ld.shared.v2.b32 {$0, $1}, [$2];", offset(count, at, 8, 8), results=2)
            channel = arith.andi(entry, i32((1 << PLACE_BITS) - 1))
            (code,) = ptx("ld.shared.s16 $0, [$1];", where(channel, token), results=1)
            qmax, zero = i32(gate.qmax), i32(0)
            beyond = arith.subi(arith.maxsi(code, arith.subi(zero, code)), full)
            beyond = arith.minsi(arith.maxsi(beyond, zero), qmax)
            negative = arith.cmpi(arith.CmpIPredicate.slt, code, zero)
            beyond = arith.select(negative, arith.subi(zero, beyond), beyond)
            token = arith.index_cast(index, token)
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, token, rows)):
                to = arith.addi(arith.shrui(entry, i32(PLACE_BITS)), i32(p.n // 2))
                memref.store(arith.trunci(byte, beyond), out, [token, arith.index_cast(index, to)])
            return carry

    emit(c, scratch["halves"], scratch["found"], out)
