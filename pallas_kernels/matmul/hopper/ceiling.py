"""The rate of the int8 tensor cores alone: every operand is loaded once, then nothing but ``wgmma`` is issued.

What this reaches at the card's clock and power is the most that any int8 kernel can.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul.hopper import tiles
from pallas_kernels.mosaic.compat import Kernel, Ref, Scalar, kernel, plgpu

ROWS, COLUMNS, DEPTH = 128, 256, 128
"""Of a CTA's tile, and codes that one group of ``wgmma`` adds up."""
SLOTS = 4


def build(steps: int = 4096, multiprocessors: int = 132) -> Kernel:
    """f(a (512, 128) int8, b (1024, 128) int8); it does :func:`operations` of them, and returns some of the sums."""

    def body(a_g: Ref, b_g: Ref, o_g: Ref, *, a: Ref, b: Ref, full: Ref) -> None:
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")

        @pl.when(warpgroup == 2)
        def load() -> None:
            plgpu.set_max_registers(40, action="decrease")
            for s in range(SLOTS):
                plgpu.copy_gmem_to_smem(a_g.at[pl.ds(s * ROWS, ROWS)], a.at[s], full.at[s])
                plgpu.copy_gmem_to_smem(b_g.at[pl.ds(s * COLUMNS, COLUMNS)], b.at[s], full.at[s])

        @pl.when(warpgroup < 2)
        def multiply() -> None:
            plgpu.set_max_registers(232, action="increase")
            for s in range(SLOTS):
                plgpu.barrier_wait(full.at[s])

            def scoped(acc: Ref) -> jax.Array:
                def step(k: Scalar, _: None) -> None:
                    s = tiles.slot(k, SLOTS)
                    plgpu.wgmma(acc, a.at[s, pl.ds(warpgroup * 64, 64)], b.at[s].T)
                    plgpu.wgmma_wait(1)

                lax.fori_loop(0, steps, step, None)
                return acc[...]

            sums = pl.run_scoped(scoped, plgpu.ACC((64, COLUMNS), jnp.int32))
            o_g.at[cta, warpgroup][...] = plgpu.layout_cast(sums[:, :8], plgpu.Layout.WGMMA)

    return kernel(
        body,
        out_type=jax.ShapeDtypeStruct((multiprocessors, 2, 64, 8), jnp.int32),
        scratch_types={
            "a": plgpu.SMEM((SLOTS, ROWS, DEPTH), jnp.int8, transforms=tiles.operand()),
            "b": plgpu.SMEM((SLOTS, COLUMNS, DEPTH), jnp.int8, transforms=tiles.operand()),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        },
        grid=(multiprocessors,),
        grid_names=("cta",),
        num_threads=3,
    )


def operands() -> tuple[jax.Array, jax.Array]:
    """Random full-range codes for it."""
    a, b = jax.random.split(jax.random.key(0))
    return (
        jax.random.randint(a, (SLOTS * ROWS, DEPTH), -127, 128, jnp.int8),
        jax.random.randint(b, (SLOTS * COLUMNS, DEPTH), -127, 128, jnp.int8),
    )


def operations(steps: int = 4096, multiprocessors: int = 132) -> int:
    """Multiplications and additions that :func:`build` does."""
    return 2 * multiprocessors * steps * ROWS * COLUMNS * DEPTH
