"""One table for every stored type: axes, dtypes and invariants of its arrays, declared once at the fields.

A type that lies on the device and in checkpoints (a weight in some format, the quantizer of a layer's input, a transform that
runs before a layer) derives from :class:`Stored` and declares its arrays with :func:`array`,

    codes: Int8[Array, "out stored"] = array("out", "stored")
    scale: Float32[Array, "..."] = array("channel", dtype="float32", positive=True)

All that a checkpoint, a mesh or a report needs to know follows from the table: shapes without arrays
(:meth:`Stored.abstract`), soundness of what was read (:meth:`Stored.is_sound`), partition specs, padding, bytes.  An
axis is a name; its length follows from the sizes of the layer (:class:`Sizes`) and the type's static fields
(:meth:`Stored.axes`), and an axis that those say to be None does not exist.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self, dataclass_transform

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from fqjax.registry import import_all

METADATA_KEY = "array"
"""Key of an array's :class:`ArrayField` in its dataclass field's metadata."""


STORED_GROUPS = ("formats", "transforms", "inputs", "branches", "finishes")
"""Groups of the registry whose modules define stored types."""


_TYPES: dict[str, "type[Stored]"] = {}
"""Stored types by kind."""


class Sizes(NamedTuple):
    """Sizes of a quantized layer.

    Attributes:
      outputs: N, output channels.
      inputs: K, input channels.
      width: K', channels of the integer product: flattened ones and padding counted.
    """

    outputs: int
    inputs: int
    width: int


@dataclasses.dataclass(frozen=True)
class ArrayField:
    """The declaration of one array.

    Attributes:
      axes: names of its axes.
      dtypes: those it may have, by name; the first unless something else is said.
      positive: whether all entries are finite and above 0.
      natural: whether all entries are 0 or above.
      below: name of an axis whose length all entries, indices, are below.
      fill: value of the entries that padding adds.
    """

    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    positive: bool = False
    natural: bool = False
    below: str = ""
    fill: int = 0


def array(
    *axes: str,
    dtype: str | tuple[str, ...] = "int8",
    positive: bool = False,
    natural: bool = False,
    below: str = "",
    fill: int = 0,
) -> Any:
    """Declare an array of a :class:`Stored` type; see :class:`ArrayField` for the arguments."""
    dtypes = (dtype,) if isinstance(dtype, str) else dtype
    declared = ArrayField(axes, dtypes, positive=positive, natural=natural, below=below, fill=fill)
    return dataclasses.field(metadata={METADATA_KEY: declared})


def static(**kwargs: Any) -> Any:
    """Declare a field that is no array but part of the type: it is hashed, and programs are compiled for its value."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(array, static))
class Stored:
    """Base of stored types: frozen dataclasses and pytrees, whose arrays are declared by :func:`array`.

    A subclass gets both by being defined, without decorators; one that others derive from is ``abstract``.  With a
    leading axis before all declared ones, an instance stands for several layers (:mod:`fqjax.layers.stacked`).
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        if not abstract:
            jax.tree_util.register_dataclass(cls)
            _TYPES[cls.kind] = cls

    @classmethod
    def table(cls) -> dict[str, ArrayField]:
        """The declarations of the arrays, by field."""
        return {f.name: f.metadata[METADATA_KEY] for f in dataclasses.fields(cls) if METADATA_KEY in f.metadata}  # pyright: ignore[reportArgumentType]

    @classmethod
    def axes(cls, sizes: Sizes, statics: Mapping[str, Any]) -> dict[str, int | None]:
        """Lengths of the axes that the table names; None for one that does not exist with these static fields."""
        return {"out": sizes.outputs, "in": sizes.inputs, "width": sizes.width, "extra": sizes.width - sizes.inputs}

    @classmethod
    def abstract(cls, sizes: Sizes, *, dtypes: Mapping[str, str] | None = None, **statics: Any) -> Self:
        """An instance with shapes in place of arrays.

        Args:
          sizes: of the layer.
          dtypes: of arrays that may have several, by field; the first of the table's by default.
          **statics: the static fields.

        Raises:
          ValueError: for a dtype that the table does not allow.
        """
        lengths, chosen = cls.axes(sizes, statics), dict(dtypes or {})
        arrays = {}
        for name, declared in cls.table().items():
            dtype = chosen.pop(name, declared.dtypes[0])
            if dtype not in declared.dtypes:
                raise ValueError(f"{name} is {dtype}; expected {' or '.join(declared.dtypes)}")
            shape = tuple(size for axis in declared.axes if (size := lengths[axis]) is not None)
            arrays[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        if chosen:
            raise ValueError(f"{next(iter(chosen))}: not an array of {cls.kind}, which has {', '.join(arrays)}")
        return cls(**arrays, **statics)

    @classmethod
    def bytes_for(cls, sizes: Sizes, **statics: Any) -> int:
        """Bytes on the device of an instance whose arrays have the first of their dtypes; ``axes`` alone sees ``statics``."""
        lengths = cls.axes(sizes, statics)
        shapes = {n: [s for a in d.axes if (s := lengths[a]) is not None] for n, d in cls.table().items()}
        return sum(math.prod(shapes[n]) * jnp.dtype(d.dtypes[0]).itemsize for n, d in cls.table().items())

    @classmethod
    def static_names(cls) -> list[str]:
        """Names of the fields that are no arrays."""
        return [f.name for f in dataclasses.fields(cls) if METADATA_KEY not in f.metadata]  # pyright: ignore[reportArgumentType]

    def statics(self) -> dict[str, Any]:
        """The fields that are no arrays."""
        return {name: getattr(self, name) for name in self.static_names()}

    def arrays(self) -> dict[str, Array]:
        """The arrays, by field."""
        return {name: getattr(self, name) for name in self.table()}

    def dtypes(self) -> dict[str, str]:
        """Dtypes of those arrays that may have several."""
        several = [name for name, declared in self.table().items() if len(declared.dtypes) > 1]
        return {name: getattr(self, name).dtype.name for name in several}

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return bytes_of(self)

    def is_sound(self, sizes: Sizes) -> Bool[Array, ""]:
        """Whether all arrays keep the invariants that the table declares; jittable."""
        lengths = self.axes(sizes, self.statics())
        checks = [jnp.bool_(True)]
        for name, declared in self.table().items():
            values = getattr(self, name)
            if declared.positive:
                checks.append(jnp.all((values > 0) & jnp.isfinite(values)))
            if declared.natural or declared.below:
                checks.append(jnp.all(values >= 0))
            if declared.below:
                checks.append(jnp.all(values < lengths[declared.below]))
        return jnp.all(jnp.stack(checks))

    def padded(self, old: Sizes, width: int) -> Self:
        """The same with more padding, up to a K' of ``width``."""
        statics, changed = self.statics(), {}
        before, after = self.axes(old, statics), self.axes(old._replace(width=width), statics)
        for name, declared in self.table().items():
            axes = [axis for axis in declared.axes if before[axis] is not None]
            missing = [(0, (after[axis] or 0) - (before[axis] or 0)) for axis in axes]
            if any(more for _, more in missing):
                changed[name] = jnp.pad(getattr(self, name), missing, constant_values=declared.fill)
        return dataclasses.replace(self, **changed)  # pyright: ignore[reportArgumentType]

    @classmethod
    def partition_specs(
        cls, sizes: Sizes, mesh_axes: Mapping[str, str | None], **statics: Any
    ) -> dict[str, PartitionSpec]:
        """How arrays are cut over a mesh.

        Args:
          sizes: of the layer.
          mesh_axes: name of the mesh's axis by name of an array's axis; others are not cut.
          **statics: the static fields.

        Returns:
          The partition spec of each array, by field.
        """
        lengths = cls.axes(sizes, statics)
        return {
            name: PartitionSpec(*(mesh_axes.get(axis) for axis in declared.axes if lengths[axis] is not None))
            for name, declared in cls.table().items()
        }


def bytes_of(tree: object) -> int:
    """Bytes of all arrays in a tree, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stored_type(kind: str) -> type[Stored]:
    """The stored type of a kind; where it is not known, the modules of all registered pieces are imported first.

    Types that are in no checkpoint, such as grids, are defined in the module of a registered piece.

    Raises:
      KeyError: if there is none.
    """
    if kind not in _TYPES:
        for group in STORED_GROUPS:
            import_all(group)
    return _TYPES[kind]
