"""The first pass where there is no calibration data: nothing runs, and all channels are taken to be alike."""

from collections.abc import Iterable, Iterator

import numpy as np
from flax import nnx

from fqjax.core.formats.grouped import LARGEST_GROUP
from fqjax.drivers.base import BlockRun
from fqjax.drivers.calibrate import Calibrate
from fqjax.drivers.flow import Activations
from fqjax.drivers.statistics import Statistics
from fqjax.layers.experts import MixtureOfExperts
from fqjax.layers.surgery import dotted

TOKENS = 1 << 20
"""Rows that are taken to have passed; experts of one mixture get equal shares of them."""


class Assume(Calibrate):
    """Options of every layer for channels of equal magnitude, independent of each other; keeps what calibration keeps."""

    name, title, inputs = "assumed", "looking at weights", "none"

    def block(self, block: BlockRun, inputs: Iterable[Activations]) -> Iterator[Activations]:
        shares = expert_shares(block.module)
        seen = {}
        for short, name in block.names.items():
            share = next((share for start, share in shares.items() if short.startswith(start)), 1.0)
            seen[name] = statistics_of_nothing(block.linears[short].in_features, share)
        self.keep(block, seen)
        return iter(())


def expert_shares(block: nnx.Module) -> dict[str, float]:
    """The share of the tokens that each expert of a mixture gets on average, by how the paths of their layers begin."""
    return {
        dotted((*path, "experts", "")): node.k / len(node.experts)
        for path, node in nnx.iter_graph(block)
        if isinstance(node, MixtureOfExperts)
    }


def statistics_of_nothing(channels: int, share: float) -> Statistics:
    """Statistics of an input whose channels have magnitude 1, and second moments in every group as independent ones have.

    Args:
      channels: of the input, K.
      share: of the tokens that reach the layer.
    """
    rows = np.arange(min(channels, LARGEST_GROUP))
    apart = np.arange(channels) % LARGEST_GROUP == rows[:, None]
    # A row has one channel of each group; with signs, no two groups of a weight always add up in the output.
    samples = apart * np.random.default_rng(0).choice([-1.0, 1.0], channels)
    return Statistics(np.ones(channels, np.float32), samples.astype(np.float32), round(share * TOKENS), TOKENS)
