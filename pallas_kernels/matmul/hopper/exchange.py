"""Sums over the CTAs of a cluster.

Where K is split over the CTAs of a cluster, each CTA holds partial sums for the same rows.  Each of its warps owns 16 rows;
the warps' rows are dealt out to the CTAs, and every warp sends its registers to the CTA that finishes its rows, straight
into that CTA's shared memory (``st.async``, counted by a barrier there).  Integer addition is exact in any order, and the
order is fixed besides.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic.compat import (
    FragmentedArray,
    LaunchContext,
    Ref,
    Scratch,
    arith,
    ir,
    mgpu,
    plgpu,
    ptx,
    vector,
)
from pallas_kernels.mosaic.registers import ACC, i32, scalars, shared_address

WARP_LANES = 32
STORED_REGISTERS = 4  # that one 16-byte store moves


def _thread() -> tuple[ir.Value, ir.Value]:
    """(warp in the CTA, lane), both i32."""
    thread = mgpu.utils.thread_idx()
    return arith.divui(thread, i32(WARP_LANES)), arith.remui(thread, i32(WARP_LANES))


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

    def __init__(self, splits: int, groups: int, warpgroups: int, tokens: int, dtype: np.dtype):
        self.units = splits * groups
        if 4 * warpgroups % self.units:
            raise ValueError(f"the rows of {4 * warpgroups} warps cannot be dealt out to {self.units} groups")
        self.groups, self.tokens, self.dtype = groups, tokens, dtype
        self.group_warps = 4 * warpgroups
        self.warps = self.group_warps // self.units  # of each unit, whose rows one unit finishes
        self.chunks = tokens // 2 // STORED_REGISTERS

    def place(self) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Of this warp, all i32: its unit, the unit that finishes its rows, its number among those, and its lane."""
        warp, lane = _thread()
        rank = arith.index_cast(ir.IntegerType.get_signless(32), mgpu.utils.cluster_idx())
        group, row = arith.divui(warp, i32(self.group_warps)), arith.remui(warp, i32(self.group_warps))
        unit = arith.addi(arith.muli(rank, i32(self.groups)), group)
        return unit, arith.divui(row, i32(self.warps)), arith.remui(row, i32(self.warps)), lane

    def scratch(self) -> dict[str, Scratch]:
        """Shared memory: where partial sums arrive, and the barrier that counts their bytes."""
        return {"arrivals": plgpu.SMEM((self.nbytes() // 4,), jnp.int32), "arrived": plgpu.SMEM((2,), jnp.int32)}

    def nbytes(self) -> int:
        """Bytes that arrive at one CTA."""
        return self.groups * (self.units - 1) * self.warps * self.chunks * WARP_LANES * STORED_REGISTERS * 4

    def begin(self, barrier: Ref) -> None:
        """Prepares the barrier and says so to the cluster; every thread calls it, before its other work."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def emit(ctx: LaunchContext, barrier: ir.Value) -> None:
            del ctx
            first = arith.cmpi(arith.CmpIPredicate.eq, mgpu.utils.thread_idx(), i32(0))
            ptx(
                f"""{{
                @$1 mbarrier.init.shared::cta.b64 [$0], 1;
                @$1 fence.mbarrier_init.release.cluster;
                @$1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {self.nbytes()};
                }}""",
                shared_address(barrier),
                first,
            )
            _cluster("arrive.release")

        emit(barrier)

    def ready(self) -> None:
        """Waits until every CTA of the cluster has begun; every thread calls it once, before it ends or sends."""

        @plgpu.inline_mgpu()
        def emit(ctx: LaunchContext) -> None:
            del ctx
            _cluster("wait.acquire")

        emit()

    def __call__(self, partial: jax.Array, arrivals: Ref, barrier: Ref) -> jax.Array:
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
        def emit(
            ctx: LaunchContext, partial: FragmentedArray, arrivals: ir.Value, barrier: ir.Value
        ) -> FragmentedArray:
            del ctx
            unit, target, slot, lane = self.place()
            base, counter = shared_address(arrivals), shared_address(barrier)
            word, floats = ir.IntegerType.get_signless(32), self.dtype == jnp.float32
            add = arith.addf if floats else arith.addi
            cta, group = arith.divui(target, i32(self.groups)), arith.remui(target, i32(self.groups))

            def offset(group: ir.Value, distance: ir.Value, chunk: int) -> ir.Value:  # in bytes: 16 a lane, 512 a chunk
                box = arith.addi(arith.muli(group, i32(self.units - 1)), distance)
                box = arith.addi(arith.muli(box, i32(self.warps)), slot)
                box = arith.addi(arith.muli(box, i32(self.chunks)), i32(chunk))
                return arith.addi(arith.muli(box, i32(16 * WARP_LANES)), arith.muli(lane, i32(16)))

            # The rows that this unit finishes stay in its registers; a unit's place at the target is its distance, less 1.
            away = arith.cmpi(arith.CmpIPredicate.ne, target, unit)
            distance = arith.subi(arith.addi(unit, i32(self.units - 1)), target)
            distance = arith.remui(distance, i32(self.units))
            sums = [scalar for register in partial.registers.flat for scalar in scalars(register)]
            for chunk in range(self.chunks):
                first = STORED_REGISTERS * chunk
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
                    *(mgpu.utils.bitcast(value, word) for value in sums[first : first + STORED_REGISTERS]),
                )
            _wait(counter)
            own = arith.remui(unit, i32(self.groups))
            for chunk, other in itertools.product(range(self.chunks), range(self.units - 1)):
                part = _load4(arith.addi(base, offset(own, i32(other), chunk)))
                for i, value in enumerate(part, STORED_REGISTERS * chunk):
                    sums[i] = add(sums[i], mgpu.utils.bitcast(value, sums[i].type))
            registers = np.empty_like(partial.registers)
            for i, register in enumerate(partial.registers.flat):
                registers.flat[i] = vector.from_elements(register.type, sums[2 * i : 2 * i + 2])
            signed = None if floats else True
            return mgpu.FragmentedArray(_registers=registers, _layout=partial.layout, _is_signed=signed)

        return emit(partial, arrivals, barrier)


def _wait(barrier: ir.Value) -> None:
    """Waits for the first phase of a barrier that other CTAs of the cluster complete."""
    ptx(
        """{
        .reg .pred done;
        again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], 0;
        @!done bra again;
        }""",
        barrier,
    )


def _load4(address: ir.Value) -> tuple[ir.Value, ...]:
    return ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address, results=STORED_REGISTERS)
