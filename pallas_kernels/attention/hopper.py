"""Attention of one new token a sequence over INT8 codes, a warp at a time, for Hopper GPUs.

It computes the same as :mod:`pallas_kernels.attention.triton`, cut up otherwise: every warp looks at every so many-th tile of
16 positions and has an online softmax of its own, and the warps of a unit, which has a key-value head of a sequence or a
share of it, put their outputs together.  The work of a unit: :mod:`pallas_kernels.attention.hopper_unit`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.attention.codes import Recipe
from pallas_kernels.attention.hopper_cut import TILE_POSITIONS, Cut, best_cut
from pallas_kernels.attention.hopper_memory import MOST_GROUP, shared_words
from pallas_kernels.attention.hopper_unit import Unit
from pallas_kernels.attention.problem import MOST_ELEMENTS, Problem, capacity_of
from pallas_kernels.attention.triton import Finish, Result
from pallas_kernels.mosaic.compat import FragmentedArray, LaunchContext, Ref, ir, kernel_in_place, plgpu
from pallas_kernels.mosaic.lanes import Lanes

DIMS = (64, 128)
"""Sizes of a head that there are."""
MOST_EXTRA = 1024
"""Channels that large ones continue in, for which a CTA has shared memory."""


def cannot_use(qkv: Array, keys: Array, values: Array, paged: bool = False) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    dim, group = qkv.shape[2], qkv.shape[1] // keys.shape[2] - 2
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        return f"qkv is {qkv.dtype}, not bfloat16 or float16"
    for name, operand in (("keys", keys), ("values", values)):
        if operand.dtype != jnp.int8:
            return f"{name} are {operand.dtype}, not int8"
    if dim not in DIMS:
        return f"head_dim is {dim}, not one of {DIMS}"
    if group > MOST_GROUP:
        return f"{group} heads share a key-value head, more than {MOST_GROUP}"
    if max(2 * math.prod(qkv.shape), math.prod(keys.shape)) > MOST_ELEMENTS:
        return "an operand has 2^31 bytes or more"
    if paged and keys.shape[1] % TILE_POSITIONS:
        return f"pages hold {keys.shape[1]} positions, not a multiple of {TILE_POSITIONS}"
    return None


def run(
    qkv: Array,
    lengths: Array,
    rotation: Sequence[Array],
    cache: Sequence[Array],
    *,
    scale: float,
    window: int | None,
    finish: Finish[Result],
    recipe: Recipe | None = None,
    pages: Array | None = None,
    cut: Cut | None = None,
) -> tuple[Result, tuple[Array, ...]]:
    """The kernel, with the arguments of :func:`pallas_kernels.attention.triton.run`."""
    cut = cut or best_cut(len(qkv) * cache[0].shape[2], capacity_of(cache, pages))
    p = Problem.of(qkv, rotation, cache, scale, window, cut, pages)
    if recipe is not None and p.splits == 1 and len(recipe.source) <= MOST_EXTRA:
        p = p.quantizing(recipe)
    how = recipe[1 : 4 if p.extra else 2] if recipe is not None and p.qmax else ()
    table = () if pages is None else (pages,)
    results = jax.custom_batching.sequential_vmap(build(p))(lengths, *table, qkv, *rotation, *cache, *how)
    written, (first, *rest) = tuple(results[:4]), results[4:]
    if p.qmax:
        return (first,), written  # pyright: ignore[reportReturnType]
    return finish(first, rest[0] if rest else None), written


def build(p: Problem[Cut]) -> Callable[..., tuple[Array, ...]]:
    """The kernel: a function of lengths, the table of pages if there is one, qkv, the rotation's two if there is one, the
    cache's four arrays, and a recipe's.

    It gives the cache's arrays, with the new tokens; then its output, (batch, kv_heads, splits, group, dim), and the
    logarithms of the sums if there are several splits; or, with a recipe, the codes.

    Args:
      p: whose cut is a :class:`Cut`.

    Raises:
      ValueError: if the units do not fill CTAs.
    """
    if p.batch * p.kv_heads * p.splits % p.cut.units:
        raise ValueError(f"{p.cut}: {p.batch * p.kv_heads * p.splits} units do not fill CTAs")
    shape = p.cache_shape
    cache = [jax.ShapeDtypeStruct(shape, jnp.int8)] * 2 + [jax.ShapeDtypeStruct(shape[:3], jnp.float32)] * 2
    parts = (p.batch, p.kv_heads, p.splits, p.group)
    if p.qmax:
        found = [jax.ShapeDtypeStruct((p.batch, p.kv_heads * p.group * p.dim + p.extra), jnp.int8)]
    elif p.splits > 1:
        found = [jax.ShapeDtypeStruct((*parts, p.dim), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)]
    else:
        found = [jax.ShapeDtypeStruct((*parts, p.dim), p.dtype)]
    first = 2 + bool(p.page) + 2 * p.rotates  # of the cache among the operands
    inputs = first + 4 + ((3 if p.extra else 1) if p.qmax else 0)

    def decode_attention(*refs: Ref, **scratch: Ref) -> None:
        names = list(scratch)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()), *[plgpu.RefType()] * (len(refs) + len(names))))
        def emit(ctx: LaunchContext, cta: FragmentedArray, *memory: ir.Value) -> None:
            del ctx
            lanes = Lanes()
            shared = dict(zip(names, memory[len(refs) :], strict=True))
            Unit(lanes, p, lanes.place(cta), memory[:inputs], memory[inputs : len(refs)], shared).run()

        emit(lax.axis_index("cta"), *refs, *scratch.values())

    return kernel_in_place(
        decode_attention,
        out_type=[*cache, *found],
        aliases={first + i: i for i in range(4)},
        scratch_types={name: plgpu.SMEM((size * p.cut.units,), jnp.int32) for name, size in shared_words(p).items()},
        grid=(p.batch * p.kv_heads * p.splits // p.cut.units,),
        grid_names=("cta",),
        num_threads=p.cut.warps * p.cut.units // 4,
    )
