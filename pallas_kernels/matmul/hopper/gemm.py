"""Integer matmul for many rows: persistent, warp-specialised, scales applied in the epilogue.

The product (:mod:`pallas_kernels.matmul.hopper.problem`) is computed transposed: 64 weight rows are the rows of a
``wgmma``, tokens its columns.  int8 weights come from shared memory, packed 4-bit weights through registers, unpacked on
the way; either way the activations of one tile are shared by all consumer warpgroups, so that shared memory carries little
more than it must.  Scales of groups of input channels: :mod:`pallas_kernels.matmul.hopper.grouped`.

One CTA a multiprocessor walks over output tiles of (64 * warpgroups) channels x ``tokens`` rows of x.

  producer (last warpgroup)  copies tiles of x and w into rings of shared-memory slots, ahead of the consumers, also
                             across tiles: while they are in the epilogue it fills the next tile.
  consumers                  64 channels each.  One wgmma stays in flight; a slot is given back when the wgmma that read it
                             is known to be complete, one step late.  A slot of packed weights is given back after the
                             wgmma was issued without which not all of its registers have been used: given back right after
                             the load, the compiler may sink the load below the release, and the copy engine overwrites
                             what is yet to be read.  Where groups are flushed, whose scales no wgmma uses, that is a whole
                             step later.
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
from pallas_kernels.matmul.hopper.epilogue import row_factors, scaled
from pallas_kernels.matmul.hopper.problem import SHARED_MEMORY_BYTES, Problem
from pallas_kernels.matmul.hopper.ragged import Rows
from pallas_kernels.mosaic import registers
from pallas_kernels.mosaic.compat import Kernel, Ref, Scalar, Scratch, kernel, load, plgpu, store_transposed
from pallas_kernels.mosaic.registers import COLUMN

REGISTERS = 2**16
"""Of a multiprocessor."""
MOST_REGISTERS = 232
"""That a consumer's thread can be given."""
PRODUCER_REGISTERS = 40
"""Of each of its threads.  What the producer gives back is dealt out to the consumers; more than that would hang."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """How a matmul is cut up.

    Attributes:
      tokens: rows of x in a tile, a multiple of 8, at most 256.
      warpgroups: consumers; a tile has 64 channels for each.
      width: tiles in a stripe of the order in which tiles are computed.
      cluster: CTAs that compute tiles of the same rows of x side by side, and share what they load of x (multicast).
    """

    tokens: int = 256
    warpgroups: int = 2
    width: int = 8
    cluster: int = 1

    def __post_init__(self) -> None:
        if self.tokens % 8 or not 8 <= self.tokens <= 256:
            raise ValueError(f"GemmConfig: tokens must be a multiple of 8 from 8 to 256, got {self.tokens}")
        if not 1 <= self.warpgroups <= 4:
            raise ValueError(f"GemmConfig: warpgroups must be from 1 to 4, got {self.warpgroups}")
        if self.cluster not in (1, 2):
            raise ValueError(f"GemmConfig: cluster must be 1 or 2, got {self.cluster}")


def build(p: Problem, config: GemmConfig, *, multiprocessors: int = 132, interpret: object = None) -> Kernel:
    """The kernel, a function of (w, x, w_scale, x_scale, scales of the groups, bias, and tiles of experts, if any).

    ``w`` is (n, k) int8, or (n, k / 2) packed; n is a multiple of 64, k of 128 (int8) or 256 (packed); ``x`` has m rows, m a
    multiple of 8; a per-token ``x_scale`` is as long as all tiles together; scales of groups are (k / 128, n).  No
    accumulator may overflow int32; that of packed weights holds 16 times the sum, unless scales are folded into them.  With
    experts the arrays of their weights and scales stand one below the other, and a per-token ``x_scale`` is ``tokens`` longer
    than x.
    """
    if p.gate is not None:
        raise NotImplementedError(f"{config} is of the kernel for many rows, which has no gates")
    channels, tokens = 64 * config.warpgroups, config.tokens
    n_tiles = pl.cdiv(p.n, channels * config.cluster)
    most = (ragged.most_tiles(p, tokens) if p.experts else pl.cdiv(p.m, tokens)) * n_tiles
    ctas = min(multiprocessors // config.cluster, most)
    decoder = p.decoder
    packed = decoder.in_registers
    out_item = jnp.dtype(p.out_dtype).itemsize
    by_copy_engine = out_item == 2 or bool(interpret)  # 32-bit results are rare: straight from the registers.
    telescoped = decoder.telescopes  # Groups need the scale of the next one too, and a chunk beside that in flight.
    # Tokens that are written, or multiplied, at a time.
    part = next((size for size in (64, 32, 16, 8) if tokens % size == 0 and tokens >= (1 + telescoped) * size), 0)
    if not part:
        raise NotImplementedError(f"{config} leaves no two chunks of tokens")
    out_slots = 2 if by_copy_engine else 1
    out_bytes = config.warpgroups * out_slots * part * 64 * out_item if by_copy_engine else 0
    weight_bytes = channels * STEP_CODES + decoder.slot_bytes(channels, telescoped)
    x_bytes = tokens * STEP_CODES * decoder.x_dtype.itemsize
    budget = SHARED_MEMORY_BYTES - 2048 - out_bytes
    if packed:
        w_slots = min(6, budget // (weight_bytes + 2 * x_bytes))
        x_slots = min(12, (budget - w_slots * weight_bytes) // x_bytes)
    else:
        w_slots = x_slots = min(12, budget // (weight_bytes + x_bytes))
    if min(w_slots, x_slots) < 2:
        raise NotImplementedError(f"{config} leaves no room for a pipeline")
    if decoder.flushed and (tokens > decoder.most_tokens or config.warpgroups > 2):
        raise NotImplementedError(f"{config} leaves no registers for the totals of groups")
    at_launch = min(MOST_REGISTERS, REGISTERS // (registers.WARPGROUP_LANES * (config.warpgroups + 1)) // 8 * 8)
    left = at_launch * (config.warpgroups + 1) - PRODUCER_REGISTERS
    consumer_registers = min(MOST_REGISTERS, left // config.warpgroups // 8 * 8)

    def matmul_of_many_rows(w_g: Ref, x_g: Ref, ws_g: Ref, xs_g: Ref, *rest: Ref, **scratch: Ref) -> None:
        aux_g, rest = rest[: decoder.operands], rest[decoder.operands :]
        (bias_g, visits_g), (o_g,) = tiles.optional(rest, p.bias, p.experts > 0)
        w_s, x_s, x_full, x_empty = (scratch[name] for name in ("w", "x", "x_full", "x_empty"))
        w_full, w_empty = (scratch["w_full"], scratch["w_empty"]) if packed else (x_full, x_empty)
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        peer = lax.axis_index("peer") if config.cluster > 1 else 0
        multicast = "peer" if config.cluster > 1 else None
        m_tiles = ragged.count(p, visits_g, tokens)
        total = m_tiles * n_tiles  # of each CTA of a cluster, taken together
        mine = lax.div(total - cta + ctas - 1, jnp.int32(ctas))

        def where(t: Scalar) -> tuple[Rows, Scalar]:
            m, n = tiles.order(cta + t * ctas, m_tiles, n_tiles, config.width)
            return ragged.rows(p, visits_g, m, tokens), n * config.cluster + peer

        @pl.when(warpgroup == config.warpgroups)
        def produce() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def tile(t: Scalar, _: None) -> None:
                of, n = where(t)

                def copy_weights(step: Scalar, s: Scalar) -> None:
                    columns = pl.ds(step * STEP_CODES, STEP_CODES)
                    source = w_g.at[pl.ds(of.expert * p.n + n * channels, channels), columns]
                    plgpu.copy_gmem_to_smem(source, w_s.at[s], w_full.at[s])
                    decoder.copy(aux_g, n * channels, of.expert * p.steps + step, scratch, s, w_full.at[s])

                def step(k: Scalar, _: None) -> None:
                    i = t * p.steps + k
                    if packed:
                        s = tiles.slot(i, w_slots)
                        pl.when(i >= w_slots)(lambda: plgpu.barrier_wait(w_empty.at[s]))
                        copy_weights(k, s)
                    for half in range(decoder.halves):
                        j = decoder.halves * i + half
                        xs = tiles.slot(j, x_slots)
                        pl.when(j >= x_slots)(lambda xs=xs: plgpu.barrier_wait(x_empty.at[xs]))
                        if not packed:
                            copy_weights(k, xs)
                        columns = pl.ds((k * decoder.halves + half) * STEP_CODES, STEP_CODES)
                        source = x_g.at[pl.ds(of.begin, tokens), columns]
                        plgpu.copy_gmem_to_smem(source, x_s.at[xs], x_full.at[xs], collective_axes=multicast)

                lax.fori_loop(0, p.steps, step, None)

            lax.fori_loop(0, mine, tile, None)
            rings = [(x_empty, mine * p.steps * decoder.halves, x_slots)] + [
                (w_empty, mine * p.steps, w_slots)
            ] * packed
            for ring in rings:
                tiles.drain(*ring)

        @pl.when(warpgroup < config.warpgroups)
        def consume() -> None:
            plgpu.set_max_registers(consumer_registers, action="increase")
            rows = pl.ds(warpgroup * 64, 64)
            whole_scale = None if p.raw or p.per_token else xs_g[0]

            def operand(packed: jax.Array, aux: Sequence[jax.Array], half: int) -> jax.Array | Ref:
                if interpret:
                    return staged_operand(decoder, packed, half, aux, scratch["staged"].at[warpgroup])
                return decoder.operand(packed, half, aux)

            def accumulate(t: Scalar, acc: Ref) -> jax.Array:
                def step(k: Scalar, _: None) -> None:
                    i = t * p.steps + k
                    ws = tiles.slot(i, w_slots)
                    codes, aux = None, []
                    if packed:
                        plgpu.barrier_wait(w_full.at[ws])
                        codes = load(w_s.at[ws, rows], registers.OPERAND)
                        aux = decoder.aux(scratch, ws, rows)
                    for half in range(decoder.halves):
                        j = decoder.halves * i + half
                        xs, before = tiles.slot(j, x_slots), tiles.slot(j + x_slots - 1, x_slots)
                        w = w_s.at[xs, rows] if codes is None else operand(codes, aux, half)
                        plgpu.barrier_wait(x_full.at[xs])
                        plgpu.wgmma(acc, w, x_s.at[xs].T)
                        plgpu.wgmma_wait(1)  # The one before this is complete.
                        if packed and half == decoder.release_half:
                            plgpu.barrier_arrive(w_empty.at[ws])
                        if half:
                            plgpu.barrier_arrive(x_empty.at[before])
                        else:
                            pl.when(k > 0)(lambda before=before: plgpu.barrier_arrive(x_empty.at[before]))

                lax.fori_loop(0, p.steps, step, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(x_empty.at[tiles.slot((t + 1) * p.steps * decoder.halves - 1, x_slots)])
                return acc[...]

            def accumulate_groups(t: Scalar, *products: Ref) -> tuple[jax.Array, ...]:
                def step(k: Scalar, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    i = t * p.steps + k
                    ws = tiles.slot(i, w_slots)
                    xs = [tiles.slot(decoder.halves * i + half, x_slots) for half in range(decoder.halves)]
                    plgpu.barrier_wait(w_full.at[ws])
                    codes = load(w_s.at[ws, rows], registers.OPERAND)
                    scales = decoder.aux(scratch, ws, rows)

                    def done(half: int) -> None:
                        plgpu.barrier_arrive(x_empty.at[xs[half]])
                        if half == 0:
                            pl.when(k > 0)(lambda: plgpu.barrier_arrive(w_empty.at[tiles.slot(i - 1, w_slots)]))

                    return grouped.flush(
                        totals,
                        grouped.differences(scales, k == p.steps - 1) if telescoped else scales,
                        functools.partial(operand, codes, scales),
                        lambda half, chunk: x_s.at[xs[half], pl.ds(chunk * part, part)],
                        lambda half: plgpu.barrier_wait(x_full.at[xs[half]]),
                        done,
                        decoder.product_dtype,
                        products,
                    )

                zero = grouped.zero(part, decoder.total_dtype)
                totals = lax.fori_loop(0, p.steps, step, (zero,) * (tokens // part))
                plgpu.commit_smem()  # All warps have read the last scales.
                plgpu.barrier_arrive(w_empty.at[tiles.slot((t + 1) * p.steps - 1, w_slots)])
                return totals

            def tile(t: Scalar, _: None) -> None:
                of, n = where(t)
                first = n * channels + warpgroup * 64
                factors = row_factors(p, ws_g, bias_g, first, of.expert)
                if telescoped:
                    products = [plgpu.ACC((64, part), jnp.int32)] * (tokens // part)
                    totals = pl.run_scoped(functools.partial(accumulate_groups, t), *products)
                elif decoder.flushed:
                    totals = accumulate_groups(t)
                else:
                    acc = pl.run_scoped(lambda acc: accumulate(t, acc), plgpu.ACC((64, tokens), jnp.int32))
                    totals = [acc[:, i * part : (i + 1) * part] for i in range(tokens // part)]
                for i, total in enumerate(totals):
                    at = of.begin + i * part
                    scale = whole_scale
                    if p.per_token and not p.raw:
                        scale = load(xs_g.at[pl.ds(at, part)], COLUMN, optimized=False)
                    y = scaled(p, total, factors, scale)
                    if by_copy_engine:
                        out = scratch["out"].at[warpgroup, i % out_slots]
                        plgpu.wait_smem_to_gmem(out_slots - 1, wait_read_only=True)
                        store_transposed(out, y)
                        plgpu.commit_smem()
                        ragged.write(p, out, o_g, at, pl.ds(first, 64), of.end)
                    else:
                        registers.store(y, o_g, at, first, end=of.end if p.experts else None)

            lax.fori_loop(0, mine, tile, None)
            if by_copy_engine:
                plgpu.wait_smem_to_gmem(0)

    barrier = plgpu.Barrier
    if config.cluster > 1:
        barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("peer",))
    scratch: dict[str, Scratch] = {
        **decoder.scratch(w_slots, channels, telescoped),
        "w": plgpu.SMEM((w_slots, channels, STEP_CODES), jnp.int8, transforms=tiles.operand()),
        "x": tiles.activations(decoder.x_dtype, x_slots, tokens, STEP_CODES),
        "x_full": plgpu.Barrier(num_arrivals=1 if packed else 2, num_barriers=x_slots),
        "x_empty": barrier(num_arrivals=config.warpgroups, num_barriers=x_slots),
    }
    if packed:
        scratch["w_full"] = plgpu.Barrier(num_arrivals=1 + decoder.operands, num_barriers=w_slots)
        scratch["w_empty"] = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=w_slots)
    if by_copy_engine:
        shape = (config.warpgroups, out_slots, part, 64)
        scratch["out"] = plgpu.SMEM(shape, p.out_dtype, transforms=tiles.operand(8 * out_item))
    if interpret and packed:
        scratch["staged"] = tiles.activations(decoder.x_dtype, config.warpgroups, decoder.halves, 64, STEP_CODES)
    return kernel(
        matmul_of_many_rows,
        out_type=jax.ShapeDtypeStruct((p.m, p.n), p.out_dtype),
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        cluster=("peer", config.cluster) if config.cluster > 1 else None,
        interpret=interpret,
    )
