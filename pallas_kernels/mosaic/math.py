"""Arithmetic on codes that can be written in what Pallas' GPU backends know; the kernels of all packages share it."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

WIDE_CODE_LIMIT = 2**15 - 1
"""Largest code after a norm or an activation function before it is flattened: what 258 channels of INT8 hold."""


def runs(channels: int) -> list[tuple[int, int]]:
    """(start, size) of runs that are powers of two and together the channels, the largest first."""
    runs, start = [], 0
    for bit in reversed(range(channels.bit_length())):
        if channels >> bit & 1:
            runs.append((start, 1 << bit))
            start += 1 << bit
    return runs


def rounded(y: Array, limit: int, interpret: bool) -> Array:
    """Integers in float32, half to even, at most ``limit``."""
    y = jnp.minimum(jnp.maximum(y, float(-limit)), float(limit))
    if interpret:
        return jnp.round(y)
    shift = 1.5 * 2**23  # From here on floats are one apart.  Triton knows no rounding, and leaves such sums alone.
    return (y + shift) - shift


def held_before(part: Array, qmax: int) -> Array:
    """The magnitude that the channels before extra ones hold, float32, from their parts."""
    return jnp.minimum(part, WIDE_CODE_LIMIT).astype(jnp.float32) * qmax


def code_beyond(y: Array, before: Array, qmax: int, interpret: bool) -> Array:
    """Codes of extra channels: the rest of ``y`` beyond ``before``, which the channels before them hold."""
    c = rounded(y, WIDE_CODE_LIMIT, interpret)
    beyond = jnp.minimum(jnp.maximum(jnp.abs(c) - before, 0.0), float(qmax))
    return jnp.where(c < 0, -beyond, beyond).astype(jnp.int8)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "relu": lambda x: jnp.maximum(x, 0.0),
}
"""The activation functions that can be written in what Triton knows, by name."""
