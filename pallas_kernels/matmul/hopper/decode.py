"""Integer matmul for few rows: K split over a cluster of CTAs, the partial sums exchanged through shared memory.

The product (:mod:`pallas_kernels.matmul.hopper.problem`) is bound by how fast the weights come from
memory.  So every multiprocessor gets a part of them: a cluster of ``splits`` CTAs owns 64 * ``warpgroups`` channels, each
CTA a slice of K, streamed through a deep ring together with the activations that belong to it.  At the end the CTAs of a
cluster exchange their partial sums (:class:`pallas_kernels.matmul.hopper.exchange.Exchange`), each finishes some of the
rows, and no second kernel is needed.

With one CTA a cluster there is nothing to exchange, and CTAs may walk over several blocks of channels.  So it is with
experts, where a block is one of channels for a tile of rows, and with a gate
(:mod:`pallas_kernels.matmul.hopper.gate`), where it is as many channels of either half.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul.hopper import grouped, ragged, tiles
from pallas_kernels.matmul.hopper.decoder import STEP_CODES, staged_operand
from pallas_kernels.matmul.hopper.epilogue import epilogue, row_factors, scaled
from pallas_kernels.matmul.hopper.exchange import Exchange
from pallas_kernels.matmul.hopper.problem import DECODE_ROWS, SHARED_MEMORY_BYTES, Problem
from pallas_kernels.matmul.hopper.ragged import Rows
from pallas_kernels.mosaic import registers
from pallas_kernels.mosaic.compat import Kernel, Ref, Scalar, Scratch, kernel, load, plgpu
from pallas_kernels.mosaic.registers import COLUMN


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a matmul is cut up.

    Attributes:
      splits: CTAs of a cluster, over which K is split; at most 8.
      warpgroups: consumers of each CTA side by side, 64 channels a warpgroup.
      groups: how many such sets of consumers take the steps of a CTA in turns; warpgroups * groups is at most 7.
      stages: slots of the ring, at most as many as shared memory holds.
      ctas: with one split, how many CTAs walk over the blocks of channels at most.
      fold: whether scales of groups that can be folded into the codes are; otherwise every group is flushed.
    """

    splits: int = 4
    warpgroups: int = 2
    groups: int = 1
    stages: int = 12
    ctas: int = 132
    fold: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.splits <= 8 or not 1 <= self.warpgroups * self.groups <= 7:
            raise ValueError(f"DecodeConfig: splits must be from 1 to 8, warpgroups * groups from 1 to 7, got {self}")


def token_tile(m: int) -> int:
    """Columns of the product: the smallest of 8, 16, 32, 64 that holds m tokens."""
    return next(size for size in (8, 16, 32, DECODE_ROWS) if m <= size)


def slots(p: Problem, config: DecodeConfig) -> int:
    """Slots of the ring: those asked for, or as many as shared memory holds or there is use for.

    Raises:
      NotImplementedError: if a kernel cannot be built with this configuration.
    """
    splits, groups, decoder = config.splits, config.groups, p.decoder
    if p.rows_at_once > DECODE_ROWS:
        raise NotImplementedError(f"{config} is for {DECODE_ROWS} rows at most, got {p.rows_at_once}")
    channels, tokens = 64 * config.warpgroups, token_tile(p.rows_at_once)
    exchange = Exchange(splits, groups, config.warpgroups, tokens, decoder.total_dtype)
    activations = decoder.halves * tokens * decoder.x_dtype.itemsize
    slot_bytes = (channels + activations) * STEP_CODES + decoder.slot_bytes(channels)
    if p.gate is not None and splits * groups > 1:
        raise NotImplementedError(f"{config}: with a gate K is not split")
    at_end = epilogue(p, config.warpgroups, tokens, exchange).nbytes()
    room = (SHARED_MEMORY_BYTES - 2048 - at_end) // slot_bytes
    blocks = pl.cdiv(p.n, channels) * (ragged.most_tiles(p, tokens) if p.experts else 1)
    columns = blocks if splits > 1 else min(config.ctas, blocks)
    visits = pl.cdiv(p.steps, splits) * pl.cdiv(blocks, columns)  # of a CTA to its ring
    stages = min(config.stages, room, visits)
    if p.experts and splits > 1:
        raise NotImplementedError(f"{config}: with experts there are blocks enough without splitting K")
    if stages < visits:  # A slot always serves the same group: who waits for a barrier has to see all its phases.
        stages = stages // groups * groups
    if decoder.operands and config.warpgroups * groups > decoder.most_consumers(tokens):
        raise NotImplementedError(f"{config} leaves no registers for the scales of groups")
    if groups > 1 and splits == 1:
        raise NotImplementedError(f"{config}: groups exchange their sums within a cluster, so splits must be 2 or more")
    if stages < min(visits, groups + 1) or splits * groups > p.steps:  # A step late, slots are given back.
        raise NotImplementedError(f"{config} does not fit {p}")
    return stages


def build(p: Problem, config: DecodeConfig, *, interpret: object = None) -> Kernel:
    """The kernel, a function of (w, x, w_scale, x_scale, scales of the groups, bias, and tiles of experts, if any).

    With a gate its multiplier follows, and, if it has extra channels, their sources and parts, (extra / 128, 128); the
    results, a tuple, are those of :meth:`pallas_kernels.matmul.hopper.gate.Gating.out`.

    Operands are as in :func:`pallas_kernels.matmul.hopper.gemm.build`.

    ``x`` has m rows, less than 8 or a multiple of 8, at most 64 but with experts; a per-token ``x_scale`` is as long as the
    token tile, with experts longer than x by as much.

    In interpret mode, which has no exchange, the partial sums are returned instead, of shape
    (splits * groups, channels of all blocks, token tile).
    """
    if not config.fold:
        p = dataclasses.replace(p, decoder=p.decoder.without_folding())
    decoder = p.decoder
    splits, warpgroups, groups, stages = config.splits, config.warpgroups, config.groups, slots(p, config)
    channels, tokens = 64 * warpgroups, token_tile(p.rows_at_once)
    each = pl.cdiv(p.n, channels)  # blocks of a tile
    most = each * (ragged.most_tiles(p, tokens) if p.experts else 1)
    columns = most if splits > 1 else min(config.ctas, most)
    exchange = Exchange(splits, groups, warpgroups, tokens, decoder.total_dtype)
    end = epilogue(p, warpgroups, tokens, exchange if splits > 1 else None)
    spans = end.spans

    def matmul_of_few_rows(w_g: Ref, x_g: Ref, ws_g: Ref, xs_g: Ref, *rest: Ref, **scratch: Ref) -> None:
        aux_g, rest = rest[: decoder.operands], rest[decoder.operands :]
        (bias_g, visits_g), others = tiles.optional(rest, p.bias, p.experts > 0)
        end_g, outputs = others[: end.operands], others[end.operands :]
        w_s, x_s, full, empty = (scratch[name] for name in ("w", "x", "full", "empty"))
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rank = lax.axis_index("split") if splits > 1 else jnp.int32(0)
        begin, beyond = (lax.div(r * p.steps, jnp.int32(splits)) for r in (rank, rank + 1))
        steps = beyond - begin
        blocks = each if visits_g is None else each * visits_g[0]
        mine = lax.div(blocks - cta + columns - 1, jnp.int32(columns))

        def where(block: Scalar) -> tuple[Rows, Scalar]:
            """The rows of a block, and its first channel."""
            if not p.experts:
                # A traced zero: the tile may have more rows than x, and the copy engine fills them with zeros.
                return Rows(0, cta * 0, p.m), block * spans[0][-1]
            tile = lax.div(block, jnp.int32(each))
            return ragged.rows(p, visits_g, tile, tokens), (block - tile * each) * channels

        exchanges = splits > 1 and not interpret
        if exchanges:
            exchange.begin(scratch["arrived"])

        @pl.when(warpgroup == warpgroups * groups)
        def produce() -> None:
            def copy(i: Scalar, of: Rows, first: Scalar, k: Scalar) -> None:
                s = tiles.slot(i, stages)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[s]))
                for span, (at, apart, count) in enumerate(spans):
                    source = w_g.at[pl.ds(of.expert * p.n + first + apart, count), pl.ds(k * STEP_CODES, STEP_CODES)]
                    plgpu.copy_gmem_to_smem(source, w_s.at[s, pl.ds(at, count)], full.at[s])
                    place = s * len(spans) + span
                    decoder.copy(aux_g, first + apart, of.expert * p.steps + k, scratch, place, full.at[s])
                for half in range(decoder.halves):
                    columns = pl.ds((k * decoder.halves + half) * STEP_CODES, STEP_CODES)
                    part = x_g.at[pl.ds(of.begin, tokens), columns]
                    plgpu.copy_gmem_to_smem(part, x_s.at[s, half], full.at[s])

            def step(i: Scalar, _: None) -> None:
                copy(i, *where(cta + lax.div(i, steps) * columns), begin + lax.rem(i, steps))

            def tile(t: Scalar, _: None) -> None:
                place = where(cta + t * columns)
                lax.fori_loop(0, steps, lambda k, _: copy(t * steps + k, *place, k), None)

            if not interpret:
                end.start(end_g, scratch)
            count = mine * steps
            if p.experts:
                lax.fori_loop(0, mine, tile, None)
            else:
                lax.fori_loop(0, count, step, None)
            if exchanges:
                exchange.ready()
            tiles.drain(empty, count, stages)

        @pl.when(warpgroup < warpgroups * groups)
        def consume() -> None:
            group, row = lax.div(warpgroup, jnp.int32(warpgroups)), lax.rem(warpgroup, jnp.int32(warpgroups))
            rows = pl.ds(row * 64, 64)
            span, place = (f(row, jnp.int32(spans[0][-1] // 64)) for f in (lax.div, lax.rem))
            turns = lax.div(steps - group + groups - 1, jnp.int32(groups))  # steps of this group

            def operand(packed: jax.Array, aux: Sequence[jax.Array], half: int) -> jax.Array | Ref:
                if interpret:
                    return staged_operand(decoder, packed, half, aux, scratch["staged"].at[warpgroup])
                return decoder.operand(packed, half, aux)

            def accumulate(t: Scalar, acc: Ref) -> jax.Array:
                def step(turn: Scalar, _: None) -> None:
                    i = t * steps + turn * groups + group
                    s = tiles.slot(i, stages)
                    plgpu.barrier_wait(full.at[s])
                    plgpu.wgmma_wait(0)  # The last step's wgmmas read its slot and the operand registers until now.
                    pl.when(turn > 0)(lambda: plgpu.barrier_arrive(empty.at[tiles.slot(i - groups, stages)]))
                    packed = load(w_s.at[s, rows], registers.OPERAND) if decoder.in_registers else None
                    aux = decoder.aux(scratch, s * len(spans) + span, pl.ds(place * 64, 64))
                    for half in range(decoder.halves):
                        w = w_s.at[s, rows] if packed is None else operand(packed, aux, half)
                        plgpu.wgmma(acc, w, x_s.at[s, half].T)

                lax.fori_loop(0, turns, step, None)
                plgpu.wgmma_wait(0)
                last = t * steps + (turns - 1) * groups + group
                plgpu.barrier_arrive(empty.at[tiles.slot(last, stages)])
                return acc[...]

            def accumulate_groups(t: Scalar) -> jax.Array:
                def step(turn: Scalar, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    i = t * steps + turn * groups + group
                    s = tiles.slot(i, stages)
                    plgpu.barrier_wait(full.at[s])
                    packed = load(w_s.at[s, rows], registers.OPERAND)

                    def done(half: int) -> None:
                        if half == 0:  # A step late: no wgmma uses the scales, which may so be read late.
                            pl.when(turn > 0)(lambda: plgpu.barrier_arrive(empty.at[tiles.slot(i - groups, stages)]))

                    aux = decoder.aux(scratch, s * len(spans) + span, pl.ds(place * 64, 64))
                    return grouped.flush(
                        totals,
                        aux,
                        functools.partial(operand, packed, aux),
                        lambda half, part: x_s.at[s, half, pl.ds(part * chunk, chunk)],
                        lambda half: None,
                        done,
                        decoder.product_dtype,
                    )

                chunk = min(tokens, decoder.most_at_once)
                zeros = (grouped.zero(chunk, decoder.total_dtype),) * (tokens // chunk)
                totals = lax.fori_loop(0, turns, step, zeros)
                plgpu.commit_smem()  # All warps have read the last scales.
                plgpu.barrier_arrive(empty.at[tiles.slot(t * steps + (turns - 1) * groups + group, stages)])
                return registers.concatenate(totals, bool(interpret))

            def block(t: Scalar, _: None) -> None:
                number = cta + t * columns
                of, first = where(number)
                first = first + place * 64 + spans[-1][1] * span
                factors = row_factors(p, ws_g, bias_g, first, of.expert)
                token_scale = None
                if not p.raw:
                    scales_g = xs_g.at[pl.ds(of.begin, tokens)] if p.experts else xs_g
                    token_scale = load(scales_g, COLUMN, optimized=False) if p.per_token else xs_g[0]
                if decoder.flushed:
                    acc = accumulate_groups(t)
                else:
                    acc = pl.run_scoped(lambda acc: accumulate(t, acc), plgpu.ACC((64, tokens), jnp.int32))
                if interpret:
                    outputs[0][rank * groups + group, pl.ds(number * channels + row * 64, 64)] = acc
                    return
                if exchanges:
                    acc = exchange(plgpu.layout_cast(acc, registers.ACC), scratch["arrivals"], scratch["arrived"])
                end.leave(scaled(p, acc, factors, token_scale), t, of, first, outputs, scratch)

            if exchanges:
                exchange.ready()
            lax.fori_loop(0, mine, block, None)

        if end.warpgroups and not interpret:
            first_of = lambda t: where(cta + t * columns)[1]  # noqa: E731
            pl.when(warpgroup == warpgroups + 1)(lambda: end.finish(mine, first_of, end_g, outputs, scratch))

    sums = jax.ShapeDtypeStruct((splits * groups, most * channels, tokens), decoder.total_dtype)
    scratch: dict[str, Scratch] = {
        **decoder.scratch(stages * len(spans), spans[0][-1]),
        "w": plgpu.SMEM((stages, channels, STEP_CODES), jnp.int8, transforms=tiles.operand()),
        "x": tiles.activations(decoder.x_dtype, stages, decoder.halves, tokens, STEP_CODES),
        "full": plgpu.Barrier(num_arrivals=len(spans) * (1 + decoder.operands) + decoder.halves, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if interpret and decoder.in_registers:
        scratch["staged"] = tiles.activations(decoder.x_dtype, warpgroups * groups, decoder.halves, 64, STEP_CODES)
    if not interpret:
        scratch |= end.scratch()
    if splits > 1:
        scratch |= exchange.scratch()
    return kernel(
        matmul_of_few_rows,
        out_type=sums if interpret else end.out(),
        scratch_types=scratch,
        grid=(columns,),
        grid_names=("cta",),
        num_threads=warpgroups * groups + 1 + (0 if interpret else end.warpgroups),
        cluster=("split", splits) if splits > 1 else None,
        interpret=interpret,
    )
