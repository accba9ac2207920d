"""Integer matmul for few rows: K split over a cluster of CTAs, the partial sums exchanged through shared memory.

What is computed is in :mod:`pallas_kernels.matmul.hopper.problem`; what bounds it is how fast the weights come from
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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul.hopper import gate, grouped, tiles, unpack
from pallas_kernels.matmul.hopper import ragged as experts
from pallas_kernels.matmul.hopper.exchange import Exchange
from pallas_kernels.matmul.hopper.problem import COLUMN, MOST_TOKENS, SHARED_MEMORY, STEP, Problem, finish, row_factors
from pallas_kernels.mosaic import registers
from pallas_kernels.mosaic.compat import kernel, load, plgpu


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
    return next(size for size in (8, 16, 32, MOST_TOKENS) if m <= size)


def slots(p: Problem, config: DecodeConfig) -> int:
    """Slots of the ring: those asked for, or as many as shared memory holds or there is use for.

    Raises:
      NotImplementedError: if a kernel cannot be built with this configuration.
    """
    splits, groups = config.splits, config.groups
    if p.rows_at_once > MOST_TOKENS:
        raise NotImplementedError(f"{config} is for {MOST_TOKENS} rows at most, got {p.rows_at_once}")
    channels, tokens = 64 * config.warpgroups, token_tile(p.rows_at_once)
    exchange = Exchange(splits, groups, config.warpgroups, tokens, p.total_dtype)
    slot_bytes = (channels + p.halves * tokens * p.x_dtype.itemsize) * STEP + grouped.slot_bytes(p, channels)
    if p.gate is not None and splits * groups > 1:
        raise NotImplementedError(f"{config}: with a gate K is not split")
    at_end = exchange.nbytes() if p.gate is None else gate.Gating(p, config.warpgroups, tokens).nbytes()
    room = (SHARED_MEMORY - 2048 - at_end) // slot_bytes
    blocks = pl.cdiv(p.n, channels) * (experts.most_tiles(p, tokens) if p.experts else 1)
    columns = blocks if splits > 1 else min(config.ctas, blocks)
    visits = pl.cdiv(p.steps, splits) * pl.cdiv(blocks, columns)  # of a CTA to its ring
    stages = min(config.stages, room, visits)
    if p.experts and splits > 1:
        raise NotImplementedError(f"{config}: with experts there are blocks enough without splitting K")
    if stages < visits:  # A slot always serves the same group: who waits for a barrier has to see all its phases.
        stages = stages // groups * groups
    if p.grouped and config.warpgroups * groups > grouped.most_consumers(p, tokens):
        raise NotImplementedError(f"{config} leaves no registers for the scales of groups")
    if groups > 1 and splits == 1:
        raise NotImplementedError(f"{config}: groups exchange their sums within a cluster, so splits must be 2 or more")
    if stages < min(visits, groups + 1) or splits * groups > p.steps:  # A step late, slots are given back.
        raise NotImplementedError(f"{config} does not fit {p}")
    return stages


def build(p: Problem, config: DecodeConfig, *, interpret: Any = None) -> Any:
    """The kernel, a function of (w, x, w_scale, x_scale, scales of the groups, bias, and tiles of experts, if any).

    With a gate its multiplier follows, and, if it has extra channels, their sources and parts, (extra / 128, 128); the
    results, a tuple, are those of :meth:`pallas_kernels.matmul.hopper.gate.Gating.out`.

    Operands are as in :func:`pallas_kernels.matmul.hopper.gemm.build`.

    ``x`` has m rows, less than 8 or a multiple of 8, at most 64 but with experts; a per-token ``x_scale`` is as long as the
    token tile, with experts longer than x by as much.

    In interpret mode, which has no exchange, the partial sums are returned instead, of shape
    (splits * groups, channels of all blocks, token tile).
    """
    if p.folded and not config.fold:
        p = dataclasses.replace(p, folded=False)
    splits, warpgroups, groups, stages = config.splits, config.warpgroups, config.groups, slots(p, config)
    channels, tokens = 64 * warpgroups, token_tile(p.rows_at_once)
    each = pl.cdiv(p.n, channels)  # blocks of a tile
    most = each * (experts.most_tiles(p, tokens) if p.experts else 1)
    columns = most if splits > 1 else min(config.ctas, most)
    packed = p.bits == 4
    exchange = Exchange(splits, groups, warpgroups, tokens, p.total_dtype)
    gating = None if p.gate is None else gate.Gating(p, warpgroups, tokens)
    flattens = p.gate is not None and p.gate.extra > 0
    spans = gate.spans(p, channels)

    def matmul_of_few_rows(w_g: Any, x_g: Any, ws_g: Any, xs_g: Any, *rest: Any, **scratch: Any) -> None:
        missing: Any = None
        there = p.grouped, p.bias, p.experts > 0, gating is not None, flattens, flattens
        group_g, bias_g, visits_g, multiplier_g, source_g, part_g, *outputs = tiles.optional(rest, *there)
        w_s, x_s, groups_s, staged = (scratch.get(name, missing) for name in ("w", "x", "groups", "staged"))
        full, empty = scratch["full"], scratch["empty"]
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rank = lax.axis_index("split") if splits > 1 else jnp.int32(0)
        begin, end = (lax.div(r * p.steps, jnp.int32(splits)) for r in (rank, rank + 1))
        steps = end - begin
        blocks = each * visits_g[0] if p.experts else each
        mine = lax.div(blocks - cta + columns - 1, jnp.int32(columns))

        def where(block: Any) -> tuple[experts.Rows, Any]:
            """The rows of a block, and its first channel."""
            if not p.experts:
                # A traced zero: the tile may have more rows than x, and the copy engine fills them with zeros.
                return experts.Rows(0, cta * 0, p.m), block * spans[0][-1]
            tile = lax.div(block, jnp.int32(each))
            return experts.rows(p, visits_g, tile, tokens), (block - tile * each) * channels

        exchanges = splits > 1 and not interpret
        if exchanges:
            exchange.begin(scratch["arrived"])

        @pl.when(warpgroup == warpgroups * groups)
        def produce() -> None:
            def copy(i: Any, of: experts.Rows, first: Any, k: Any) -> None:
                s = tiles.slot(i, stages)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[s]))
                for span, (at, beyond, count) in enumerate(spans):
                    source = w_g.at[pl.ds(of.expert * p.n + first + beyond, count), pl.ds(k * STEP, STEP)]
                    plgpu.copy_gmem_to_smem(source, w_s.at[s, pl.ds(at, count)], full.at[s])
                    if p.grouped:
                        scales = groups_s.at[s * len(spans) + span]
                        grouped.copy(p, group_g, first + beyond, of.expert * p.steps + k, scales, full.at[s])
                for half in range(p.halves):
                    part = x_g.at[pl.ds(of.begin, tokens), pl.ds((k * p.halves + half) * STEP, STEP)]
                    plgpu.copy_gmem_to_smem(part, x_s.at[s, half], full.at[s])

            def step(i: Any, _: Any) -> None:
                copy(i, *where(cta + lax.div(i, steps) * columns), begin + lax.rem(i, steps))

            def tile(t: Any, _: Any) -> None:
                place = where(cta + t * columns)
                lax.fori_loop(0, steps, lambda k, _: copy(t * steps + k, *place, k), None)

            if gating is not None and not interpret:
                gating.start(source_g, part_g, scratch)
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

            unpacked = functools.partial(
                unpack.unpacked_operand,
                weight_only=p.weight_only,
                staged=staged.at[warpgroup] if interpret and packed else None,
                interpret=bool(interpret),
            )

            def accumulate(t: Any, acc: Any) -> Any:
                def step(turn: Any, _: Any) -> None:
                    i = t * steps + turn * groups + group
                    s = tiles.slot(i, stages)
                    plgpu.barrier_wait(full.at[s])
                    plgpu.wgmma_wait(0)  # The last step's wgmmas read its slot and the operand registers until now.
                    pl.when(turn > 0)(lambda: plgpu.barrier_arrive(empty.at[tiles.slot(i - groups, stages)]))
                    bytes_ = load(w_s.at[s, rows], registers.OPERAND) if packed else None
                    scales = grouped.rows(p, groups_s, s * len(spans) + span, pl.ds(place * 64, 64))
                    for half in range(p.halves):
                        w = unpacked(bytes_, half, scales[half]) if packed else w_s.at[s, rows]
                        plgpu.wgmma(acc, w, x_s.at[s, half].T)

                lax.fori_loop(0, turns, step, None)
                plgpu.wgmma_wait(0)
                last = t * steps + (turns - 1) * groups + group
                plgpu.barrier_arrive(empty.at[tiles.slot(last, stages)])
                return acc[...]

            def accumulate_groups(t: Any) -> Any:
                def step(turn: Any, totals: Any) -> Any:
                    i = t * steps + turn * groups + group
                    s = tiles.slot(i, stages)
                    plgpu.barrier_wait(full.at[s])
                    bytes_ = load(w_s.at[s, rows], registers.OPERAND)

                    def done(half: int) -> None:
                        if half == 0:  # A step late: no wgmma uses the scales, which may so be read late.
                            pl.when(turn > 0)(lambda: plgpu.barrier_arrive(empty.at[tiles.slot(i - groups, stages)]))

                    return grouped.flush(
                        totals,
                        grouped.rows(p, groups_s, s * len(spans) + span, pl.ds(place * 64, 64)),
                        functools.partial(unpacked, bytes_),
                        lambda half, part: x_s.at[s, half, pl.ds(part * chunk, chunk)],
                        lambda half: None,
                        done,
                        p.product_dtype,
                    )

                chunk = min(tokens, grouped.most_at_once(p))
                totals = lax.fori_loop(0, turns, step, (grouped.zero(p, chunk),) * (tokens // chunk))
                plgpu.commit_smem()  # All warps have read the last scales.
                plgpu.barrier_arrive(empty.at[tiles.slot(t * steps + (turns - 1) * groups + group, stages)])
                return registers.concatenate(totals, bool(interpret))

            def block(t: Any, _: Any) -> None:
                number = cta + t * columns
                of, first = where(number)
                first = first + place * 64 + spans[-1][1] * span
                factors = row_factors(p, ws_g, bias_g, first, of.expert)
                token_scale = None
                if not p.raw:
                    scales_g = xs_g.at[pl.ds(of.begin, tokens)] if p.experts else xs_g
                    token_scale = load(scales_g, COLUMN, optimized=False) if p.per_token else xs_g[0]
                if p.flushed:
                    acc = accumulate_groups(t)
                else:
                    acc = pl.run_scoped(lambda acc: accumulate(t, acc), plgpu.ACC((64, tokens), jnp.int32))
                if interpret:
                    outputs[0][rank * groups + group, pl.ds(number * channels + row * 64, 64)] = acc
                    return
                if exchanges:
                    acc = exchange(plgpu.layout_cast(acc, registers.ACC), scratch["arrivals"], scratch["arrived"])
                y = finish(p, acc, factors, token_scale)
                if gating is not None:
                    gating.leave(y, t, scratch)
                    return
                token, behind = (of.begin, of.end) if p.experts else (jnp.int32(0), None)
                registers.store(y, outputs[0], token, first, end=behind, exchange=exchange if exchanges else None)

            if exchanges:
                exchange.ready()
            lax.fori_loop(0, mine, block, None)

        if gating is not None and not interpret:
            finish_gated = functools.partial(gating.finish, mine, lambda t: where(cta + t * columns)[1])
            pl.when(warpgroup == warpgroups + 1)(lambda: finish_gated(multiplier_g, outputs, scratch))

    out: Any = jax.ShapeDtypeStruct((p.m, p.n), p.out_dtype) if gating is None else gating.out()
    if interpret:
        out = jax.ShapeDtypeStruct((splits * groups, most * channels, tokens), p.total_dtype)
    scratch: dict[str, Any] = grouped.scratch(p, stages * len(spans), spans[0][-1]) | {
        "w": plgpu.SMEM((stages, channels, STEP), jnp.int8, transforms=tiles.operand()),
        "x": plgpu.SMEM((stages, p.halves, tokens, STEP), p.x_dtype, transforms=tiles.operand(8 * p.x_dtype.itemsize)),
        "full": plgpu.Barrier(num_arrivals=len(spans) * (1 + p.grouped) + p.halves, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if interpret and packed:
        shape = (warpgroups * groups, p.halves, 64, STEP)
        scratch["staged"] = plgpu.SMEM(shape, p.x_dtype, transforms=tiles.operand(8 * p.x_dtype.itemsize))
    if gating is not None and not interpret:
        scratch |= gating.scratch()
    if splits > 1:
        scratch["arrivals"], scratch["arrived"] = exchange.scratch()
    settings: dict[str, Any] = {"interpret": interpret} if interpret else {}
    if splits > 1:
        settings |= {"cluster": (splits,), "cluster_names": ("split",)}
    return kernel(
        matmul_of_few_rows,
        out_type=out,
        scratch_types=scratch,
        grid=(columns,),
        grid_names=("cta",),
        num_threads=warpgroups * groups + 1 + (gating is not None and not interpret),
        thread_name="warpgroup",
        **settings,
    )
