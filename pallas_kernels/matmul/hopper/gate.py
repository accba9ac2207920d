"""The end of a matmul whose output channels are two halves: one gates the other, and what comes of it is quantized.

    h[m, j] = activation(y[m, j]) * y[m, n / 2 + j]        where y is the product, rounded to its dtype

Of a CTA's two consumers one multiplies channels of the first half, the other the same channels of the second.  Both leave
what they have in shared memory, register by register, and go on.  A warpgroup of its own, whose lanes find in the same
place what belongs together, does the rest, while the next block is multiplied.

With scales that are fixed, h becomes codes there and then.  Its large channels go on in extra ones
(:func:`pallas_kernels.quantize_activations`).  What those continue is copied to shared memory in front of the first weights,
since all that is read later waits behind weights; there the warpgroup looks up which of them belong to its channels.

With a scale for every row, which no CTA knows, h is written as it is, beside the largest magnitudes of every 16 channels,
which are what the kernel that quantizes it needs besides.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul import reference
from pallas_kernels.matmul.hopper.problem import MOST_TOKENS, ROW, Gate, Problem
from pallas_kernels.mosaic import registers
from pallas_kernels.mosaic.compat import arith, ir, load, memref, mgpu, plgpu, ptx, vector
from pallas_kernels.mosaic.registers import ACC, i32, scalars, shared_address
from pallas_kernels.quantize.triton import ACTIVATIONS, rounded

LANES = 128  # of a warpgroup
CHANNELS = 16
"""Channels of one warp, of which the largest magnitude is found."""
FLATTENED = 6  # bits that hold a channel's place among the 64 of a warpgroup
SPARE = 4  # words by which rows of kept codes are longer, so that eight of them begin in different banks


def cannot_use(p: Problem) -> str | None:
    """Why the kernels cannot take a problem with a gate; None if they can."""
    gate = p.gate
    if gate is None:
        return None
    if gate.activation not in ACTIVATIONS:
        return f"they know no {gate.activation}"
    if p.m > MOST_TOKENS:
        return f"{p.m} rows are more than {MOST_TOKENS}"
    if p.weight_only or p.experts or p.raw:
        return "with a gate there must be codes, one weight, and scales"
    if p.n % 256 or gate.extra % LANES:
        return f"N = {p.n} is not a multiple of 256, or {gate.extra} extra channels are not one of {LANES}"
    return None


class Gating:
    """A gate in a kernel whose CTAs have ``warpgroups`` consumers, with ``tokens`` columns each.

    Raises:
      NotImplementedError: if such CTAs cannot have one.
    """

    def __init__(self, p: Problem, warpgroups: int, tokens: int):
        if p.gate is None or warpgroups != 2:
            raise NotImplementedError(f"{warpgroups} warpgroups are not one for either half")
        self.p, self.tokens = p, tokens
        self.gate: Gate = p.gate
        self.words = tokens // 2 * jnp.dtype(p.out_dtype).itemsize // 4  # that a lane of a consumer leaves
        self.kept = 64 * (tokens // 2 + SPARE) if self.gate.extra else 0  # words of codes, two tokens each
        self.listed = 2 + 2 * self.gate.extra if self.gate.extra else 0  # words of a list

    @property
    def held(self) -> int:
        """Words for what the consumers leave, and for the codes that take its place."""
        return max(2 * self.words * LANES, self.kept)

    def nbytes(self) -> int:
        """Of shared memory."""
        return 4 * (self.held + self.listed + 2 * self.gate.extra)

    def scratch(self) -> dict[str, Any]:
        """Shared memory: what consumers leave, what extra channels continue, which of them belong here, and barriers."""
        found: dict[str, Any] = {"halves": plgpu.SMEM((self.held,), jnp.int32)}
        if self.gate.extra:
            found["found"] = plgpu.SMEM((self.listed,), jnp.int32)
            found |= dict.fromkeys(("source", "part"), plgpu.SMEM((self.gate.extra // LANES, LANES), jnp.int32))
            found["known"] = plgpu.Barrier(num_arrivals=2)
        return found | {"left": plgpu.Barrier(num_arrivals=2), "taken": plgpu.Barrier(num_arrivals=1)}

    def out(self) -> Any:
        """What the kernel gives: codes, or what is to be quantized and its largest magnitudes."""
        half, gate = self.p.n // 2, self.gate
        if gate.per_token:
            values = jax.ShapeDtypeStruct((self.p.m, half), jnp.float32)
            return values, jax.ShapeDtypeStruct((self.p.m, half // CHANNELS), jnp.float32)
        return (jax.ShapeDtypeStruct((self.p.m, half + gate.extra), jnp.int8),)

    def start(self, source: Any, part: Any, scratch: dict[str, Any]) -> None:
        """Begins to copy what extra channels continue; the producer calls it before its other work.

        Args:
          source, part: references to both, (extra / 128, 128), if there are any.
          scratch: as :meth:`scratch` has described it.
        """
        if self.gate.extra:
            plgpu.copy_gmem_to_smem(source, scratch["source"], scratch["known"])
            plgpu.copy_gmem_to_smem(part, scratch["part"], scratch["known"])

    def leave(self, y: Any, turn: Any, scratch: dict[str, Any]) -> None:
        """Leaves a consumer's (64, tokens) of the product, of its CTA's ``turn``-th block."""

        @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType()))
        def emit(ctx: Any, y: Any, halves: Any) -> None:
            del ctx
            warpgroup = arith.divui(mgpu.utils.thread_idx(), i32(LANES))
            address = _offset(shared_address(halves), warpgroup, 4 * LANES * self.words)
            for i, word in enumerate(_words(y)):
                ptx("st.shared.b32 [$0], $1;", _offset(address, _lane(), 4, 4 * LANES * i), word)

        pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch["taken"]))
        emit(y, scratch["halves"])
        plgpu.barrier_arrive(scratch["left"])

    def finish(self, mine: Any, first_of: Any, multiplier_g: Any, outputs: Any, scratch: dict[str, Any]) -> None:
        """What the warpgroup does that finishes blocks.

        Args:
          mine: blocks of the CTA.
          first_of: of a block's turn, gives its first channel in either half.
          multiplier_g: reference to the multiplier of every channel.
          outputs: references to what :meth:`out` describes.
          scratch: as :meth:`scratch` has described it.
        """

        def block(turn: Any, _: Any) -> None:
            first = first_of(turn)
            multiplier = load(multiplier_g.at[pl.ds(first, 64)], ROW, optimized=False)
            if self.gate.extra:
                pl.when(turn == 0)(lambda: plgpu.barrier_wait(scratch["known"]))
                self._find(scratch["source"], scratch["part"], scratch["found"], first)
            plgpu.barrier_wait(scratch["left"])
            gate, beside = (self._take(scratch["halves"], half).astype(jnp.float32) for half in range(2))
            h, scale = self._activated(gate), lax.broadcast_in_dim(multiplier, gate.shape, [0])
            write = functools.partial(registers.store, token=jnp.int32(0), channel=first)
            if self.gate.per_token:
                plgpu.barrier_arrive(scratch["taken"])
                write(h * beside, outputs[0])
                self._largest(jnp.abs(h * beside * scale), outputs[1], first)
                return
            qmax = float(self.gate.qmax)
            c = rounded(h * scale * beside, reference.LARGEST_CODE, interpret=False)
            if self.gate.extra:
                self._flatten(c.astype(jnp.int32), scratch, outputs[0])
            plgpu.barrier_arrive(scratch["taken"])
            write(jnp.minimum(jnp.maximum(c, -qmax), qmax).astype(jnp.int32).astype(jnp.int8), outputs[0])

        lax.fori_loop(0, mine, block, None)

    def _take(self, halves: Any, half: int) -> Any:
        """What the consumer of a half has left."""
        dtype = self.p.out_dtype

        @plgpu.inline_mgpu(
            arg_types=(ACC, plgpu.RefType()),
            return_type=plgpu.ShapeDtypeStruct((64, self.tokens), dtype, layout=ACC),
        )
        def emit(ctx: Any, like: Any, halves: Any) -> Any:
            del ctx
            address = _offset(shared_address(halves), _lane(), 4, 4 * LANES * self.words * half)
            words = [
                ptx("ld.shared.b32 $0, [$1];", arith.addi(address, i32(4 * LANES * i)), results=1)[0]
                for i in range(self.words)
            ]
            return _from_words(words, like)

        return emit(plgpu.layout_cast(jnp.zeros((64, self.tokens), dtype), plgpu.Layout.WGMMA), halves)

    def _activated(self, x: Any) -> Any:
        """The activation function, float32; silu's exponential and reciprocal are the GPU's, wrong in the last bit or two."""
        if self.gate.activation != "silu":
            return ACTIVATIONS[self.gate.activation](x)
        kind = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=ACC)

        @plgpu.inline_mgpu(arg_types=(ACC,), return_type=kind)
        def sigmoid(ctx: Any, x: Any) -> Any:
            del ctx
            word = i32(0).type

            def of_one(x: Any) -> Any:
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

    def _largest(self, magnitudes: Any, out: Any, first: Any) -> None:
        """Writes the largest magnitude that every warp has of each token."""

        @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
        def emit(ctx: Any, magnitudes: Any, out: Any, first: Any) -> None:
            del ctx
            index = ir.IndexType.get()
            lane = _lane()
            warp, column = arith.divui(lane, i32(32)), arith.remui(lane, i32(32))
            place = arith.addi(arith.divui(first.registers.item(), i32(CHANNELS)), warp)
            place = arith.index_cast(index, place)
            writes = arith.cmpi(arith.CmpIPredicate.ult, column, i32(4))
            rows = arith.constant(index, ir.MemRefType(out.type).shape[0])
            halves = magnitudes.registers.reshape(self.tokens // 8, 2)  # of 16 channels, in every 8 tokens
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

    def _find(self, source: Any, part: Any, found: Any, first: Any) -> None:
        """Lists the extra channels that continue one of the 64 from ``first`` on.

        Their count comes first.  Then there are two words for each: its number with the channel it continues, and what those
        before it hold.
        """

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, plgpu.Layout.WG_SPLAT(())))
        def emit(ctx: Any, source: Any, part: Any, found: Any, first: Any) -> None:
            del ctx
            lane, count = _lane(), shared_address(found)
            index = ir.IndexType.get()
            place = arith.index_cast(index, lane)
            rows = [arith.constant(index, row) for row in range(self.gate.extra // LANES)]
            channels, parts = ([memref.load(ref, [row, place]) for row in rows] for ref in (source, part))
            blocks = i32(self.p.n // 2 // 64)
            block = arith.divui(first.registers.item(), i32(64))
            mgpu.utils.warpgroup_barrier()  # Nobody reads the last block's list any more.
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane, i32(0))):
                ptx("st.shared.b32 [$0], $1;", count, i32(0))
            mgpu.utils.warpgroup_barrier()
            for row, (channel, before) in enumerate(zip(channels, parts, strict=True)):
                number = arith.addi(lane, i32(LANES * row))
                before = arith.minsi(before, i32(reference.LARGEST_CODE))
                at = arith.subi(channel, first.registers.item())
                own = arith.cmpi(arith.CmpIPredicate.ult, at, i32(64))
                # Padding, which nothing reaches, may all continue one channel.  It is dealt out to all.
                padding = arith.cmpi(arith.CmpIPredicate.eq, before, i32(reference.LARGEST_CODE))
                dealt = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(number, blocks), block)
                with mgpu.utils.when(arith.select(padding, dealt, own)):
                    (place,) = ptx("atom.shared.add.u32 $0, [$1], $2;", count, i32(1), results=1)
                    channel = arith.andi(at, i32((1 << FLATTENED) - 1))
                    entry = arith.ori(arith.shli(number, i32(FLATTENED)), channel)
                    full = arith.muli(before, i32(self.gate.qmax))
                    ptx("st.shared.v2.b32 [$0], {$1, $2};", _offset(count, place, 8, 8), entry, full)

        emit(source, part, found, first)

    def _flatten(self, c: Any, scratch: dict[str, Any], out: Any) -> None:
        """Writes the extra channels that are listed: what ``c``, at most 16 bits, holds beyond those before them."""

        @plgpu.inline_mgpu(arg_types=(ACC, *[plgpu.RefType()] * 3))
        def emit(ctx: Any, c: Any, held: Any, found: Any, out: Any) -> None:
            del ctx
            index, word, byte = ir.IndexType.get(), i32(0).type, ir.IntegerType.get_signless(8)
            rows, lane = arith.constant(index, ir.MemRefType(out.type).shape[0]), _lane()
            held, count = shared_address(held), shared_address(found)

            def where(channel: Any, token: Any) -> Any:
                return _offset(_offset(held, channel, 4 * (self.tokens // 2 + SPARE)), token, 2)

            mgpu.utils.warpgroup_barrier()  # All have taken what was left, in whose place codes are kept.
            for position, register in zip(c.layout.thread_idxs(c.shape), c.registers.flat, strict=True):
                one, other = scalars(register)
                both = arith.ori(arith.andi(one, i32(0xFFFF)), arith.shli(other, i32(16)))
                ptx("st.shared.b32 [$0], $1;", where(*(arith.index_cast(word, at) for at in position)), both)
            mgpu.utils.warpgroup_barrier()
            (listed,) = ptx("ld.shared.b32 $0, [$1];", count, results=1)
            turns = arith.muli(listed, i32(self.tokens))
            turns = arith.divui(arith.subi(arith.addi(turns, i32(LANES - 1)), lane), i32(LANES))

            @mgpu.utils.fori(turns, [])
            def _(turn: Any, carry: Any) -> Any:
                i = arith.addi(lane, arith.muli(turn, i32(LANES)))
                at, token = arith.divui(i, i32(self.tokens)), arith.remui(i, i32(self.tokens))
                entry, full = ptx("ld.shared.v2.b32 {$0, $1}, [$2];", _offset(count, at, 8, 8), results=2)
                channel = arith.andi(entry, i32((1 << FLATTENED) - 1))
                (code,) = ptx("ld.shared.s16 $0, [$1];", where(channel, token), results=1)
                qmax, zero = i32(self.gate.qmax), i32(0)
                beyond = arith.subi(arith.maxsi(code, arith.subi(zero, code)), full)
                beyond = arith.minsi(arith.maxsi(beyond, zero), qmax)
                negative = arith.cmpi(arith.CmpIPredicate.slt, code, zero)
                beyond = arith.select(negative, arith.subi(zero, beyond), beyond)
                token = arith.index_cast(index, token)
                with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, token, rows)):
                    to = arith.addi(arith.shrui(entry, i32(FLATTENED)), i32(self.p.n // 2))
                    memref.store(arith.trunci(byte, beyond), out, [token, arith.index_cast(index, to)])
                return carry

        emit(c, scratch["halves"], scratch["found"], out)


def spans(p: Problem, channels: int) -> list[tuple[int, int, int]]:
    """Runs of the rows of weights in a slot: where one begins, there and behind a block's first channel; and its length."""
    if p.gate is None:
        return [(0, 0, channels)]
    return [(0, 0, channels // 2), (channels // 2, p.n // 2, channels // 2)]


def _lane() -> Any:
    """Number of this lane in its warpgroup, i32."""
    return arith.remui(mgpu.utils.thread_idx(), i32(LANES))


def _offset(base: Any, count: Any, size: int, more: int = 0) -> Any:
    """An address ``count`` times ``size`` bytes further on, and ``more``."""
    return arith.addi(arith.addi(base, arith.muli(count, i32(size))), i32(more))


def _words(array: Any) -> list[Any]:
    """The elements a lane has, two 16-bit ones a word."""
    word = ir.IntegerType.get_signless(32)
    whole = [array.registers.flat, (s for r in array.registers.flat for s in scalars(r))][array.mlir_dtype.width == 32]
    return [mgpu.utils.bitcast(value, word) for value in whole]


def _from_words(words: list[Any], like: Any) -> Any:
    """What :func:`_words` takes apart, of an array that is distributed as another one is."""
    found = like.registers.copy()
    for i, register in enumerate(like.registers.flat):
        if like.mlir_dtype.width == 32:
            both = [mgpu.utils.bitcast(word, like.mlir_dtype) for word in words[2 * i : 2 * i + 2]]
            found.flat[i] = vector.from_elements(register.type, both)
        else:
            found.flat[i] = mgpu.utils.bitcast(words[i], register.type)
    return mgpu.FragmentedArray(_registers=found, _layout=like.layout, _is_signed=like.is_signed)
