"""Layers that take note of what passes them, also where only some rows of their input count."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Float32

SHARED_ATTRIBUTES = ("bias", "dtype", "in_features", "out_features", "param_dtype")
"""Attributes of a linear layer that a quantized one has too."""


class NoSuchLayer(AttributeError):
    """A model reads something of a linear layer that a quantized layer has no counterpart of.

    Attributes:
      path: dotted path of the layer in the block, as its stand-in was told.
    """

    def __init__(self, path: str, name: str):
        super().__init__(
            f"the model reads its {name!r}, which a quantized layer does not have; expected that it is ignored"
        )
        self.path = path


class StandIn(nnx.Module):
    """Stands in for a linear layer.  What of it a quantized layer has too can be read here, and nothing else.

    Attributes:
      linear: the layer.
      path: its dotted path in the block, for messages.
    """

    path: str = ""

    def __getattr__(self, name: str) -> Any:
        linear = vars(self).get("linear")
        if name in SHARED_ATTRIBUTES and linear is not None:
            return getattr(linear, name)
        if name in vars(linear or self):
            raise NoSuchLayer(self.path, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class Watcher(StandIn):
    """Stands in for a layer, computes what it computes, and takes note of its input.

    It is called as the layer is, or by :func:`watched` with ``shares``, the weight of every row, besides.
    """


def watched(
    layer: Callable[..., Array], x: Float[Array, "rows k"], shares: Float32[Array, " rows"] | None
) -> Float[Array, "rows n"]:
    """Calls a layer; one that watches is told how much every row of its input counts, 0 for one that does not.

    A model that computes some layer for more rows than it uses, as a mixture of experts may, calls the layer by this
    function; then calibration goes by the rows that are used.
    """
    is_told = isinstance(layer, Watcher) and shares is not None
    return layer(x, shares=shares) if is_told else layer(x)


def is_watched(module: nnx.Module) -> bool:
    """Whether something in a module is watched."""
    return any(isinstance(node, Watcher) for _, node in nnx.iter_graph(module))
