"""Figures measured of a quantized layer, beside the layer, not part of its type.

They are state, of a kind that nothing computes with: two layers of equal shapes and formats are one program to JAX whatever
their errors are.  A checkpoint has them in its manifest, not among its arrays.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, UInt32

LeafT = TypeVar("LeafT")
ModelT = TypeVar("ModelT", bound=nnx.Module)

LARGEST_COUNT = 2**32 - 1


class Record(nnx.Variable):
    """Holds :class:`Figures` as one array (:meth:`Figures.encoded`), so that a model has one leaf more a layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures measured of a layer.

    Attributes:
      relative_error: mean squared error of the layer's output on the calibration sample over the output's mean square,
        float32; 0 where it is not known.
      accumulator_bound: largest magnitude the int32 accumulator can reach, for any activations; 0 if it is a float.
      macs: multiply-accumulates of the unquantized layer for one token; at most 2**32 - 1.
      flattened: extra channels that hold something, padding not counted.
    """

    relative_error: float = 0.0
    accumulator_bound: int = 0
    macs: int = 0
    flattened: int = 0

    def encoded(self) -> UInt32[Array, " 4"]:
        """The figures in one array; the error by its bits as a float32."""
        error = np.float32(self.relative_error).view(np.uint32)
        counts = [min(count, LARGEST_COUNT) for count in (self.accumulator_bound, self.macs, self.flattened)]
        return jnp.asarray(np.asarray([error, *counts], np.uint32))

    @classmethod
    def decoded(cls, array: UInt32[Array, " 4"] | np.ndarray) -> Self:
        """The figures that :meth:`encoded` was made of."""
        error, bound, macs, flattened = np.asarray(array, np.uint32)
        return cls(
            relative_error=float(error.view(np.float32)),
            accumulator_bound=int(bound),
            macs=int(macs),
            flattened=int(flattened),
        )


def abstracted(model: ModelT) -> ModelT:
    """The model with shapes in place of arrays, but for its records."""
    graphdef, records, rest = nnx.split(model, Record, ...)
    return nnx.merge(graphdef, records, jax.tree.map(shape_of, rest))


def split_to_run(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """The model as ``nnx.split`` gives it, with records that hold nothing, so that a call passes fewer arrays.

    Its arrays are on a mesh whose axes XLA shards by itself, also where theirs were explicit.
    """
    graphdef, records, rest = nnx.split(model, Record, ...)
    empty = jax.tree.map(lambda record: record.replace(None), records, is_leaf=lambda node: isinstance(node, Record))
    return graphdef, jax.tree.map(on_auto_axes, nnx.merge_state(empty, rest))


def on_auto_axes(leaf: LeafT) -> LeafT:
    """An array that lies as it did, on the same mesh with automatic axes; as it is if no axis of its mesh is explicit.

    On explicit axes JAX asks every lookup and every matmul which sharding its result is to have, which no model says.
    """
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(leaf, jax.Array) or not isinstance(sharding, NamedSharding):
        return leaf
    mesh = sharding.mesh
    if not isinstance(mesh, Mesh) or AxisType.Explicit not in mesh.axis_types:
        return leaf
    return jax.device_put(leaf, NamedSharding(_automatic(mesh), sharding.spec, memory_kind=sharding.memory_kind))


@contextlib.contextmanager
def automatic_axes() -> Iterator[None]:
    """Where the caller has set a mesh with explicit axes, the same mesh with automatic ones for as long as it lasts."""
    mesh = jax.sharding.get_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.set_mesh(_automatic(mesh)):
        yield


def _automatic(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def shape_of(leaf: jax.Array | jax.ShapeDtypeStruct | np.ndarray) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
