"""Integer Scale: group scales that are integers, so that a grouped matmul stays in int32 from end to end (arXiv 2405.14597).

A weight with a scale for every output channel n and every group g of input channels is ``q * s[g, n]``.  Multiplied by an
amplifier a and rounded, the scales become integers,

    S[g, n] = max(1, round(a * s[g, n] / u[n])),     y[n] = x_scale * u[n] / a * sum_g S[g, n] * (x_g . q_g[n]),

and the sum over all groups can be kept in int32: one conversion to floating point an output instead of one a group.  S is
never 0, which would delete the group.

In the paper u is 1, and how exact S is depends on how large the weights are: those of small models, with scales near 0.007,
get integers near 7 from an amplifier of 1024, an error of 4 % in the scale.  Here u[n] is the largest scale of the output
channel: that costs nothing, since the sum is multiplied with a float scale anyway, and uses all of the amplifier.  It is then
the accumulator that sets the limit (:func:`safe_amplifier`).

**Folded.**  Where every code times its scale fits into int8, the scale can be multiplied into the code as it is unpacked, and
the matmul does not know of groups any more.  With codes of 4 bits that takes scales from 1 to 15; what they cannot express is
left to one float scale an output channel (:func:`fold_scales`), and the codes are rounded anew on the coarser grid.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int, Int8, Int32

from fqjax.core.overflow import LIMIT

AMPLIFIER = 1024
LEAST_AMPLIFIED_SCALE = 4
"""Lower bound of the largest integer scale of an output channel: with less, rounding the scales costs more than INT4 does."""
LARGEST_FOLDED = 15
"""Of a scale that is folded: 15 times -8 fits into int8."""
FOLDED_SCALE_FRACTIONS = tuple(1 - i / 20 for i in range(8))
"""Candidates of :func:`fold_scales` for the largest scale of a channel, relative to it."""


def amplify(scales: Float32[Array, "groups n"], amplifier: int) -> Int32[Array, "groups n"]:
    """``max(1, round(amplifier * scales))``."""
    return jnp.maximum(jnp.round(scales * amplifier), 1).astype(jnp.int32)


def narrow(scales: Int32[Array, "groups n"]) -> Int[Array, "groups n"]:
    """The same integers in int16 if all fit, so that a matmul reads half the bytes of them; not under ``jax.jit``."""
    return scales.astype(jnp.int16) if int(scales.max()) <= jnp.iinfo(jnp.int16).max else scales


def group_sums(codes: Int8[Array, "n k"], group_size: int) -> Int32[Array, "groups n"]:
    """Sum of the magnitudes of the codes in each group of input channels."""
    n, k = codes.shape
    return jnp.sum(jnp.abs(codes.astype(jnp.int32)).reshape(n, k // group_size, group_size), axis=-1).T


def channel_units(scales: Float32[Array, "groups n"]) -> Float32[Array, " n"]:
    """U above: the largest scale of every output channel."""
    return jnp.max(scales, axis=0)


def scaled_bound(
    sums: Int[np.ndarray, "groups n"], scales: Int[np.ndarray, "groups n"], x_qmax: int, bits: int = 8
) -> int:
    """Largest magnitude the int32 accumulator can reach for any activations, and any partial sum on the way.

    A kernel may leave a code of 4 bits in the upper half of its byte, where it counts 16 times, so bits = 4 makes the bound
    16 times larger.

    Args:
      sums: :func:`group_sums`.
      scales: integer scales.
      x_qmax: largest activation code.
      bits: of the weight's codes.
    """
    columns = np.sum(np.asarray(sums, np.int64) * np.asarray(scales, np.int64), axis=0)
    return int(columns.max(initial=0)) * x_qmax * (16 if bits == 4 else 1)


def safe_amplifier(
    scales: Float32[Array, "groups n"],
    sums: Int32[Array, "groups n"],
    *,
    x_qmax: int,
    bits: int,
    most: int = AMPLIFIER,
) -> int | None:
    """The largest power of two, at most ``most``, with which the accumulator cannot overflow.

    A smaller one than ``most`` is taken only as long as the largest scale of every output channel becomes
    :data:`LEAST_AMPLIFIED_SCALE` at least, groups without codes left out.

    Args:
      scales: float scales, divided by their units.
      sums: :func:`group_sums` of the codes.
      x_qmax: largest activation code.
      bits: of the weight's codes.
      most: largest amplifier considered, a power of two.

    Returns:
      The amplifier; None if there is none, and the layer has to keep its float scales.
    """
    host = np.asarray(sums)
    largest = np.max(np.asarray(scales), axis=0, initial=0, where=host > 0)  # 0 in channels without codes.
    smallest = np.min(largest, initial=np.inf, where=largest > 0)
    amplifier = most
    while True:
        if scaled_bound(host, np.asarray(amplify(scales, amplifier)), x_qmax, bits) <= LIMIT:
            return amplifier
        amplifier //= 2
        if amplifier * smallest < LEAST_AMPLIFIED_SCALE:
            return None


def round_on_integer_grid(
    weight: Float32[Array, "n k"], scales: Int32[Array, "groups n"], unit: Float32[Array, "..."]
) -> Int8[Array, "n k"]:
    """4-bit codes, rounded anew for integer scales: ``clip(round(weight / (scales * unit)), -8, 7)``.

    ``unit`` is 1 / amplifier, or the channel scales, (N,), of :func:`fold_scales`.
    """
    n, k = weight.shape
    step = (scales * unit).T
    codes = jnp.round(weight.reshape(n, len(scales), -1) / step[:, :, None])
    return jnp.clip(codes, -8, 7).astype(jnp.int8).reshape(n, k)


def fold_scales(
    weight: Float32[Array, "n k"], scales: Float32[Array, "groups n"], importance: Float32[Array, " k"]
) -> tuple[Int32[Array, "groups n"], Float32[Array, " n"]]:
    """Splits float scales into integers from 1 to 15 and a float scale an output channel.

    For each channel, of several units the one is taken with which the weight, rounded anew, comes closest.

    Args:
      weight: (N, K).
      scales: (K / group_size, N).
      importance: mean square of every input channel, (K,); errors are weighted with it.

    Returns:
      Integer scales and channel scales.
    """
    n, groups = weight.shape[0], len(scales)
    largest = jnp.max(scales, axis=0) / LARGEST_FOLDED

    def split(shrink: Array) -> tuple[Array, Array, Array]:
        unit = largest * shrink
        integers = jnp.clip(jnp.round(scales / unit), 1, LARGEST_FOLDED).astype(jnp.int32)
        codes = round_on_integer_grid(weight, integers, unit)
        represented = codes.reshape(n, groups, -1) * (integers * unit).T[:, :, None]
        return jnp.sum((represented.reshape(weight.shape) - weight) ** 2 * importance, axis=1), integers, unit

    errors, integers, units = lax.map(split, jnp.asarray(FOLDED_SCALE_FRACTIONS))
    best = jnp.argmin(errors, axis=0)
    return jnp.take_along_axis(integers, best[None, None], axis=0)[0], jnp.take_along_axis(units, best[None], axis=0)[0]
