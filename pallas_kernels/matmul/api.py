"""The entry points of the integer matmuls, on plain arrays.

:func:`quantized_matmul` takes a :class:`Weight` of any format; the other functions are it for one format each.

Every function takes ``implementation``: None picks the fastest one that supports the call on this device, a name asks for
that one and raises ``NotImplementedError`` if it cannot take the case.  All implementations give the same bits as
:mod:`pallas_kernels.matmul.reference`, but where floats are added up: over groups with float scales, and in
:func:`weight_only_int4_matmul`.  All work under ``jit``, ``vmap`` and ``shard_map``.

  "mosaic"  kernels written in Pallas Mosaic GPU, for NVIDIA Hopper (:mod:`pallas_kernels.matmul.hopper`)
  "xla"     the reference, compiled by XLA, for any device

Activation codes are integers, so functions of them have no gradient; differentiating raises ``NotImplementedError``.
:func:`weight_only_int4_matmul` has that of the reference, with respect to activations, scales and bias.
"""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float32, Int, Int8

from pallas_kernels.device import hopper_device
from pallas_kernels.matmul import dispatch
from pallas_kernels.matmul.hopper.decoders import Int4Bf16, Int4Shifted, decoder_for
from pallas_kernels.matmul.hopper.decoders import Int8 as Int8Codes
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.matmul.kind import Implementation, Matmul, Weight
from pallas_kernels.matmul.operands import checked_operands


def quantized_matmul(
    x: Int8[Array, "*rows k"] | Float[Array, "*rows k"],
    weight: Weight,
    x_scale: Float32[Array, "..."] | float = 1.0,
    bias: Float[Array, " n"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Array:
    """Multiplies activations with a quantized weight, accumulates, and scales once at the end.

    Args:
      x: activation codes, (..., k); or, for a format of weights alone, activations of a floating dtype.
      weight: codes (n, k) in their format, with their scales.
      x_scale: float32 scalar, or one per row, shape ``x.shape[:-1]``.
      bias: optional, (n,), added in float32 before the cast.
      out_dtype: a floating dtype, or, for activation codes, int32 for the bare accumulator (without scales and bias).
      implementation: None, "mosaic" or "xla".

    Returns:
      ``cast(acc * (x_scale * weight.scale) + bias)``, shape (..., n), where ``acc`` is ``int32(x @ codes.T)``, or, with
      groups, ``sum_g(group_scale[g] * int32(x_g @ codes_g.T))``.

    Raises:
      ValueError: if shapes or dtypes do not fit together.
      NotImplementedError: if the named implementation cannot take the call.
    """
    kind = Matmul(decoder=weight.decoder, out_dtype=jnp.dtype(out_dtype))
    return dispatch.matmul(kind, implementation)(checked_operands(kind, x, weight, x_scale, bias, implementation))


def int8_matmul(
    x: Int8[Array, "*rows k"],
    weight: Int8[Array, "n k"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Array:
    """:func:`quantized_matmul` of int8 weight codes (n, k): ``cast(int32(x @ weight.T) * (x_scale * weight_scale) + bias)``.

    Args:
      x: activation codes, (..., k).
      weight: weight codes, (n, k): output channels first, input channels contiguous.
      x_scale: float32 scalar, or one per row, shape ``x.shape[:-1]``.
      weight_scale: float32 scalar, or one per output channel, shape (n,).
      bias, out_dtype, implementation: as for :func:`quantized_matmul`.
    """
    operand = Weight(Int8Codes(), weight, weight_scale)
    return quantized_matmul(x, operand, x_scale, bias, out_dtype=out_dtype, implementation=implementation)


def int4_matmul(
    x: Int8[Array, "*rows k"],
    packed: Int8[Array, "n half"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Array:
    """:func:`int8_matmul` with 4-bit weight codes, two to a byte as :func:`pallas_kernels.pack_int4` packs them.

    ``packed`` has shape (n, k / 2) with k a multiple of 256; everything else is as in :func:`int8_matmul`.
    """
    operand = Weight(Int4Shifted(), packed, weight_scale)
    return quantized_matmul(x, operand, x_scale, bias, out_dtype=out_dtype, implementation=implementation)


def grouped_int8_matmul(
    x: Int8[Array, "*rows k"],
    weight: Int8[Array, "n k"],
    x_scale: Float32[Array, "..."],
    group_scale: Int[Array, "groups n"] | Float32[Array, "groups n"],
    weight_scale: Float32[Array, "..."] | float = 1.0,
    bias: Float[Array, " n"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    folded: bool = False,
    implementation: Implementation | None = None,
) -> Array:
    """:func:`quantized_matmul` of int8 weight codes with a scale for every output channel and group of input channels.

    Args:
      x: activation codes, (..., k).
      weight: weight codes, (n, k).
      x_scale: float32 scalar, or one per row, shape ``x.shape[:-1]``.
      group_scale: (groups, n); a group is k / groups neighbouring channels.  int32 or int16 scales keep the sum over the
        groups in int32 (Integer Scale, arXiv 2405.14597); the caller sees to it that neither the sum nor, with 4-bit codes,
        16 times the sum can overflow.  With float32 scales every group's product is converted.
      weight_scale: common factor: float32 scalar, such as 1 / amplifier, or one per output channel, (n,).
      bias, out_dtype: as for :func:`quantized_matmul`.
      folded: promises that the scales are integers and that every code times its scale fits into int8 (scales from 1 to 15
        for 4-bit codes).  The result is the same, but codes may be multiplied with their scales first, after which the
        matmul need not know of groups.
      implementation: None, "mosaic" (4-bit codes in groups of 128) or "xla".

    Returns:
      ``cast(sum_g(group_scale[g] * int32(x_g @ weight_g.T)) * (x_scale * weight_scale) + bias)``, shape (..., n).
    """
    decoder = decoder_for(8, group_dtype=group_scale.dtype, folded=folded)
    operand = Weight(decoder, weight, weight_scale, group_scale)
    return quantized_matmul(x, operand, x_scale, bias, out_dtype=out_dtype, implementation=implementation)


def grouped_int4_matmul(
    x: Int8[Array, "*rows k"],
    packed: Int8[Array, "n half"],
    x_scale: Float32[Array, "..."],
    group_scale: Int[Array, "groups n"] | Float32[Array, "groups n"],
    weight_scale: Float32[Array, "..."] | float = 1.0,
    bias: Float[Array, " n"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    folded: bool = False,
    implementation: Implementation | None = None,
) -> Array:
    """:func:`grouped_int8_matmul` with 4-bit weight codes, two to a byte as :func:`pallas_kernels.pack_int4` packs them."""
    decoder = decoder_for(4, group_dtype=group_scale.dtype, folded=folded)
    operand = Weight(decoder, packed, weight_scale, group_scale)
    return quantized_matmul(x, operand, x_scale, bias, out_dtype=out_dtype, implementation=implementation)


def weight_only_int4_matmul(
    x: Float[Array, "*rows k"],
    packed: Int8[Array, "n half"],
    group_scale: Float32[Array, "groups n"],
    weight_scale: Float32[Array, "..."] | float = 1.0,
    bias: Float[Array, " n"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Array:
    """Multiplies real activations with 4-bit weight codes that have a scale for every group of input channels (W4A16).

    Args:
      x: activations, (..., k), of a floating dtype.
      packed: weight codes, (n, k / 2), as :func:`pallas_kernels.pack_int4` packs them.
      group_scale: (groups, n); a group is k / groups neighbouring channels.
      weight_scale: common factor: float32 scalar, or one per output channel, (n,).
      bias, out_dtype: as for :func:`quantized_matmul`; ``out_dtype`` is a floating one.
      implementation: None, "mosaic" (bfloat16 activations, groups of 128) or "xla".  XLA's weights are rounded to the dtype
        of ``x``; the kernel multiplies codes, which are exact, and applies the scales to the sums.

    Returns:
      ``cast(sum_g(group_scale[g] * (x_g @ codes_g.T)) * weight_scale + bias)``, shape (..., n).
    """
    operand = Weight(Int4Bf16(), packed, weight_scale, group_scale)
    return quantized_matmul(x, operand, bias=bias, out_dtype=out_dtype, implementation=implementation)


def can_use_mosaic(
    bits: int,
    rows: int,
    n: int,
    k: int,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    group_dtype: DTypeLike | None = None,
    folded: bool = False,
    weight_only: bool = False,
    device: str | None = None,
) -> bool:
    """Whether the Hopper kernels can multiply (rows, k) activation codes with (n, k) weight codes of so many bits.

    ``group_dtype`` is the dtype of the scales of groups of 128, if there are any; ``folded`` is as in
    :func:`grouped_int8_matmul`; with ``weight_only``, activations are bfloat16; ``device`` is the name of a GPU ("NVIDIA
    H200"), that of this process by default.
    """
    from pallas_kernels.matmul.hopper.launch import cannot_use

    decoder = decoder_for(bits, group_dtype=group_dtype, folded=folded, weight_only=weight_only)
    p = Problem(m=rows, n=n, k=k, decoder=decoder, out_dtype=jnp.dtype(out_dtype))
    return (device or hopper_device()) is not None and cannot_use(p) is None
