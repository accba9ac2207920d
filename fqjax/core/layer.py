"""What a method is told of a layer."""

import dataclasses

import jax
from jaxtyping import Array, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """A linear layer, and what calibration saw of its input.

    Attributes:
      weight: (N, K), output channels first.
      x_max: largest magnitude of every input channel, (K,).
      samples: some rows of the input, (S, K).
    """

    weight: Float32[Array, "n k"]
    x_max: Float32[Array, " k"]
    samples: Float32[Array, "s k"]
