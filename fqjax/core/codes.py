"""Symmetric integer codes: ``real = code * scale``, rounded half to even, no zero point.

A b-bit code lies in [-qmax, qmax] with ``qmax = 2**(b-1) - 1``: 127 for 8 bits, 7 for 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int16


def qmax(bits: int) -> int:
    """Largest code of a symmetric signed integer of that many bits."""
    return 2 ** (bits - 1) - 1


NO_CODE = -(2**15)
"""Stands for NaN among codes, which reach 16 * 127 at most; a layer that has it cannot be assembled."""


def nearest_codes(
    values: Float[Array, "*shape"], lowest: int | Int[Array, "..."], largest: int | Int[Array, "..."]
) -> Int16[Array, "*shape"]:
    """Round values to codes in a range, half to even; NaN becomes :data:`NO_CODE`."""
    codes = jnp.clip(jnp.round(values), lowest, largest)
    return jnp.where(jnp.isnan(codes), NO_CODE, codes).astype(jnp.int16)


def absmax_scale(largest: Float[Array, "*shape"], bits: int) -> Float32[Array, "*shape"]:
    """The scale that maps ``largest`` to the largest code; 1 where ``largest`` is 0, so that dividing is safe."""
    largest = largest.astype(jnp.float32)
    return jnp.where(largest > 0, largest, 1.0 * qmax(bits)) / qmax(bits)


def steps(
    scale: Float32[Array, "..."],
    group_scale: Float32[Array, "groups n"] | Int[Array, "groups n"] | None,
    group_size: int,
) -> Float32[Array, "..."]:
    """The factor of each code of a weight, so shaped that it multiplies an array (N, groups * group_size).

    Args:
      scale: a scalar, or one for every output channel, (N,).
      group_scale: what it is multiplied with in each group of input channels; None without groups.
      group_size: channels of a group.
    """
    scale = scale[:, None] if scale.ndim else scale
    if group_scale is None:
        return scale
    return scale * jnp.repeat(group_scale.T.astype(jnp.float32), group_size, axis=1)
