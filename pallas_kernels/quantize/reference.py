"""The quantization of activations, written in jax.numpy.

These functions define the result; they are also what runs wherever no hand-written kernel applies.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32

from pallas_kernels.mosaic.math import WIDE_CODE_LIMIT


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
    x = jnp.clip(x * multiplier, -WIDE_CODE_LIMIT, WIDE_CODE_LIMIT)
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
