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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int8, Int32

from pallas_kernels import device
from pallas_kernels.gradient import CODES, without_gradient
from pallas_kernels.matmul.dispatch import configuration, group_count
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.matmul.kind import Implementation, Matmul, Operands, Weight
from pallas_kernels.matmul.operands import check_format
from pallas_kernels.quantize import reference
from pallas_kernels.ragged import ROW_ALIGNMENT, divide, most_tiles

TILE_ROWS = 256
"""Of a tile at most, where XLA multiplies."""
TILES = "it goes through as many tiles as the experts' rows happen to fill"
"""Why real activations have no gradient either."""


def row_alignment() -> int:
    """A number of which the numbers of rows of experts are best made multiples on this machine."""
    return ROW_ALIGNMENT if device.hopper_device() else 1


class Tiles(NamedTuple):
    """Rows sorted by expert, cut into tiles.

    Attributes:
      rows: which rows are in each tile, (tiles, size); in padding, and in tiles that are not needed, any rows.
      expert: of each tile.
      place: of each row in the tiles, as the index of a row of all tiles one below the other.
    """

    rows: Int32[Array, "tiles size"]
    expert: Int32[Array, " tiles"]
    place: Int32[Array, " rows"]


def tile_size(rows: int, experts: int) -> int:
    """Rows of a tile: about as many as an expert has on average, a power of two."""
    return min(TILE_ROWS, 1 << max(0, -(-rows // experts) - 1).bit_length())


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
    weight: Weight,
    group_sizes: Int32[Array, " experts"],
    x_scale: Float32[Array, "..."] | float = 1.0,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    alignment: int = 1,
    implementation: Implementation | None = None,
) -> Array:
    """Multiplies every row with the weight of its expert; the bits are those of the matmul with that weight alone.

    With float scales of groups on a GPU, whose products are added up in another order, they are close instead.

    Args:
      x: activation codes sorted by expert, (rows, k), or, for a format of weights alone, real activations.
      weight: weights of every expert: codes (experts, n, k * bits / 8); scale a scalar, one an expert, (experts,), or one an
        output channel of each, (experts, n); scales of groups (experts, groups, n).
      group_sizes: rows of each expert, (experts,); their sum is the number of rows at most.  Results for rows beyond it are
        not defined.
      x_scale: float32 scalar, or one a row, (rows,); it means nothing for real activations.
      out_dtype: a floating dtype, or int32 for the bare accumulator.
      alignment: a number that all of ``group_sizes`` are multiples of (:func:`row_alignment`); the rows that an expert is
        given for it can hold anything.
      implementation: "mosaic", "xla", or None for the fastest one here.

    Returns:
      (rows, n), in the order of the rows.

    Raises:
      ValueError: if shapes do not fit together.
      NotImplementedError: if the named implementation cannot take the call.
    """
    kind = Matmul(decoder=weight.decoder, out_dtype=jnp.dtype(out_dtype))
    of_rows = jnp.asarray(1 if jnp.issubdtype(x.dtype, jnp.floating) else x_scale, jnp.float32)
    scale = jnp.asarray(weight.scale, jnp.float32)
    operands = Operands(x, weight.codes, of_rows, scale, weight.group_scale)
    _check(kind, operands, group_sizes)
    run = functools.partial(_run, kind, alignment, implementation)
    why = TILES if jnp.issubdtype(x.dtype, jnp.floating) else CODES
    return without_gradient("expert_matmul", run, why)(operands, group_sizes)


def _run(
    kind: Matmul, alignment: int, implementation: Implementation | None, operands: Operands, group_sizes: Array
) -> Array:
    """By the implementation asked for, or the fastest there is."""
    x, codes, x_scale, *_ = operands
    experts, n = codes.shape[:2]
    if implementation == "xla" or (implementation is None and device.hopper_device() is None) or not len(x):
        return _xla(kind, operands, group_sizes)
    from pallas_kernels.matmul.hopper import launch

    p = Problem(
        m=len(x),
        n=n,
        k=x.shape[1],
        decoder=kind.decoder,
        out_dtype=kind.out_dtype,
        per_token=bool(x_scale.ndim),
        per_channel=True,
        experts=experts,
    )
    reason = None
    if alignment % ROW_ALIGNMENT:
        reason = f"experts' rows are multiples of {alignment}, not of {ROW_ALIGNMENT}"
    config = configuration("expert_matmul", p, x, group_count(operands.group_scale), implementation, reason)
    if config is None:
        return _xla(kind, operands, group_sizes)

    def mosaic(operands: Operands, group_sizes: Array) -> Array:
        x, codes, x_scale, scale, group_scale, _ = operands
        each = jnp.broadcast_to(scale if scale.ndim == 2 else scale[..., None], (experts, n))
        return launch.expert_matmul(p, config, x, codes, group_sizes, x_scale, each, group_scale)

    if implementation == "mosaic":
        return mosaic(operands, group_sizes)
    return lax.platform_dependent(operands, group_sizes, cuda=mosaic, default=functools.partial(_xla, kind))


def _xla(kind: Matmul, operands: Operands, group_sizes: Array) -> Array:
    x, codes, x_scale, scale, group_scale, _ = operands
    each = jnp.broadcast_to(scale, codes.shape[:1]) if not scale.ndim else scale
    scales = (x_scale,) if x_scale.ndim else ()

    def tile(expert: Array, x: Array, *scale: Array) -> Array:
        (of_rows,) = scale or (x_scale,)
        groups = None if group_scale is None else group_scale[expert]
        return kind.xla(Operands(x, codes[expert], of_rows, each[expert], groups))

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


def _check(kind: Matmul, operands: Operands, group_sizes: Array) -> None:
    x, codes, x_scale, scale, group_scale, _ = operands
    if x.ndim != 2 or codes.ndim != 3:
        raise ValueError(
            f"expert_matmul: expected x (rows, k) and weight (experts, n, k), got {x.shape}, {codes.shape}"
        )
    (rows, k), (experts, n, stored) = x.shape, codes.shape
    check_format("expert_matmul", kind.decoder, codes, group_scale)
    kind.decoder.check("expert_matmul", x, codes, group_scale)
    if stored * kind.decoder.halves != k:
        raise ValueError(f"expert_matmul: x {x.shape} does not fit {kind.decoder.bits}-bit weight codes {codes.shape}")
    if group_sizes.shape != (experts,):
        raise ValueError(f"expert_matmul: group_sizes must be ({experts},), got {group_sizes.shape}")
    if x_scale.shape not in ((), (rows,)):
        raise ValueError(f"expert_matmul: x_scale must be a scalar or ({rows},), got {x_scale.shape}")
    if scale.shape not in ((), (experts,), (experts, n)):
        raise ValueError(
            f"expert_matmul: weight_scale must be a scalar, ({experts},) or ({experts}, {n}), got {scale.shape}"
        )
    if group_scale is None:
        return
    shape = group_scale.shape
    if group_scale.ndim != 3 or (shape[0], shape[2]) != (experts, n) or k % max(shape[1], 1):
        raise ValueError(
            f"expert_matmul: group_scale must be ({experts}, groups, {n}) with groups a divisor of {k}, got {shape}"
        )
