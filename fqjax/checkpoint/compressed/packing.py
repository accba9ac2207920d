"""Codes of 4 or 8 bits in int32 words, as the format "pack-quantized" has them.

Along the input axis, a word holds 32 / bits neighbouring codes, the first in its lowest bits, each with 2**(bits-1) added so
that none is negative.  A row that does not fill its last word ends in zero bits.
"""

import numpy as np
from jaxtyping import Int8, Int32


def pack_int32(codes: Int8[np.ndarray, "n k"], bits: int) -> Int32[np.ndarray, "n words"]:
    """Packs codes into ceil(k * bits / 32) words a row.

    Args:
      codes: values in [-2**(bits-1), 2**(bits-1) - 1].
      bits: 4 or 8.
    """
    shifted = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    padded = np.pad(shifted, ((0, 0), (0, -codes.shape[1] % (32 // bits))))
    whole = padded if bits == 8 else padded[:, 0::2] | padded[:, 1::2] << 4
    return np.ascontiguousarray(whole).view("<i4").astype(np.int32)


def unpack_int32(words: Int32[np.ndarray, "n words"], bits: int, k: int) -> Int8[np.ndarray, "n k"]:
    """Undoes :func:`pack_int32`; ``k`` is how many codes a row has."""
    whole = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    shifted = whole if bits == 8 else np.stack([whole & 15, whole >> 4], axis=-1).reshape(len(words), -1)
    return (shifted[:, :k].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
