"""Norm, static quantization and flattening of activations in one pass over them.

XLA reads the rows twice for a norm and the codes behind it, once for the statistics and once more.  Here a warpgroup
holds a whole row in its registers, so that it is read once, the next row on its way meanwhile.  What the extra channels
continue lies anywhere in the row, so they are gathered through shared memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import kernel, load, plgpu
from pallas_kernels.hopper import registers
from pallas_kernels.reference import LARGEST_CODE

THREADS = 128  # of a warpgroup
VECTOR = 8  # channels a thread reads at a time
MOST_CHANNELS = 8192
"""What the registers of a warpgroup hold, twice over and with the multipliers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What the kernel is specialised for.

    Attributes:
      rows, k, extra: rows and channels of x, extra channels.
      center: whether the mean is subtracted (layer norm) or not (root mean square).
      offset: whether there is one.
      epsilon: what the norm adds to the variance.
      qmax: largest code.
      dtype: of x.
    """

    rows: int
    k: int
    extra: int
    center: bool
    offset: bool
    epsilon: float
    qmax: int
    dtype: Any


def cannot_use(p: Problem) -> str | None:
    """Why the kernel cannot take a problem; None if it can."""
    if p.k % (VECTOR * THREADS) or p.k > MOST_CHANNELS:
        return f"K = {p.k} is not a multiple of {VECTOR * THREADS} up to {MOST_CHANNELS}"
    if p.extra % THREADS:
        return f"{p.extra} extra channels are not a multiple of {THREADS}"
    if jnp.dtype(p.dtype).name not in ("bfloat16", "float16", "float32"):
        return f"the dtype {jnp.dtype(p.dtype).name} is not bfloat16, float16 or float32"
    return None


def build(p: Problem, *, multiprocessors: int = 132, interpret: Any = None) -> Any:
    """The kernel, a function of (x, multiplier, offset if any, source and part if there are extra channels).

    Arguments and result are those of :func:`pallas_kernels.quantize_normalized`, x of shape (rows, k).
    """
    ctas = min(p.rows, multiprocessors * (4 if p.k <= 4096 else 2))
    row_layout = plgpu.Layout.WG_STRIDED((p.k,), vec_size=VECTOR)
    size = next(size for size in (4, 2, 1) if p.extra % (size * THREADS) == 0)
    extra_layout = plgpu.Layout.WG_STRIDED((p.extra or size * THREADS,), vec_size=size)

    def body(x_g: Any, multiplier_g: Any, *rest: Any, **scratch: Any) -> None:
        *given, o_g = rest
        offset_g = given.pop(0) if p.offset else None
        cta = lax.axis_index("cta")
        multiplier = load(multiplier_g, row_layout, optimized=False)
        recipe: Any = [load(ref, extra_layout, optimized=False) for ref in given]  # source and part

        def fetch(t: Any) -> Any:
            row = jnp.minimum(cta + t * ctas, p.rows - 1)
            return load(x_g.at[row], row_layout, optimized=False)

        def codes(x: Any) -> Any:
            x = x.astype(jnp.float32)
            variance = jnp.sum(x * x) * jnp.float32(1 / p.k)
            if p.center:
                mean = jnp.sum(x) * jnp.float32(1 / p.k)
                variance, x = jnp.maximum(variance - mean * mean, 0.0), x - mean
            y = x * (lax.rsqrt(variance + p.epsilon) * multiplier)
            if p.offset:
                y = y + load(offset_g, row_layout, optimized=False)
            return lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32)

        def flattened(c: Any) -> Any:
            source, part = recipe
            c = jnp.clip(c, -LARGEST_CODE, LARGEST_CODE)
            if interpret:
                c = jnp.take(c, source)
            else:
                scratch["codes"][...] = c.astype(jnp.int16)
                plgpu.commit_smem()
                c = registers.gather(scratch["codes"], source, extra_layout)
                plgpu.commit_smem()  # The next row's codes come only then.
            held = part * p.qmax
            return jnp.clip(c - held, 0, p.qmax) + jnp.clip(c + held, -p.qmax, 0)

        def step(t: Any, x: Any) -> Any:
            row = cta + t * ctas
            following = fetch(t + 1)
            c = codes(x)
            o_g[row, : p.k] = jnp.clip(c, -p.qmax, p.qmax).astype(jnp.int8)
            if p.extra:
                o_g[row, p.k :] = flattened(c).astype(jnp.int8)
            return following

        lax.fori_loop(0, lax.div(p.rows - cta + ctas - 1, jnp.int32(ctas)), step, fetch(0))

    return kernel(
        body,
        out_type=jax.ShapeDtypeStruct((p.rows, p.k + p.extra), jnp.int8),
        scratch_types={"codes": plgpu.SMEM((p.k,), jnp.int16)} if p.extra and not interpret else {},
        grid=(ctas,),
        grid_names=("cta",),
        **({"interpret": interpret} if interpret else {}),
    )
