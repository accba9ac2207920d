"""Input channels of which a calibration sample says too little: those that are zero in all of its rows, or in nearly all.

A ReLU leaves channels silent that other inputs use.  Their statistics are no knowledge: a largest value of 0, or of what two
rows happened to hold, would give them a smoothing factor, a threshold and a scale as if nothing else ever came.  Such a
channel is taken for one like the others instead: its statistics are raised to the upper quartile of the channels known.
Channels that are hardly ever exactly zero, as those after a norm or a gate, are known whatever they hold.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

KNOWN_SHARE = 1 / 64
"""Share of the sampled rows in which a channel is not zero, from which on it is known; one row at least."""
TYPICAL_QUANTILE = 0.75
"""Quantile of the known channels' statistics that stands for one that is not known."""


def known_channels(samples: Float32[Array, "s k"]) -> Bool[Array, " k"]:
    """Whether each channel is excited by enough of the rows for its range to be known."""
    return jnp.sum(samples != 0, axis=0) >= max(1, int(len(samples) * KNOWN_SHARE))


def with_typical(values: Float32[Array, " k"], known: Bool[Array, " k"]) -> Float32[Array, " k"]:
    """Magnitudes of channels, those that are not known raised to what is typical of the others; 1 where none is known."""
    typical = jnp.nanquantile(jnp.where(known, values, jnp.nan), TYPICAL_QUANTILE)
    typical = jnp.where(jnp.any(known), typical, 1.0)
    return jnp.where(known, values, jnp.maximum(values, typical))
