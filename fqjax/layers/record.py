"""Figures measured of a quantized layer, beside the layer, not part of its type.

They are state, of a kind that nothing computes with: two layers of equal shapes and formats are one program to JAX whatever
their errors are.  A checkpoint has them in its manifest, not among its arrays.
"""

import dataclasses
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

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
    """The model as ``nnx.split`` gives it, with records that hold nothing, so that a call passes fewer arrays."""
    graphdef, records, rest = nnx.split(model, Record, ...)
    empty = jax.tree.map(lambda record: record.replace(None), records, is_leaf=lambda node: isinstance(node, Record))
    return graphdef, nnx.merge_state(empty, rest)


def shape_of(leaf: jax.Array | jax.ShapeDtypeStruct | np.ndarray) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
