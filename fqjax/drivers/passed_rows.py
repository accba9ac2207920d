"""Every row of the layers' inputs in one run of a block, however often it calls a layer, in a loop of Flax's too.

The rows of all calls stand one after the other in an array that is there before the block runs, as the state of a loop has to
keep its shape.  So the rows are counted first, by a run of which nothing else is wanted: where no loop decides how often a
layer is called, the count is known when that run is compiled, and nothing is left to compute.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from fqjax.drivers.flow import Activations, Others
from fqjax.layers.simulated import Simulated
from fqjax.layers.surgery import dotted, replace_modules
from fqjax.layers.taps import Watcher
from fqjax.runtime.compiling import jit

UNROUTED_ROW_WEIGHT = 1e-3
"""How much a row counts that is not sent to an expert, next to one of which nothing else is used: what an expert that
calibration never or hardly reached is rounded by."""


class Passed(NamedTuple):
    """The rows of a layer's input.

    Attributes:
      rows: of all calls, one after the other, then zeros.
      weights: how much each row counts, how much of the layer's output is used, squared; 0 where there is no row.
      number: how many rows there are.
    """

    rows: Float32[Array, "rows k"]
    weights: Float32[Array, " rows"]
    number: Int32[Array, ""]


class _Kept(nnx.Variable):
    """What passed a layer."""


class _Tap(Watcher):
    """Computes what its layer computes, and keeps the rows of its input, or counts them alone where there is no room."""

    def __init__(self, layer: Callable[..., Array], k: int):
        self.linear = layer
        self.rows, self.weights = _Kept(jnp.zeros((0, k))), _Kept(jnp.zeros(0))
        self.count = _Kept(jnp.zeros((), jnp.int32))

    def make_room(self, rows: int) -> None:
        self.rows.set_value(jnp.zeros((rows, self.rows.get_value().shape[1])))
        self.weights.set_value(jnp.zeros(rows))

    def __call__(
        self, x: Float[Array, "... k"], *args: object, shares: Float32[Array, " rows"] | None = None, **kwargs: object
    ) -> Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if len(self.weights.get_value()):
            weights = jnp.ones(len(rows)) if shares is None else jnp.maximum(shares**2, UNROUTED_ROW_WEIGHT)
            start = self.count[...]
            # nnx Variables are written through [...].
            self.rows[...] = lax.dynamic_update_slice(self.rows[...], rows, (start, jnp.zeros_like(start)))
            self.weights[...] = lax.dynamic_update_slice(self.weights[...], weights, (start,))
        self.count[...] = self.count[...] + len(rows)
        return self.linear(x, *args, **kwargs)


Split = tuple[nnx.GraphDef, nnx.State]
"""A block with taps, as ``nnx.split`` gives it."""


def tapped(block: nnx.Module, layers: Mapping[str, nnx.Linear] | Mapping[str, Simulated]) -> Split:
    """A block that keeps the rows which pass some layers.

    Args:
      block: of a model.
      layers: what stands in the place of its linear layers, by dotted path in the block.
    """
    return nnx.split(replace_modules(block, {path: _Tap(layer, layer.in_features) for path, layer in layers.items()}))


@functools.partial(jit, static_argnums=(0, 1))
def count_rows(
    call: Callable[..., Activations], graphdef: nnx.GraphDef, state: nnx.State, x: Activations, others: Others
) -> dict[str, Int32[Array, ""]]:
    """How many rows pass every layer of a block that is :func:`tapped`, by dotted path."""
    block = nnx.merge(graphdef, state)
    call(block, x, others)
    return {path: tap.count.get_value() for path, tap in _taps(block).items()}


def take_rows(
    call: Callable[..., Activations],
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: Activations,
    others: Others,
    room: Mapping[str, int],
) -> dict[str, Passed]:
    """The rows that pass every layer of a block that is :func:`tapped`, by dotted path; to be jitted.

    Args:
      call: runs the block.
      graphdef, state: of the block.
      x, others: what the block is called with.
      room: for how many rows there is to be room, at least as many as pass.
    """
    block = nnx.merge(graphdef, state)
    for path, tap in _taps(block).items():
        tap.make_room(room[path])
    call(block, x, others)
    taps = _taps(block)
    return {path: Passed(tap.rows[...], tap.weights[...], tap.count[...]) for path, tap in taps.items()}


def _taps(block: nnx.Module) -> dict[str, _Tap]:
    return {dotted(path): node for path, node in nnx.iter_graph(block) if isinstance(node, _Tap)}
