"""Two 4-bit codes in one byte, in the order the kernels unpack them.

Along the input axis, codes are taken in blocks of 256.  Byte k of a block (k = 0 .. 127) holds code k in its low nibble
and code k + 128 in its high nibble:

    block of 256 codes    c0 c1 ... c127 | c128 c129 ... c255
    block of 128 bytes    (c128 c0) (c129 c1) ... (c255 c127)         (high, low)

One 128-byte row of shared memory therefore unpacks into two runs of 128 consecutive codes, each of which is a whole
operand tile of the tensor cores; no code changes its lane.  Nothing outside this file knows the order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8

BLOCK_CODES = 256
"""Codes in one packed block; the input axis of a packed tensor is a multiple of it."""


def pack_int4(codes: Int8[Array, "*rows k"]) -> Int8[Array, "*rows half"]:
    """Packs 4-bit codes, two to a byte.

    Args:
      codes: int8 values in [-8, 7], shape (..., k) with k a multiple of 256.

    Returns:
      int8 bytes of shape (..., k / 2), in the order that the module's documentation shows.

    Raises:
      ValueError: if k is not a multiple of 256.
    """
    *rows, k = codes.shape
    if k % BLOCK_CODES:
        raise ValueError(f"pack_int4: the last axis must be a multiple of {BLOCK_CODES}, got shape {codes.shape}")
    halves = codes.reshape(*rows, k // BLOCK_CODES, 2, BLOCK_CODES // 2)
    low = jnp.bitwise_and(halves[..., 0, :], jnp.int8(15))
    high = jax.lax.shift_left(halves[..., 1, :], jnp.int8(4))
    return jnp.bitwise_or(low, high).reshape(*rows, k // 2)


def unpack_int4(packed: Int8[Array, "*rows half"]) -> Int8[Array, "*rows k"]:
    """Undoes :func:`pack_int4`: bytes of shape (..., k / 2) to sign-extended int8 codes of shape (..., k).

    Raises:
      ValueError: if the last axis is not a multiple of 128.
    """
    *rows, half = packed.shape
    if half % (BLOCK_CODES // 2):
        raise ValueError(
            f"unpack_int4: the last axis must be a multiple of {BLOCK_CODES // 2}, got shape {packed.shape}"
        )
    blocks = packed.reshape(*rows, half // (BLOCK_CODES // 2), 1, BLOCK_CODES // 2)
    four = jnp.int8(4)
    low = jax.lax.shift_right_arithmetic(jax.lax.shift_left(blocks, four), four)
    high = jax.lax.shift_right_arithmetic(blocks, four)
    return jnp.concatenate([low, high], axis=-2).reshape(*rows, 2 * half)
