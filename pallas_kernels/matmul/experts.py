"""Matmuls of a mixture of experts: every row of activations meets the weight of one expert, all in one call.

The rows come sorted by expert, with the number of rows that each has (``group_sizes``, as ``jax.lax.ragged_dot`` has them).
An implementation cuts them into tiles of rows of one expert each, so that what a tile needs is a plain matmul; where the
rows of an expert do not fill the last of its tiles, that is padded.

  "xla"     one tile after the other, each by the matmul that :mod:`pallas_kernels.matmul.reference` defines; any device
  "mosaic"  all tiles in one Mosaic GPU kernel (:mod:`pallas_kernels.matmul.hopper.ragged`), for Hopper GPUs; the rows of
            every expert have to begin at a multiple of 8
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int, Int8, Int32

from pallas_kernels.matmul import reference
from pallas_kernels.matmul.dispatch import (
    Implementation,
    Matmul,
    configuration,
    hopper_device,
    problem,
    without_gradient,
)

LARGEST_TILE = 256
"""Rows of a tile at most, where XLA multiplies."""
ALIGNMENT = 8
"""What the number of rows of every expert has to be a multiple of for the kernel."""


def row_alignment() -> int:
    """What the numbers of rows of experts are best made multiples of on this machine."""
    return ALIGNMENT if hopper_device() else 1


class Tiles(NamedTuple):
    """Rows sorted by expert, cut into tiles.

    Attributes:
      rows: which rows are in each tile, (tiles, size); in padding, and in tiles that are not needed, any rows.
      expert: of each tile.
      place: where each row stands in the tiles, as the index of a row of all tiles one below the other.
    """

    rows: Int32[Array, "tiles size"]
    expert: Int32[Array, " tiles"]
    place: Int32[Array, " rows"]


def tile_size(rows: int, experts: int) -> int:
    """Rows of a tile: about as many as an expert has on average, a power of two."""
    return min(LARGEST_TILE, 1 << max(0, -(-rows // experts) - 1).bit_length())


class Division(NamedTuple):
    """Where tiles of rows sorted by expert begin.

    Attributes:
      expert, begin: of each tile, and its first row; of tiles that are not needed, anything.
      ends: the row behind the last one of each expert.
      needed: tiles of each expert.
    """

    expert: Int32[Array, " tiles"]
    begin: Int32[Array, " tiles"]
    ends: Int32[Array, " experts"]
    needed: Int32[Array, " experts"]


def most_tiles(experts: int, rows: int, size: int, alignment: int = 1) -> int:
    """Tiles of ``size`` rows that the worst division of the rows needs, experts having multiples of ``alignment``."""
    fullest = min(experts, rows // alignment)
    return fullest + (rows - alignment * fullest) // size


def divide(group_sizes: Int32[Array, " experts"], count: int, size: int) -> Division:
    """Where ``count`` tiles of ``size`` rows begin, which are enough."""
    ends, needed = jnp.cumsum(group_sizes), -(-group_sizes // size)
    tile_ends, tile = jnp.cumsum(needed), jnp.arange(count)
    expert = jnp.searchsorted(tile_ends, tile, side="right").clip(max=len(group_sizes) - 1)
    begin = (ends - group_sizes)[expert] + (tile - (tile_ends - needed)[expert]) * size
    return Division(expert.astype(jnp.int32), begin.astype(jnp.int32), ends, needed)


def cut(group_sizes: Int32[Array, " experts"], rows: int, size: int) -> Tiles:
    """Cuts rows sorted by expert into tiles of ``size`` rows; there are as many tiles as the worst division needs."""
    experts = len(group_sizes)
    expert, begin, ends, needed = divide(group_sizes, most_tiles(experts, rows, size), size)
    inside = (begin[:, None] + jnp.arange(size)).clip(0, max(rows - 1, 0))
    owner = jnp.searchsorted(ends, jnp.arange(rows), side="right").clip(max=experts - 1)
    starts, first = ends - group_sizes, jnp.cumsum(needed) - needed
    place = first[owner] * size + jnp.arange(rows) - starts[owner]
    return Tiles(inside.astype(jnp.int32), expert, place.astype(jnp.int32))


def map_tiles(
    f: Callable[..., Array], group_sizes: Int32[Array, " experts"], *operands: Array, size: int | None = None
) -> Array:
    """Applies a function tile by tile to rows that are sorted by expert.

    Args:
      f: (expert, rows of a tile of every operand) -> rows; each row of the result depends on the same row alone.
      group_sizes: rows of each expert; their sum is the number of rows.
      operands: all with one leading axis, the rows.
      size: of a tile; chosen by default.

    Returns:
      The results, in the order of the rows.
    """
    rows = len(operands[0])
    size = size or tile_size(rows, len(group_sizes))
    if not rows:
        empty = [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in operands]
        one = jax.eval_shape(f, jax.ShapeDtypeStruct((), jnp.int32), *empty)
        return jnp.zeros((0, *one.shape[1:]), one.dtype)
    tiles = cut(group_sizes, rows, size)
    found = lax.map(lambda tile: f(tile[1], *(x[tile[0]] for x in operands)), (tiles.rows, tiles.expert))
    return found.reshape(-1, *found.shape[2:])[tiles.place]


def expert_matmul(
    x: Int8[Array, "rows k"] | Float[Array, "rows k"],
    weight: Int8[Array, "experts n stored"],
    group_sizes: Int32[Array, " experts"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    group_scale: Int[Array, "experts groups n"] | Float32[Array, "experts groups n"] | None = None,
    *,
    bits: Literal[4, 8],
    folded: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
    alignment: int = 1,
    implementation: Implementation | None = None,
) -> Array:
    """Multiplies every row with the weight of its expert; the bits are those of the matmul with that weight alone.

    With float scales of groups on a GPU, whose products are added up in another order, they are close instead.

    Args:
      x: activation codes sorted by expert, (rows, k), or, with 4-bit weights in groups with float scales, real activations.
      weight: weight codes of every expert, (experts, n, k), or (experts, n, k / 2) with 4 bits, two to a byte as
        :func:`pallas_kernels.pack_int4` packs them.
      group_sizes: rows of each expert, (experts,); their sum is the number of rows at most.  What comes out for rows beyond
        it is not defined.
      x_scale: float32 scalar, or one a row, (rows,); it means nothing for real activations.
      weight_scale: float32 scalar, one an expert, (experts,), or one an output channel of each, (experts, n).
      group_scale: scales of groups of input channels, as in :func:`pallas_kernels.grouped_int8_matmul`; None without groups.
      bits: of a weight code.
      folded: as in :func:`pallas_kernels.grouped_int8_matmul`.
      out_dtype: a floating dtype, or int32 for the bare accumulator.
      alignment: a number that all of ``group_sizes`` are multiples of (:func:`row_alignment`); the rows that an expert is
        given for it can hold anything.
      implementation: "mosaic", "xla", or None for what is fastest here.

    Returns:
      (rows, n), in the order of the rows.

    Raises:
      ValueError: if shapes do not fit together.
      NotImplementedError: if the named implementation cannot take the call.
    """
    weight_only = jnp.issubdtype(x.dtype, jnp.floating)
    kind = Matmul(
        bits=bits,
        grouped=group_scale is not None,
        folded=folded,
        weight_only=weight_only,
        out_dtype=jnp.dtype(out_dtype),
    )
    x_scale, weight_scale = (jnp.asarray(scale, jnp.float32) for scale in (x_scale, weight_scale))
    _check(kind, x, weight, group_sizes, x_scale, weight_scale, group_scale)
    rest = () if group_scale is None else (group_scale,)
    return without_gradient("expert_matmul", functools.partial(_run, kind, alignment, implementation))(
        x, weight, group_sizes, x_scale, weight_scale, *rest
    )


def _run(kind: Matmul, alignment: int, implementation: Implementation | None, *operands: Array) -> Array:
    """By the implementation asked for, or the fastest there is."""
    x, weight, _, x_scale, _, *groups = operands
    (rows, k), (experts, n) = x.shape, weight.shape[:2]
    if implementation == "xla" or (implementation is None and hopper_device() is None) or not rows:
        return _xla(kind, *operands)
    from pallas_kernels.matmul.hopper import launch as matmul

    kinds = {"per_token": bool(x_scale.ndim), "per_channel": True, "folded": kind.folded, "experts": experts}
    kinds |= {"weight_only": kind.weight_only, "group_dtype": groups[0].dtype if groups else None}
    p = problem(kind.bits, rows, n, k, kind.out_dtype, **kinds)
    reason = f"experts' rows are multiples of {alignment}, not of {ALIGNMENT}" if alignment % ALIGNMENT else None
    config = configuration("expert_matmul", p, x, groups[0].shape[1] if groups else None, implementation, reason)
    if config is None:
        return _xla(kind, *operands)

    def mosaic(
        x: Array, weight: Array, sizes: Array, x_scale: Array, weight_scale: Array, group_scale: Array | None = None
    ) -> Array:
        each = weight_scale if weight_scale.ndim == 2 else weight_scale[..., None]
        each = jnp.broadcast_to(each, (experts, n))
        return matmul.expert_matmul(p, config, x, weight, sizes, x_scale, each, group_scale)

    if implementation == "mosaic":
        return mosaic(*operands)
    return lax.platform_dependent(*operands, cuda=mosaic, default=functools.partial(_xla, kind))


def _xla(
    kind: Matmul, x: Array, weight: Array, group_sizes: Array, x_scale: Array, weight_scale: Array, *groups: Array
) -> Array:
    each = jnp.broadcast_to(weight_scale, weight.shape[:1]) if not weight_scale.ndim else weight_scale
    scales = (x_scale,) if x_scale.ndim else ()

    def tile(expert: Array, x: Array, *scale: Array) -> Array:
        (of_rows,) = scale or (x_scale,)
        return kind.xla(x, weight[expert], of_rows, each[expert], *(g[expert] for g in groups))

    return map_tiles(tile, group_sizes, x, *scales)


def quantize_for_experts(
    x: Float[Array, "rows k"],
    expert: Int32[Array, " rows"],
    multiplier: Float32[Array, "experts k"],
    source: Int32[Array, "experts e"],
    part: Int32[Array, "experts e"],
    *,
    qmax: int,
) -> Int8[Array, "rows width"]:
    """:func:`pallas_kernels.quantize_activations` with a recipe for every expert; ``expert`` is that of each row."""
    quantize = jax.vmap(functools.partial(reference.quantize_activations, qmax=qmax))
    return without_gradient("quantize_for_experts", quantize)(x, multiplier[expert], source[expert], part[expert])


def quantize_per_token_for_experts(
    x: Float[Array, "rows k"],
    expert: Int32[Array, " rows"],
    multiplier: Float32[Array, "experts k"],
    *,
    qmax: int,
    width: int,
) -> tuple[Int8[Array, "rows width"], Float32[Array, " rows"]]:
    """:func:`pallas_kernels.quantize_per_token` with a multiplier for every expert; ``expert`` is that of each row."""
    quantize = jax.vmap(functools.partial(reference.quantize_per_token, qmax=qmax, width=width))
    return without_gradient("quantize_per_token_for_experts", quantize)(x, multiplier[expert])


def _check(
    kind: Matmul,
    x: Array,
    weight: Array,
    group_sizes: Array,
    x_scale: Array,
    weight_scale: Array,
    group_scale: Array | None,
) -> None:
    if x.ndim != 2 or weight.ndim != 3:
        raise ValueError(
            f"expert_matmul: expected x (rows, k) and weight (experts, n, k), got {x.shape}, {weight.shape}"
        )
    (rows, k), (experts, n, stored) = x.shape, weight.shape
    if weight.dtype != jnp.int8 or (not kind.weight_only and x.dtype != jnp.int8):
        raise ValueError(f"expert_matmul: expected int8 codes, got x {x.dtype} and weight {weight.dtype}")
    if kind.weight_only and (kind.bits != 4 or group_scale is None or group_scale.dtype != jnp.float32):
        raise ValueError("expert_matmul: real activations need 4-bit weights with float32 scales of groups")
    if stored * (8 // kind.bits) != k:
        raise ValueError(f"expert_matmul: x {x.shape} does not fit {kind.bits}-bit weight codes {weight.shape}")
    if group_sizes.shape != (experts,):
        raise ValueError(f"expert_matmul: group_sizes must be ({experts},), got {group_sizes.shape}")
    if x_scale.shape not in ((), (rows,)):
        raise ValueError(f"expert_matmul: x_scale must be a scalar or ({rows},), got {x_scale.shape}")
    if weight_scale.shape not in ((), (experts,), (experts, n)):
        raise ValueError(
            f"expert_matmul: weight_scale must be a scalar, ({experts},) or ({experts}, {n}), got {weight_scale.shape}"
        )
    if group_scale is None:
        return
    shape = group_scale.shape
    if group_scale.ndim != 3 or (shape[0], shape[2]) != (experts, n) or k % max(shape[1], 1):
        raise ValueError(
            f"expert_matmul: group_scale must be ({experts}, groups, {n}) with groups a divisor of {k}, got {shape}"
        )
    if kind.folded and not jnp.issubdtype(group_scale.dtype, jnp.integer):
        raise ValueError("expert_matmul: only integer scales can be folded")
