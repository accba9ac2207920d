"""Integer matmuls written in jax.numpy: the accumulator of every weight format, and the epilogue that scales it.

They define the result, bit for bit, and run wherever no hand-written kernel applies.

Terminology:
  codes  small integers that stand for real numbers: real = code * scale.
  M      rows of activations (tokens); N output channels; K input channels.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int, Int8, Int32


def product(x: Int8[Array, "*rows k"], codes: Int8[Array, "n k"]) -> Int32[Array, "*rows n"]:
    """``x @ codes.T`` in int32."""
    return lax.dot_general(x, codes, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def grouped_product(
    x: Int8[Array, "*rows k"],
    codes: Int8[Array, "n k"],
    group_scale: Int[Array, "groups n"] | Float32[Array, "groups n"],
) -> Int32[Array, "*rows n"] | Float32[Array, "*rows n"]:
    """The products of each group of input channels, times the group's scale, added up over the groups.

    With integer scales all of that is int32.  With float scales every group's product is converted to float32, and the sum
    is taken in the order of the groups.
    """
    groups, n = group_scale.shape
    rows, size = x.reshape(-1, x.shape[-1]), x.shape[-1] // groups
    exact = jnp.issubdtype(group_scale.dtype, jnp.integer)
    group_scale = group_scale.astype(jnp.int32 if exact else jnp.float32)

    def add(g: Int32[Array, ""], total: Array) -> Array:
        x_part, w_part = (lax.dynamic_slice_in_dim(operand, g * size, size, 1) for operand in (rows, codes))
        product = lax.dot_general(x_part, w_part, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return total + product.astype(total.dtype) * group_scale[g]

    total = lax.fori_loop(0, groups, add, jnp.zeros((len(rows), n), jnp.int32 if exact else jnp.float32))
    return total.reshape(*x.shape[:-1], n)


def folded_product(
    x: Int8[Array, "*rows k"], codes: Int8[Array, "n k"], group_scale: Int[Array, "groups n"]
) -> Int32[Array, "*rows n"]:
    """:func:`grouped_product` where every code times its scale fits into int8: they are multiplied first."""
    each = jnp.repeat(group_scale.astype(jnp.int8).T, codes.shape[1] // len(group_scale), axis=1)
    return product(x, codes * each)


def dequantized_product(
    x: Float[Array, "*rows k"], codes: Int8[Array, "n k"], group_scale: Float32[Array, "groups n"]
) -> Float32[Array, "*rows n"]:
    """Real activations times ``codes * group_scale``, rounded to their dtype; summed in float32."""
    each = jnp.repeat(group_scale.T, codes.shape[1] // len(group_scale), axis=1)
    weight = (codes * each).astype(x.dtype)
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def scale_accumulator(
    acc: Int32[Array, "*rows n"] | Float32[Array, "*rows n"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Array:
    """Epilogue of a matmul of codes: ``cast(acc * (x_scale * weight_scale) + bias)``, computed in float32.

    A sum of int32 accumulators over devices, scaled by this, has the bits of the matmul on one device.

    Args:
      acc: accumulator, (..., n), int32, or float32 where float scales of groups are in it.
      x_scale: float32 scalar, or one per row, shape ``acc.shape[:-1]``.
      weight_scale: float32 scalar, or one per output channel, (n,).
      bias: optional, (n,), added in float32 before the cast.
      out_dtype: a floating dtype; an integer one gives the bare accumulator, without scales and bias.

    Returns:
      (..., n) of ``out_dtype``.
    """
    if jnp.issubdtype(out_dtype, jnp.integer):
        return acc.astype(out_dtype)
    if x_scale.ndim:
        x_scale = x_scale[..., None]
    y = acc.astype(jnp.float32) * (x_scale * weight_scale)
    if bias is not None:
        # A compiler that fused the product with the sum would round once instead of twice, and the bits would depend on
        # the compiler.  It cannot fuse through a selection; int32's minimum is no sum of products that fit.
        impossible = acc == jnp.iinfo(jnp.int32).min if jnp.issubdtype(acc.dtype, jnp.integer) else jnp.isnan(acc)
        y = jnp.where(impossible, jnp.nan, y) + bias.astype(jnp.float32)
    return y.astype(out_dtype)
