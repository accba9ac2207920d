"""Layers that take note of what passes them, also where only some rows of their input count."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float, Float32


class Watcher(nnx.Module):
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
