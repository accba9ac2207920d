"""Flattening: one large channel becomes several small ones, exactly.

FlattenQuant (arXiv 2402.17985) wants one scale for a whole tensor.  A few channels with large values would make that
scale coarse for all the others, so those channels are cut into pieces no larger than a threshold T, and each piece
becomes a channel of its own.

**The split.**  For ``v`` with ``|v| <= n T``,

    part_a(v) = sign(v) * clip(|v| - a T, 0, T),    a = 0 .. n-1,        sum_a part_a(v) = v.

The first pieces are full (equal to T), the next holds the remainder, the rest are 0: a small ``v`` lives entirely in
piece 0.  A product of two split numbers is the sum over all pairs of pieces,

    x w = sum_a sum_b part_a(x) part_b(w),

so input channel i, cut into ``nx[i]`` pieces on the activations' side and ``nw[i]`` on the weights', becomes
``nx[i] * nw[i]`` channels, and K' = sum_i nx[i] nw[i].

**On integers.**  With one scale ``d = T / qmax`` the split commutes with rounding: splitting ``c = round(v / d)`` at
multiples of ``qmax`` gives the rounded pieces.  So a tensor can be quantized *before* it is expanded, with codes that
may reach ``n[i] * qmax`` in channel i, and everything that judges accuracy works on the unexpanded tensor.  Only the
integer matmul needs the expansion.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Int16, Int32

MAX_PIECES = 16
"""Most pieces that one channel of one operand is cut into; the threshold is raised where more would be needed."""


PADDING = 1 << 20
"""The piece that padding channels hold: beyond any code, so that they are 0."""


class Channels(NamedTuple):
    """The order of the K' channels of a flattened layer: the K original ones, then extra ones, then padding.

    Attributes:
      inputs: K.
      source: original channel that each of the E further ones continues, int32 (E,).
      x_part: which piece of the activation it holds, int32 (E,).
      w_part: which piece of the weight it holds, int32 (E,).
      used: how many of the E hold something; the rest is padding, for which both parts are :data:`PADDING`.

    Original channel i is the pair of pieces (0, 0); its other pairs are extra channels.
    """

    inputs: int
    source: np.ndarray
    x_part: np.ndarray
    w_part: np.ndarray
    used: int

    @property
    def width(self) -> int:
        """K', padding included."""
        return self.inputs + len(self.source)


def piece(codes: Int32[Array, "*shape"], part: Int[Array, "..."] | int, qmax: int) -> Int32[Array, "*shape"]:
    """Piece ``part`` of every integer code: ``sign(c) * clip(|c| - part * qmax, 0, qmax)``."""
    return jnp.sign(codes) * jnp.clip(jnp.abs(codes) - part * qmax, 0, qmax)


def count_pieces(channel_max: Float[Array, " k"], threshold: Float[Array, ""] | float, qmax: int) -> Int32[Array, " k"]:
    """How many pieces of size ``threshold`` each channel needs once it is rounded: ``max(1, ceil(code / qmax))``.

    Counting codes rather than real values spares the pieces that would round to nothing: in INT4, a channel may pass the
    threshold by a fourteenth before it needs a second one.
    """
    codes = jnp.round(channel_max / threshold * qmax)
    return jnp.maximum(1, jnp.ceil(codes / qmax)).astype(jnp.int32)


def lay_out(
    x_pieces: Int[Array, " k"] | Int[np.ndarray, " k"] | None,
    w_pieces: Int[Array, " k"] | Int[np.ndarray, " k"] | None,
    inputs: int,
    multiple: int,
) -> Channels:
    """List the extra channels, by original channel, then activation piece, then weight piece, and pad K'.

    Args:
      x_pieces, w_pieces: pieces of every channel of the activations and of the weight; None for one each.
      inputs: K.
      multiple: that K' is padded to.
    """
    x_pieces, w_pieces = (np.ones(inputs, np.int64) if p is None else np.asarray(p) for p in (x_pieces, w_pieces))
    source = np.repeat(np.arange(inputs), x_pieces * w_pieces - 1)
    # Number the pairs of each channel 1, 2, ... (pair 0 is the original channel), then read them as (a, b).
    first = np.concatenate([[0], np.cumsum(x_pieces * w_pieces - 1)])[:-1]
    pair = np.arange(len(source)) - first[source] + 1
    x_part, w_part = np.divmod(pair, w_pieces[source])
    channels = inputs + len(source)
    padding = rounded_up(channels, multiple) - channels

    def pad(values: np.ndarray, value: int) -> np.ndarray:
        return np.pad(values, (0, padding), constant_values=value).astype(np.int32)

    return Channels(inputs, pad(source, 0), pad(x_part, PADDING), pad(w_part, PADDING), len(source))


def flatten_codes(
    codes: Int[Array, "n k"], source: Int32[Array, " e"], part: Int32[Array, " e"], qmax: int
) -> Int8[Array, "n width"]:
    """Writes wide codes as K + E channels of codes in [-qmax, qmax]: the original ones, then the extra ones."""
    codes = codes.astype(jnp.int32)
    return jnp.concatenate([piece(codes, 0, qmax), piece(codes[:, source], part, qmax)], axis=1).astype(jnp.int8)


def gather_codes(
    codes: Int8[Array, "n width"], source: Int32[Array, " e"], part: Int32[Array, " e"]
) -> tuple[Int16[Array, "n k"], Int32[Array, " k"]]:
    """Undo flattening.

    Args:
      codes: of a weight, over K' channels.
      source, part: of the extra channels, as :class:`fqjax.core.stored_inputs.StoredInput` has them.

    Returns:
      The weight's codes on the K original channels, and the pieces that each channel of the activations has.
    """
    k = codes.shape[1] - source.shape[0]
    real = part != PADDING
    # Of the pairs (a, b) of an activation's and a weight's pieces, those with a = 0 hold every b once.
    extra = jnp.where(real & (part == 0), codes[:, k:].astype(jnp.int16), 0)
    whole = codes[:, :k].astype(jnp.int16).at[:, source].add(extra)
    return whole, jnp.ones(k, jnp.int32).at[source].max(jnp.where(real, part + 1, 1))


def rounded_up(channels: int, multiple: int) -> int:
    """The smallest multiple of a number that is no less than ``channels``."""
    return math.ceil(channels / multiple) * multiple
