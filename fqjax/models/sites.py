"""Sites: the places in a model where linear layers read something, and who makes what they read.

The table that a model gives of itself, :meth:`sites`, is all that a change of the whole model has to know of its
architecture: what may be rescaled or folded where, and which layers share an input.

    site           consumers                          producer
    before         qkv_proj                           Norm: its weight can take up a factor of every channel
    after          o_proj, by heads                   Rows: reads values, channel by channel through attention
    before         gate_up_proj, the router           Norm
    after          down_proj                          Rows: reads up, through its product with the gate
    anywhere       a layer after softmax, GELU ...    None: nothing can take up a change
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from flax import nnx

from fqjax.layers.experts import MixtureOfExperts
from fqjax.layers.surgery import dotted, find_linears


class Norm(NamedTuple):
    """A norm with a weight, whose output nobody reads but the site's consumers.

    Attributes:
      path: dotted, of the module.
    """

    path: str


class Rows(NamedTuple):
    """A linear layer whose output channels reach the consumers through what commutes with scaling a channel.

    Nobody else reads these channels.

    Attributes:
      path: dotted, of the layer.
      rows: for each input channel of a consumer, the output channel that it reads, int (K,).
    """

    path: str
    rows: np.ndarray


class Stream(NamedTuple):
    """The residual stream, which others read too."""


class Heads(NamedTuple):
    """Heads of the attention between a producer and its consumers.

    Attributes:
      query: number of query heads, into which a consumer's input channels divide.
      key_value: number of heads of keys and values.
      dim: channels of a head.
    """

    query: int
    key_value: int
    dim: int


class Site(NamedTuple):
    """A place where linear layers read something.

    Attributes:
      consumers: dotted paths of all linear layers that read it, those that are never quantized too.
      producer: who makes it; None if nothing can take up a change of it.
      heads: of the attention that it comes from; None for another site.
    """

    consumers: tuple[str, ...]
    producer: Norm | Rows | Stream | None = None
    heads: Heads | None = None

    def below(self, prefix: str) -> "Site":
        """The site with paths in the module at a dotted path, where all of it lies, in place of those in the model."""
        producer = self.producer
        if isinstance(producer, Norm | Rows):
            producer = producer._replace(path=producer.path.removeprefix(prefix))
        return self._replace(consumers=tuple(name.removeprefix(prefix) for name in self.consumers), producer=producer)


def sites_of(model: nnx.Module) -> list[Site]:
    """The sites of a model: those that its method ``sites()`` gives, or one for every linear layer.

    Of a model without that method no more is known than that experts of a mixture read the same.
    """
    if hasattr(model, "sites"):
        return list(model.sites())  # pyright: ignore[reportAttributeAccessIssue]
    shared = list(_of_mixtures(model))
    known = {name for site in shared for name in site.consumers}
    return shared + [Site((name,)) for name in find_linears(model) if name not in known]


def _of_mixtures(model: nnx.Module) -> Iterator[Site]:
    linears = find_linears(model)
    for path, node in nnx.iter_graph(model):
        if isinstance(node, MixtureOfExperts):
            prefix = ".".join(filter(None, (dotted(path), "experts.")))
            for leaf in node.shared_inputs:
                readers = [name for name in linears if name.startswith(prefix) and name.endswith(f".{leaf}")]
                if readers:
                    yield Site(tuple(readers))


def reading_alike(sites: Iterable[Site], names: Iterable[str]) -> list[tuple[str, ...]]:
    """Some layers, those that read at the same site together, in the order of the first of each."""
    place = {name: i for i, site in enumerate(sites) for name in site.consumers}
    found: dict[int | str, list[str]] = {}
    for name in names:
        found.setdefault(place.get(name, name), []).append(name)
    return [tuple(some) for some in found.values()]
