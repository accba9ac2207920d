"""What every kernel computes, written in jax.numpy.

These functions define the result, bit for bit; they are also what runs wherever no hand-written kernel applies.

Terminology:
  codes  small integers that stand for real numbers: real = code * scale.
  M      rows of activations (tokens); N output channels; K input channels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int, Int8, Int32

from pallas_kernels.packing import unpack_int4

LARGEST_CODE = 2**15 - 1
"""Of a code behind a norm or an activation function before it is flattened: what 258 channels of INT8 hold."""


def int8_matmul(
    x: Int8[Array, "*rows k"],
    weight: Int8[Array, "n k"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Array:
    """``x @ weight.T`` in int32, then ``* (x_scale * weight_scale) + bias`` in float32, then a cast."""
    acc = lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return _epilogue(acc, x_scale, weight_scale, bias, out_dtype)


def int4_matmul(
    x: Int8[Array, "*rows k"],
    packed: Int8[Array, "n half"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Array:
    """:func:`int8_matmul` with the weight's codes packed two to a byte (see :mod:`pallas_kernels.packing`)."""
    return int8_matmul(x, unpack_int4(packed), x_scale, weight_scale, bias, out_dtype)


def grouped_int8_matmul(
    x: Int8[Array, "*rows k"],
    weight: Int8[Array, "n k"],
    x_scale: Float32[Array, "..."],
    group_scale: Int[Array, "groups n"] | Float32[Array, "groups n"],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    folded: bool = False,
) -> Array:
    """The products of each group of input channels, times the group's scale, added up over the groups.

    With integer scales all of that is int32, and what follows is as in :func:`int8_matmul`.  With float scales every group's
    product is converted to float32, and the sum is taken in the order of the groups.  ``folded`` promises that every code
    times its scale fits into int8: then they are multiplied first, and the sum, the same one, knows of no groups.
    """
    groups, n = group_scale.shape
    if folded:
        each = jnp.repeat(group_scale.astype(jnp.int8).T, weight.shape[1] // groups, axis=1)
        return int8_matmul(x, weight * each, x_scale, weight_scale, bias, out_dtype)
    rows, size = x.reshape(-1, x.shape[-1]), x.shape[-1] // groups
    exact = jnp.issubdtype(group_scale.dtype, jnp.integer)
    group_scale = group_scale.astype(jnp.int32 if exact else jnp.float32)

    def add(g: Int32[Array, ""], total: Array) -> Array:
        x_part, w_part = (lax.dynamic_slice_in_dim(operand, g * size, size, 1) for operand in (rows, weight))
        product = lax.dot_general(x_part, w_part, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return total + product.astype(total.dtype) * group_scale[g]

    total = lax.fori_loop(0, groups, add, jnp.zeros((len(rows), n), jnp.int32 if exact else jnp.float32))
    return _epilogue(total.reshape(*x.shape[:-1], n), x_scale, weight_scale, bias, out_dtype)


def grouped_int4_matmul(
    x: Int8[Array, "*rows k"],
    packed: Int8[Array, "n half"],
    x_scale: Float32[Array, "..."],
    group_scale: Int[Array, "groups n"] | Float32[Array, "groups n"],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    folded: bool = False,
) -> Array:
    """:func:`grouped_int8_matmul` with the weight's codes packed two to a byte."""
    return grouped_int8_matmul(x, unpack_int4(packed), x_scale, group_scale, weight_scale, bias, out_dtype, folded)


def weight_only_int4_matmul(
    x: Float[Array, "*rows k"],
    packed: Int8[Array, "n half"],
    group_scale: Float32[Array, "groups n"],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Array:
    """Real activations times ``codes * group_scale``, rounded to their dtype; summed in float32, then scaled."""
    each = jnp.repeat(group_scale.T, 2 * packed.shape[1] // len(group_scale), axis=1)
    weight = (unpack_int4(packed) * each).astype(x.dtype)
    total = lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return _epilogue(total, jnp.float32(1), weight_scale, bias, out_dtype)


def together(out: Float32[Array, "*heads parts group dim"], sums: Float32[Array, "*heads parts group"]) -> Array:
    """What attention over some of the positions each has found, put together: (..., group, dim).

    Args:
      out: the weighted means of the values in every part.
      sums: logarithms of the sums of the weights; -inf for a part without positions.
    """
    largest = jnp.max(sums, axis=-2, keepdims=True)
    share = jnp.exp(sums - jnp.where(jnp.isfinite(largest), largest, 0))
    total = jnp.sum(share, axis=-2)[..., None]
    return jnp.sum(jnp.where(share[..., None] > 0, out, 0) * share[..., None], axis=-3) / total


def _epilogue(
    acc: Int32[Array, "*rows n"] | Float32[Array, "*rows n"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None,
    out_dtype: DTypeLike,
) -> Array:
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


def quantize_activations(
    x: Float[Array, "*rows k"],
    multiplier: Float32[Array, " k"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    qmax: int,
) -> Int8[Array, "*rows width"]:
    """Rounds ``x * multiplier`` to integers and flattens the large ones over extra channels.

    Channel j < k of the result is ``clip(c[j], -qmax, qmax)`` with ``c = round(x * multiplier)``.  Channel k + e holds
    what ``source[e]`` has left beyond ``part[e] * qmax``:  ``sign(c) * clip(|c| - part[e] * qmax, 0, qmax)``.

    The two slices are written into one buffer rather than concatenated: XLA turns that into a single kernel, in which each
    element is computed once; in the fusion of a concatenation each is computed for both operands.
    """
    k, extra = x.shape[-1], source.shape[0]
    main = jnp.clip(_codes(x, multiplier), -qmax, qmax).astype(jnp.int8)
    if not extra:
        return main
    c = _codes(jnp.take(x, source, axis=-1), multiplier[source])
    beyond = jnp.clip(jnp.abs(c) - (part * qmax).astype(jnp.float32), 0, qmax)
    start = (0,) * (x.ndim - 1)
    out = jnp.zeros((*x.shape[:-1], k + extra), jnp.int8)
    out = lax.dynamic_update_slice(out, main, (*start, 0))
    return lax.dynamic_update_slice(out, (jnp.sign(c) * beyond).astype(jnp.int8), (*start, k))


def normalized(
    x: Float32[Array, "*rows k"],
    epsilon: float,
    center: bool,
    weight: Float[Array, " k"] | None = None,
    bias: Float[Array, " k"] | None = None,
) -> Float32[Array, "*rows k"]:
    """Rows divided by their root mean square, or, centred, by their standard deviation; times weight, plus bias."""
    if center:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    y = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    if weight is not None:
        y = y * weight.astype(jnp.float32)
    return y if bias is None else y + bias.astype(jnp.float32)


def activated(x: Float[Array, "*rows channels"], activation: str, gated: bool) -> Float[Array, "*rows k"]:
    """An activation function; of the first half alone if gated, which is then multiplied with the second."""
    function = ACTIVATIONS[activation]
    if not gated:
        return function(x)
    gate, up = jnp.split(x, 2, axis=-1)
    return function(gate) * up


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
"""By the name that :func:`pallas_kernels.quantize_activated` takes."""


def quantized(
    x: Float32[Array, "*rows k"],
    multiplier: Float32[Array, " k"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    qmax: int,
    per_token: bool,
) -> tuple[Array, ...]:
    """Codes alone, flattened (:func:`quantize_activations`), or codes and scales (:func:`quantize_per_token`)."""
    if per_token:
        return quantize_per_token(x, multiplier, qmax, x.shape[-1] + source.shape[0])
    x = jnp.clip(x * multiplier, -LARGEST_CODE, LARGEST_CODE)
    return (quantize_activations(x, jnp.ones_like(multiplier), source, part, qmax),)


def _codes(x: Float[Array, "*rows k"], multiplier: Float32[Array, " k"]) -> Float32[Array, "*rows k"]:
    """Integer-valued float32, rounded half to even."""
    return jnp.round(x.astype(jnp.float32) * multiplier)


def token_scale(x: Float[Array, "*rows k"], multiplier: Float32[Array, " k"], qmax: int) -> Float32[Array, "*rows"]:
    """One scale a row, so that the largest entry of ``x * multiplier`` becomes ``qmax``; 1e-8 / qmax at least."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32) * multiplier), axis=-1)
    return jnp.maximum(largest, 1e-8) / qmax


def quantize_per_token(
    x: Float[Array, "*rows k"], multiplier: Float32[Array, " k"], qmax: int, width: int
) -> tuple[Int8[Array, "*rows width"], Float32[Array, "*rows"]]:
    """Codes of ``x * multiplier`` with a scale of its own for every row, and those scales."""
    scale = token_scale(x, multiplier, qmax)
    codes = jnp.round(x.astype(jnp.float32) * multiplier / scale[..., None]).astype(jnp.int8)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]
    return jnp.pad(codes, padding), scale


def rotated(
    x: Float[Array, "*batch heads dim"], cos: Float32[Array, "*#batch 1 half"], sin: Float32[Array, "*#batch 1 half"]
) -> Float[Array, "*batch heads dim"]:
    """Pairs of channels, taken from the two halves of a head, turned by an angle (arXiv 2104.09864)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
