"""Epilogue of a matmul whose output channels are two halves: one gates the other, and the result is quantized.

    h[m, j] = activation(y[m, j]) * y[m, n / 2 + j]        where y is the product, rounded to its dtype

Of a CTA's two consumers one multiplies channels of the first half, the other the same channels of the second.  Both leave
their results in shared memory, register by register, and go on.  A further warpgroup, whose lanes find values that belong
together in the same place, does the rest, while the next block is multiplied.

With scales that are fixed, h becomes codes there and then.  Its large channels go on in extra ones
(:func:`pallas_kernels.quantize_activations`).  The sources and parts of those are copied to shared memory before the first
weights, since all that is read later waits for weights; there the warpgroup looks up which of them belong to its channels.

With a scale for every row, which no CTA knows, h is written as it is, beside the largest magnitudes of every 16 channels,
which the kernel that quantizes it needs besides.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul.hopper.flatten import SPARE_WORDS, find, flatten
from pallas_kernels.matmul.hopper.problem import DECODE_ROWS, Gate, Problem
from pallas_kernels.matmul.hopper.ragged import Rows
from pallas_kernels.mosaic import registers
from pallas_kernels.mosaic.compat import (
    FragmentedArray,
    LaunchContext,
    Ref,
    Scalar,
    Scratch,
    arith,
    ir,
    load,
    memref,
    mgpu,
    plgpu,
    ptx,
    vector,
)
from pallas_kernels.mosaic.math import ACTIVATIONS, WIDE_CODE_LIMIT, rounded
from pallas_kernels.mosaic.registers import ACC, ROW, WARPGROUP_LANES, i32, lane, offset, scalars, shared_address

WARP_CHANNELS = 16
"""Channels of one warp, of which the largest magnitude is found."""


def cannot_use(p: Problem) -> str | None:
    """Why the kernels cannot take a problem with a gate; None if they can."""
    gate = p.gate
    if gate is None:
        return None
    if gate.activation not in ACTIVATIONS:
        return f"they know no {gate.activation}"
    if p.m > DECODE_ROWS:
        return f"{p.m} rows are more than {DECODE_ROWS}"
    if p.decoder.x_dtype != jnp.int8 or p.experts or p.raw:
        return "with a gate there must be codes, one weight, and scales"
    if p.n % 256 or gate.extra % WARPGROUP_LANES:
        return f"N = {p.n} is not a multiple of 256, or {gate.extra} extra channels are not one of {WARPGROUP_LANES}"
    return None


class Gating:
    """A gate in a kernel whose CTAs have ``warpgroups`` consumers, with ``tokens`` columns each.

    Raises:
      NotImplementedError: if such CTAs cannot have one.
    """

    warpgroups = 1

    def __init__(self, p: Problem, gate: Gate, warpgroups: int, tokens: int):
        if warpgroups != 2:
            raise NotImplementedError(f"{warpgroups} warpgroups are not one for either half")
        self.p, self.gate, self.tokens = p, gate, tokens
        self.operands = 3 if gate.extra else 1
        self.spans = [(0, 0, 64), (64, p.n // 2, 64)]
        self.words = tokens // 2 * jnp.dtype(p.out_dtype).itemsize // 4  # that a lane of a consumer leaves
        self.kept = 64 * (tokens // 2 + SPARE_WORDS) if self.gate.extra else 0  # words of codes, two tokens each
        self.listed = 2 + 2 * self.gate.extra if self.gate.extra else 0  # words of a list

    @property
    def held(self) -> int:
        """Words for what the consumers leave, and for the codes that take its place."""
        return max(2 * self.words * WARPGROUP_LANES, self.kept)

    def nbytes(self) -> int:
        """Of shared memory."""
        return 4 * (self.held + self.listed + 2 * self.gate.extra)

    def scratch(self) -> dict[str, Scratch]:
        """Shared memory: what consumers leave, the recipe of extra channels and the list of those here, and barriers."""
        found: dict[str, Scratch] = {"halves": plgpu.SMEM((self.held,), jnp.int32)}
        if self.gate.extra:
            found["found"] = plgpu.SMEM((self.listed,), jnp.int32)
            shape = self.gate.extra // WARPGROUP_LANES, WARPGROUP_LANES
            found |= dict.fromkeys(("source", "part"), plgpu.SMEM(shape, jnp.int32))
            found["known"] = plgpu.Barrier(num_arrivals=2)
        return found | {"left": plgpu.Barrier(num_arrivals=2), "taken": plgpu.Barrier(num_arrivals=1)}

    def out(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Codes, or the values to be quantized and their largest magnitudes."""
        half, gate = self.p.n // 2, self.gate
        if gate.per_token:
            values = jax.ShapeDtypeStruct((self.p.m, half), jnp.float32)
            return values, jax.ShapeDtypeStruct((self.p.m, half // WARP_CHANNELS), jnp.float32)
        return (jax.ShapeDtypeStruct((self.p.m, half + gate.extra), jnp.int8),)

    def start(self, operands: Sequence[Ref], scratch: Mapping[str, Ref]) -> None:
        """Begins to copy the recipe of extra channels; the producer calls it before its other work.

        Args:
          operands: references to the multiplier, and, if there are extra channels, to source and part, (extra / 128, 128).
          scratch: as :meth:`scratch` has described it.
        """
        if self.gate.extra:
            _, source, part = operands
            plgpu.copy_gmem_to_smem(source, scratch["source"], scratch["known"])
            plgpu.copy_gmem_to_smem(part, scratch["part"], scratch["known"])

    def leave(
        self, y: jax.Array, turn: Scalar, of: Rows, first: Scalar, outputs: Sequence[Ref], scratch: Mapping[str, Ref]
    ) -> None:
        """Leaves a consumer's (64, tokens) of the product, of its CTA's ``turn``-th block."""

        @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType()))
        def emit(ctx: LaunchContext, y: FragmentedArray, halves: ir.Value) -> None:
            del ctx
            warpgroup = arith.divui(mgpu.utils.thread_idx(), i32(WARPGROUP_LANES))
            address = offset(shared_address(halves), warpgroup, 4 * WARPGROUP_LANES * self.words)
            for i, word in enumerate(registers.words(y)):
                ptx("st.shared.b32 [$0], $1;", offset(address, lane(), 4, 4 * WARPGROUP_LANES * i), word)

        pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch["taken"]))
        emit(y, scratch["halves"])
        plgpu.barrier_arrive(scratch["left"])

    def finish(
        self,
        mine: Scalar,
        first_of: Callable[[Scalar], Scalar],
        operands: Sequence[Ref],
        outputs: Sequence[Ref],
        scratch: Mapping[str, Ref],
    ) -> None:
        """Gates and quantizes block after block, in a warpgroup of its own.

        Args:
          mine: blocks of the CTA.
          first_of: of a block's turn, gives its first channel in either half.
          operands: as for :meth:`start`.
          outputs: references to what :meth:`out` describes.
          scratch: as :meth:`scratch` has described it.
        """

        def block(turn: Scalar, _: None) -> None:
            first = first_of(turn)
            multiplier = load(operands[0].at[pl.ds(first, 64)], ROW, optimized=False)
            if self.gate.extra:
                pl.when(turn == 0)(lambda: plgpu.barrier_wait(scratch["known"]))
                find(self.p, self.gate, scratch["source"], scratch["part"], scratch["found"], first)
            plgpu.barrier_wait(scratch["left"])
            gate, beside = (self._take(scratch["halves"], half).astype(jnp.float32) for half in range(2))
            h, scale = _activated(self.gate.activation, gate), lax.broadcast_in_dim(multiplier, gate.shape, [0])
            write = functools.partial(registers.store, token=jnp.int32(0), channel=first)
            if self.gate.per_token:
                plgpu.barrier_arrive(scratch["taken"])
                write(h * beside, outputs[0])
                _write_largest(jnp.abs(h * beside * scale), outputs[1], first)
                return
            qmax = float(self.gate.qmax)
            c = rounded(h * scale * beside, WIDE_CODE_LIMIT, interpret=False)
            if self.gate.extra:
                flatten(self.p, self.gate, self.tokens, c.astype(jnp.int32), scratch, outputs[0])
            plgpu.barrier_arrive(scratch["taken"])
            write(jnp.minimum(jnp.maximum(c, -qmax), qmax).astype(jnp.int32).astype(jnp.int8), outputs[0])

        lax.fori_loop(0, mine, block, None)

    def _take(self, halves: Ref, half: int) -> jax.Array:
        """The results that the consumer of a half has left."""
        dtype = self.p.out_dtype

        @plgpu.inline_mgpu(
            arg_types=(ACC, plgpu.RefType()),
            return_type=plgpu.ShapeDtypeStruct((64, self.tokens), dtype, layout=ACC),
        )
        def emit(ctx: LaunchContext, like: FragmentedArray, halves: ir.Value) -> FragmentedArray:
            del ctx
            address = offset(shared_address(halves), lane(), 4, 4 * WARPGROUP_LANES * self.words * half)
            words = [
                ptx("ld.shared.b32 $0, [$1];", arith.addi(address, i32(4 * WARPGROUP_LANES * i)), results=1)[0]
                for i in range(self.words)
            ]
            return registers.from_words(words, like)

        return emit(plgpu.layout_cast(jnp.zeros((64, self.tokens), dtype), plgpu.Layout.WGMMA), halves)


def _activated(activation: str, x: jax.Array) -> jax.Array:
    """The activation function, float32; silu's exponential and reciprocal are the GPU's, wrong in the last bit or two."""
    if activation != "silu":
        return ACTIVATIONS[activation](x)
    kind = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=ACC)

    @plgpu.inline_mgpu(arg_types=(ACC,), return_type=kind)
    def sigmoid(ctx: LaunchContext, x: FragmentedArray) -> FragmentedArray:
        del ctx
        word = i32(0).type

        def of_one(x: ir.Value) -> ir.Value:
            (found,) = ptx(
                """{
                .reg .f32 x;
                mov.b32 x, $1;
                mul.f32 x, x, 0fBFB8AA3B;
                ex2.approx.ftz.f32 x, x;
                add.f32 x, x, 0f3F800000;
                rcp.approx.ftz.f32 x, x;
                mov.b32 $0, x;
                }""",
                mgpu.utils.bitcast(x, word),
                results=1,
            )
            return mgpu.utils.bitcast(found, x.type)

        registers = x.registers.copy()
        for i, register in enumerate(x.registers.flat):
            registers.flat[i] = vector.from_elements(register.type, [of_one(value) for value in scalars(register)])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return x * sigmoid(x)


def _write_largest(magnitudes: jax.Array, out: Ref, first: Scalar) -> None:
    """Writes the largest magnitude that every warp has of each token."""

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def emit(ctx: LaunchContext, magnitudes: FragmentedArray, out: ir.Value, first: FragmentedArray) -> None:
        del ctx
        index = ir.IndexType.get()
        own_lane = lane()
        warp, column = arith.divui(own_lane, i32(32)), arith.remui(own_lane, i32(32))
        place = arith.addi(arith.divui(first.registers.item(), i32(WARP_CHANNELS)), warp)
        place = arith.index_cast(index, place)
        writes = arith.cmpi(arith.CmpIPredicate.ult, column, i32(4))
        rows = arith.constant(index, ir.MemRefType(out.type).shape[0])
        halves = magnitudes.registers.reshape(-1, 2)  # of 16 channels, in every 8 tokens
        for tile, (upper, lower) in enumerate(halves):
            for i, (one, other) in enumerate(zip(scalars(upper), scalars(lower), strict=True)):
                largest = arith.maximumf(one, other)
                for distance in (4, 8, 16):  # Four lanes in a row share a channel.
                    largest = arith.maximumf(largest, mgpu.utils.shfl_bfly(largest, distance))
                token = arith.addi(arith.muli(column, i32(2)), i32(8 * tile + i))
                token = arith.index_cast(index, token)
                there = arith.cmpi(arith.CmpIPredicate.ult, token, rows)
                with mgpu.utils.when(arith.andi(writes, there)):
                    memref.store(largest, out, [token, place])

    emit(magnitudes, out, first)
