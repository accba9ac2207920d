"""What the kernels do with single registers, below what Pallas expresses.

Unpacking.  A byte holds two 4-bit codes (see :mod:`pallas_kernels.packing`).  A code left in the high half of its byte is
16 times itself as int8, so four codes take one mask (high nibbles) or a shift and a mask (low nibbles); the factor 16
goes into the scale.  Small integer scales can be multiplied into the codes on the way (:func:`unpack_scaled`).  A 64 x 128
tile of bytes loaded in the layout of a tensor-core operand becomes two operands without any code changing its lane.

Exchange.  Where K is split over the CTAs of a cluster, each CTA holds partial sums for the same rows.  Each of its
warps owns 16 rows; the warps' rows are dealt out to the CTAs, and every warp sends its registers to the CTA that finishes
its rows, straight into that CTA's shared memory (``st.async``, counted by a barrier there).  Integer addition is exact in
any order, and the order is fixed besides.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import arith, ir, llvm, memref, mgpu, plgpu, ptx, vector

ACC = plgpu.Layout.WGMMA
"""Layout of accumulators: a lane has two consecutive columns of two rows, eight apart, in every eight columns."""
OPERAND = plgpu.Layout.WGMMA_8BIT
"""Layout of an 8-bit operand in registers."""
OPERAND_ROW = OPERAND.reduce(1)
"""Layout of a value for every row of an operand."""
WARP, CHUNK = 32, 4  # lanes a warp; registers one 16-byte store moves


def _i32(value: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), value - (1 << 32) if value >= 1 << 31 else value)


def _map_words(fn: Callable[..., Any], *vectors: Any) -> Callable[..., Any]:
    """A function of four packed bytes in a 32-bit word, applied to all registers of a (64, 128) operand.

    Args:
      fn: takes the word, and the word of the same row of every vector.
      vectors: layouts of int32 arrays (64,) with a value for every row.
    """
    operand = plgpu.ShapeDtypeStruct((64, 128), jnp.int8, layout=OPERAND)

    @plgpu.inline_mgpu(arg_types=(OPERAND, *vectors), return_type=operand)
    def mapped(ctx: Any, packed: Any, *rows: Any) -> Any:
        del ctx
        word, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        spread = [row.broadcast_in_dim(packed.shape, (0,), packed.layout).registers for row in rows]
        registers = np.empty_like(packed.registers)
        for index, register in np.ndenumerate(packed.registers):
            values = [_scalars(row[index])[0] for row in spread]
            registers[index] = mgpu.utils.bitcast(fn(mgpu.utils.bitcast(register, word), *values), four)
        return mgpu.FragmentedArray(_registers=registers, _layout=packed.layout, _is_signed=True)

    return mapped


def unpack(packed: Any, half: int) -> Any:
    """16 times the codes of the low (0) or high (1) nibbles: (64, 128) bytes to a (64, 128) int8 operand."""
    mask = 0xF0F0F0F0
    return _map_words(lambda w: arith.andi(w if half else arith.shli(w, _i32(4)), _i32(mask)))(packed)


def unpack_scaled(packed: Any, half: int, scale: Any) -> Any:
    """The codes of the low or high nibbles times an integer from 1 to 15 for every row.

    With u = code + 8 in 0 .. 15, u * scale + 128 - 8 * scale lies in 8 .. 233: one multiplication and one addition do
    four bytes without a carry from one to the next, and flipping the highest bits takes the 128 away again.

    Args:
      packed: (64, 128) bytes.
      half: 0 for the low nibbles, 1 for the high ones.
      scale: (64,) int32 in the layout ``OPERAND_ROW``.
    """

    def scaled(word: Any, scale: Any) -> Any:
        word = arith.shrui(word, _i32(4)) if half else word
        u = arith.andi(arith.xori(word, _i32(0x08080808)), _i32(0x0F0F0F0F))
        offset = arith.subi(_i32(0x80808080), arith.muli(scale, _i32(0x08080808)))
        return arith.xori(arith.addi(arith.muli(u, scale), offset), _i32(0x80808080))

    return _map_words(scaled, OPERAND_ROW)(packed, scale)


def unpack_bf16(packed: Any, half: int) -> Any:
    """The codes of the low or high nibbles as bfloat16, columns in the order of :func:`reorder`.

    With u = code + 8, the bits 0x4300 + u are 128 + u in bfloat16, from which 136 is subtracted.  Four bytes of a lane
    become the two pairs of columns that a lane holds of a 16-bit operand, so that none changes its lane.
    """
    operand = plgpu.ShapeDtypeStruct((64, 128), jnp.bfloat16, layout=ACC)

    @plgpu.inline_mgpu(arg_types=(OPERAND,), return_type=operand)
    def emit(ctx: Any, packed: Any) -> Any:
        del ctx
        word, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        pair = ir.VectorType.get((2,), bf16)
        bias = vector.broadcast(pair, arith.constant(bf16, ir.FloatAttr.get(bf16, 136.0)))
        registers = np.empty((1, 16, *packed.registers.shape[2:]), dtype=object)
        for index, register in np.ndenumerate(packed.registers):
            w = mgpu.utils.bitcast(register, word)
            w = arith.shrui(w, _i32(4)) if half else w
            u = arith.andi(arith.xori(w, _i32(0x08080808)), _i32(0x0F0F0F0F))
            for i, selection in enumerate((0x4140, 0x4342)):
                biased = mgpu.utils.bitcast(mgpu.utils.prmt(u, _i32(0x43434343), _i32(selection)), pair)
                registers[0, 2 * index[1] + i, *index[2:]] = arith.subf(biased, bias)
        return mgpu.FragmentedArray(_registers=registers, _layout=ACC.to_mgpu(), _is_signed=None)

    return emit(packed)


def reorder(x: Any) -> Any:
    """The order of columns in which :func:`unpack_bf16` has them: of every 16, 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 4, 2, 2)
    return jnp.swapaxes(pairs, -3, -2).reshape(x.shape)


def unpacked_operand(
    packed: Any, half: int, scale: Any = None, *, weight_only: bool = False, staged: Any = None, interpret: bool = False
) -> Any:
    """The codes of the low or high nibbles as a ``wgmma`` operand, by one of the functions above.

    The interpreter, which can run none of them, gets it through shared memory.

    Args:
      packed: (64, 128) bytes.
      half: 0 for the low nibbles, 1 for the high ones.
      scale: (64,) int32, or None.
      weight_only: whether activations are bfloat16.
      staged: in interpret mode, a reference to (2, 64, 128) of this warpgroup's own; unused otherwise.
      interpret: whether the kernel is interpreted.
    """
    if not interpret and weight_only:
        return unpack_bf16(packed, half)
    if not interpret:
        return unpack(packed, half) if scale is None else unpack_scaled(packed, half, scale)
    wide = packed.astype(jnp.int32)
    if weight_only:
        staged[half] = reorder(((wide if half else wide << 4) << 24) >> 28).astype(jnp.bfloat16)
        plgpu.commit_smem()
        return staged.at[half]
    high = (wide if half else wide << 4) & 0xF0
    if scale is not None:
        high = ((high << 24) >> 28) * scale[:, None]
    staged[half] = high.astype(jnp.int8)
    plgpu.commit_smem()
    return staged.at[half]


def _thread() -> tuple[Any, Any]:
    """(warp in the CTA, lane), both i32."""
    thread = mgpu.utils.thread_idx()
    return arith.divui(thread, _i32(WARP)), arith.remui(thread, _i32(WARP))


def _shared_address(ref: Any) -> Any:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def _cluster(action: str) -> None:
    """The hardware barrier of a cluster; every thread arrives and waits once."""
    ptx(f"barrier.cluster.{action}.aligned;", convergent=True)


class Exchange:
    """The reduction of partial sums over the CTAs of a cluster, and over groups of warpgroups within each.

    A unit is one group of one CTA: (rank in the cluster) * groups + (group).  All units hold partial sums for the same 64 *
    ``warpgroups`` rows; each finishes an equal share of them.

    Args:
      splits: CTAs in the cluster.
      groups: groups in a CTA.
      warpgroups: warpgroups in a group, 64 rows each.
      tokens: columns of each warpgroup's (64, tokens) partial sums.
      dtype: of the sums, int32 or float32.
    """

    def __init__(self, splits: int, groups: int, warpgroups: int, tokens: int, dtype: Any = jnp.int32):
        self.units = splits * groups
        if 4 * warpgroups % self.units:
            raise ValueError(f"the rows of {4 * warpgroups} warps cannot be dealt out to {self.units} groups")
        self.groups, self.tokens, self.dtype = groups, tokens, dtype
        self.group_warps = 4 * warpgroups
        self.warps = self.group_warps // self.units  # of each unit, whose rows one unit finishes
        self.chunks = tokens // 2 // CHUNK

    def place(self) -> tuple[Any, Any, Any, Any]:
        """Of this warp, all i32: its unit, the unit that finishes its rows, its number among those, and its lane."""
        warp, lane = _thread()
        rank = arith.index_cast(ir.IntegerType.get_signless(32), mgpu.utils.cluster_idx())
        group, row = arith.divui(warp, _i32(self.group_warps)), arith.remui(warp, _i32(self.group_warps))
        unit = arith.addi(arith.muli(rank, _i32(self.groups)), group)
        return unit, arith.divui(row, _i32(self.warps)), arith.remui(row, _i32(self.warps)), lane

    def scratch(self) -> tuple[Any, Any]:
        """Shared memory: where partial sums arrive, and the barrier that counts their bytes."""
        return plgpu.SMEM((self.nbytes() // 4,), jnp.int32), plgpu.SMEM((2,), jnp.int32)

    def nbytes(self) -> int:
        """What arrives at one CTA."""
        return self.groups * (self.units - 1) * self.warps * self.chunks * WARP * CHUNK * 4

    def begin(self, barrier: Any) -> None:
        """Prepares the barrier and says so to the cluster; every thread calls it, before its other work."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def emit(ctx: Any, barrier: Any) -> None:
            del ctx
            first = arith.cmpi(arith.CmpIPredicate.eq, mgpu.utils.thread_idx(), _i32(0))
            ptx(
                f"""{{
                @$1 mbarrier.init.shared::cta.b64 [$0], 1;
                @$1 fence.mbarrier_init.release.cluster;
                @$1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {self.nbytes()};
                }}""",
                _shared_address(barrier),
                first,
            )
            _cluster("arrive.release")

        emit(barrier)

    def ready(self) -> None:
        """Waits until every CTA of the cluster has begun; every thread calls it once, before it ends or sends."""

        @plgpu.inline_mgpu()
        def emit(ctx: Any) -> None:
            del ctx
            _cluster("wait.acquire")

        emit()

    def __call__(self, partial: Any, arrivals: Any, barrier: Any) -> Any:
        """Sums over the cluster.

        Args:
          partial: (64, tokens) of each consumer warpgroup, in the layout ``ACC``.
          arrivals: scratch of this CTA.
          barrier: prepared by :meth:`begin`, and :meth:`ready` was called.

        Returns:
          The sums, in the warps whose rows this CTA finishes (see :func:`store`); other warps get nothing of use.
        """

        @plgpu.inline_mgpu(
            arg_types=(ACC, plgpu.RefType(), plgpu.RefType()),
            return_type=plgpu.ShapeDtypeStruct((64, self.tokens), self.dtype, layout=ACC),
        )
        def emit(ctx: Any, partial: Any, arrivals: Any, barrier: Any) -> Any:
            del ctx
            unit, target, slot, lane = self.place()
            base, counter = _shared_address(arrivals), _shared_address(barrier)
            word, floats = ir.IntegerType.get_signless(32), self.dtype == jnp.float32
            add = arith.addf if floats else arith.addi
            cta, group = arith.divui(target, _i32(self.groups)), arith.remui(target, _i32(self.groups))

            def offset(group: Any, distance: Any, chunk: int) -> Any:  # in bytes: 16 a lane, 512 a chunk
                box = arith.addi(arith.muli(group, _i32(self.units - 1)), distance)
                box = arith.addi(arith.muli(box, _i32(self.warps)), slot)
                box = arith.addi(arith.muli(box, _i32(self.chunks)), _i32(chunk))
                return arith.addi(arith.muli(box, _i32(16 * WARP)), arith.muli(lane, _i32(16)))

            # What this unit finishes itself stays in the registers; a unit's place at the target is its distance, less 1.
            away = arith.cmpi(arith.CmpIPredicate.ne, target, unit)
            distance = arith.subi(arith.addi(unit, _i32(self.units - 1)), target)
            distance = arith.remui(distance, _i32(self.units))
            sums = [scalar for register in partial.registers.flat for scalar in _scalars(register)]
            for chunk in range(self.chunks):
                ptx(
                    """{
                    .reg .b32 data, counter;
                    mapa.shared::cluster.u32 data, $0, $2;
                    mapa.shared::cluster.u32 counter, $1, $2;
                    @$3 st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [data], {$4, $5, $6, $7}, [counter];
                    }""",
                    arith.addi(base, offset(group, distance, chunk)),
                    counter,
                    cta,
                    away,
                    *(mgpu.utils.bitcast(sum_, word) for sum_ in sums[CHUNK * chunk : CHUNK * (chunk + 1)]),
                )
            _wait(counter)
            own = arith.remui(unit, _i32(self.groups))
            for chunk, other in itertools.product(range(self.chunks), range(self.units - 1)):
                part = _load4(arith.addi(base, offset(own, _i32(other), chunk)))
                for i, value in enumerate(part, CHUNK * chunk):
                    sums[i] = add(sums[i], mgpu.utils.bitcast(value, sums[i].type))
            registers = np.empty_like(partial.registers)
            for i, register in enumerate(partial.registers.flat):
                registers.flat[i] = vector.from_elements(register.type, sums[2 * i : 2 * i + 2])
            signed = None if floats else True
            return mgpu.FragmentedArray(_registers=registers, _layout=partial.layout, _is_signed=signed)

        return emit(partial, arrivals, barrier)


def _scalars(register: Any) -> list[Any]:
    if not isinstance(register.type, ir.VectorType):
        return [register]
    positions = [ir.DenseI64ArrayAttr.get([i]) for i in range(ir.VectorType(register.type).shape[0])]
    return [vector.extract(register, dynamic_position=[], static_position=at) for at in positions]


def _wait(barrier: Any) -> None:
    """Waits for the first phase of a barrier that other CTAs of the cluster complete."""
    ptx(
        """{
        .reg .pred done;
        again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], 0;
        @!done bra again;
        }""",
        barrier,
    )


def _load4(address: Any) -> tuple[Any, ...]:
    return ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address, results=CHUNK)


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


def gather(values: Any, index: Any, layout: Any) -> Any:
    """``values[index]`` as int32.

    Args:
      values: reference to int16 in shared memory, written and committed before.
      index: one-dimensional int32 array.
      layout: of ``index`` and of the result, a strided one.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout),
        return_type=plgpu.ShapeDtypeStruct(index.shape, jnp.int32, layout=layout),
    )
    def emit(ctx: Any, values: Any, index: Any) -> Any:
        del ctx
        base = _shared_address(values)
        registers = np.empty_like(index.registers)
        for i, register in np.ndenumerate(index.registers):
            addresses = [arith.addi(base, arith.shli(at, _i32(1))) for at in _scalars(register)]
            words = [ptx("ld.shared.s16 $0, [$1];", address, results=1)[0] for address in addresses]
            registers[i] = vector.from_elements(register.type, words)
        return mgpu.FragmentedArray(_registers=registers, _layout=index.layout, _is_signed=True)

    return emit(values, index)


def store(value: Any, out: Any, token: Any, channel: Any, *, exchange: Exchange | None = None) -> None:
    """Writes a (64, tokens) tile to its place in (M, N), transposed, leaving out tokens beyond M.

    Args:
      value: results of a warpgroup, in the layout of accumulators.
      out: reference to the whole output in device memory.
      token, channel: where the tile begins, int32 scalars; nothing is written from a channel beyond N on.
      exchange: if there was one, only the warps whose rows their unit finishes write.
    """
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(), scalar, scalar))
    def emit(ctx: Any, value: Any, out: Any, token: Any, channel: Any) -> None:
        del ctx
        index = ir.IndexType.get()
        limits = [arith.constant(index, size) for size in ir.MemRefType(out.type).shape]
        token, channel = (arith.index_cast(index, start.registers.item()) for start in (token, channel))
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

    emit(value, out, token, channel)
