"""Symmetric integer codes: ``real = code * scale``, rounded half to even, no zero point.

A b-bit code lies in [-qmax, qmax] with ``qmax = 2**(b-1) - 1``: 127 for 8 bits, 7 for 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def qmax(bits: int) -> int:
    """Largest code of a symmetric signed integer of that many bits."""
    return 2 ** (bits - 1) - 1


def absmax_scale(largest: Float[Array, "*shape"], bits: int) -> Float32[Array, "*shape"]:
    """The scale that maps ``largest`` to the largest code; 1 where ``largest`` is 0, so that dividing is safe."""
    largest = largest.astype(jnp.float32)
    return jnp.where(largest > 0, largest, 1.0 * qmax(bits)) / qmax(bits)


def round_to_codes(
    values: Float[Array, "*shape"], scale: Float[Array, "..."], limit: int | Int32[Array, "..."]
) -> Int32[Array, "*shape"]:
    """``clip(round(values / scale), -limit, limit)`` as int32.

    ``limit`` may be an array: flattening lets a channel's codes reach several times ``qmax`` (see
    :mod:`fqjax.core.flatten`).
    """
    codes = jnp.round(values.astype(jnp.float32) / scale)
    return jnp.clip(codes, -limit, limit).astype(jnp.int32)
