"""Applies :mod:`fqjax.core.transforms.equalizing` to a model that says where it can be applied."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqjax.core.transforms.equalizing import equalizing_factors
from fqjax.layers.surgery import find_linears
from fqjax.models.sites import Rows, Site, sites_of

ModelT = TypeVar("ModelT", bound=nnx.Module)


def equalize(model: ModelT) -> ModelT:
    """Returns the same function with output channels of similar range, where the model's sites say that they scale through.

    A model without a method ``sites()`` (:mod:`fqjax.models.sites`) is returned as it is.
    """
    sites = [site for site in sites_of(model) if isinstance(site.producer, Rows)]
    if not sites:
        return model
    copy = nnx.clone(model)
    rescale(find_linears(copy), sites)
    return copy


def rescale(linears: Mapping[str, nnx.Linear], sites: Iterable[Site]) -> None:
    """Rescales layers in place, at those sites whose producer's channels scale through.

    Args:
      linears: by dotted path; those of the sites are among them.
      sites: of one model or block.
    """
    for site in sites:
        if not isinstance(site.producer, Rows):
            continue
        producer, rows = linears[site.producer.path], site.producer.rows
        free = np.zeros(producer.out_features, bool)
        free[rows] = True
        factors = equalizing_factors(producer.kernel[...].T, jnp.asarray(free))
        producer.kernel[...] = (producer.kernel[...] / factors).astype(producer.kernel[...].dtype)
        if producer.bias is not None:
            producer.bias[...] = (producer.bias[...] / factors).astype(producer.bias[...].dtype)
        for consumer in (linears[name] for name in site.consumers):
            scaled = consumer.kernel[...] * factors[rows][:, None]
            consumer.kernel[...] = scaled.astype(consumer.kernel[...].dtype)
