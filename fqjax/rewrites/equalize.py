"""Applies :mod:`fqjax.core.transforms.equalizing` to a model that says where it can be applied."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqjax.core.transforms.equalizing import equalizing_factors
from fqjax.layers.surgery import find_linears

ModelT = TypeVar("ModelT", bound=nnx.Module)


class ScalingPath(NamedTuple):
    """A pair of linear layers between which channels may be rescaled.

    Attributes:
      producer: dotted path of the layer whose rows are scaled.
      consumer: dotted path of the layer that reads them.
      rows: for each input channel of the consumer, the producer's output channel that it reads, int (K,).
    """

    producer: str
    consumer: str
    rows: np.ndarray


def equalize(model: ModelT) -> ModelT:
    """Returns the same function with output channels of similar range, along the model's ``scaling_paths()``.

    A model without that method is returned as it is.
    """
    if not hasattr(model, "scaling_paths"):
        return model
    copy = nnx.clone(model)
    rescale(find_linears(copy), model.scaling_paths())  # pyright: ignore[reportAttributeAccessIssue]
    return copy


def rescale(linears: Mapping[str, nnx.Linear], paths: Iterable[ScalingPath]) -> None:
    """Rescales layers in place, along some paths between them."""
    for path in paths:
        producer, consumer = linears[path.producer], linears[path.consumer]
        free = np.zeros(producer.out_features, bool)
        free[path.rows] = True
        factors = equalizing_factors(producer.kernel[...].T, jnp.asarray(free))
        producer.kernel[...] = (producer.kernel[...] / factors).astype(producer.kernel[...].dtype)
        if producer.bias is not None:
            producer.bias[...] = (producer.bias[...] / factors).astype(producer.bias[...].dtype)
        scaled = consumer.kernel[...] * factors[path.rows][:, None]
        consumer.kernel[...] = scaled.astype(consumer.kernel[...].dtype)
