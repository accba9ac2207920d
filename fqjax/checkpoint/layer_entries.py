"""Entries of a manifest on single layers: what their arrays are, by the tables that their types declare."""

import dataclasses
from typing import Any, Literal, cast, get_type_hints

import jax
import jax.numpy as jnp

from fqjax.core.formats.base import QTensor
from fqjax.core.table import Sizes, Stored
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.record import Figures
from fqjax.registry import from_json, lookup, to_json
from fqjax.runtime.files import JsonObject
from fqjax.runtime.validation import Count, Finite, Size, check_value

FloatName = Literal["float64", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class FiguresEntry:
    """The manifest's entry on what was measured of a layer; see :class:`~fqjax.layers.record.Figures`."""

    relative_error: Finite
    accumulator_bound: Count
    macs: Count
    flattened: Count


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """The manifest's entry on a quantized layer.

    Attributes:
      out_features, in_features, width: N, K and K'.
      weight: config of the format, with its kind.
      dtypes: of those of the weight's arrays that may have several, by field.
      input: kind of the stored quantizer, and its static fields.
      transform, branches, finish: kinds and static fields of what a layer has besides; None, or empty, for most.
      bias: its dtype; None without.
      dtype, param_dtype: as the layer has them.
      recipe: index of what the layer was quantized with, in the manifest's ``recipes``.
      figures: what was measured of it.
    """

    out_features: Size
    in_features: Size
    width: Size
    weight: dict
    dtypes: dict[str, str]
    input: dict
    transform: dict | None
    branches: tuple[dict, ...]
    finish: dict | None
    bias: FloatName | None
    dtype: FloatName | None
    param_dtype: FloatName
    recipe: int
    figures: FiguresEntry


def describe_layer(layer: QuantizedLinear, recipe: int) -> JsonObject:
    """A layer's entry (:class:`LayerEntry`); ``recipe`` is the index of its recipe."""
    weight, sizes = layer.weight.get_value(), layer.sizes
    transform, finish = (None if v is None else _described(v.get_value()) for v in (layer.transform, layer.finish))
    entry = LayerEntry(
        out_features=sizes.outputs,
        in_features=sizes.inputs,
        width=sizes.width,
        weight=to_json(weight.format),
        dtypes=weight.dtypes(),
        input=_described(layer.input.get_value()),
        transform=transform,
        branches=tuple(_described(branch.get_value()) for branch in layer.branches),
        finish=finish,
        bias=None if layer.bias is None else layer.bias.get_value().dtype.name,  # pyright: ignore[reportArgumentType]
        dtype=None if layer.dtype is None else layer.dtype.name,  # pyright: ignore[reportArgumentType]
        param_dtype=layer.param_dtype.name,  # pyright: ignore[reportArgumentType]
        recipe=recipe,
        figures=FiguresEntry(**dataclasses.asdict(layer.figures)),
    )
    return dataclasses.asdict(entry)


def abstract_layer(name: str, entry: LayerEntry, recipe: str) -> QuantizedLinear:
    """The layer an entry describes, with shapes in place of arrays.

    Raises:
      InputError: for a kind that nothing registers, or an accumulator that could overflow.
      ValueError: for fields that no layer has.
    """
    sizes = Sizes(entry.out_features, entry.in_features, entry.width)
    if not 0 <= entry.figures.flattened <= sizes.width - sizes.inputs:
        raise ValueError(f"width {sizes.width}: expected room for in_features and flattened channels")
    form = from_json("formats", entry.weight, f"layer {name!r}: weight")
    if sizes.width % form.multiple:
        raise ValueError(f"width {sizes.width}: expected a multiple of {form.multiple}")
    weight: QTensor = form.abstract(sizes, entry.dtypes)
    bias: Any = None if entry.bias is None else jax.ShapeDtypeStruct((sizes.outputs,), jnp.dtype(entry.bias))
    return QuantizedLinear(
        weight,
        _abstract("inputs", entry.input, sizes),
        bias,
        dtype=entry.dtype,
        param_dtype=entry.param_dtype,
        figures=Figures(**dataclasses.asdict(entry.figures)),
        recipe=recipe,
        transform=None if entry.transform is None else _abstract("transforms", entry.transform, sizes),
        branches=[_abstract("branches", branch, sizes) for branch in entry.branches],
        finish=None if entry.finish is None else _abstract("finishes", entry.finish, sizes),
        name=name,
    )


def _described(value: Stored) -> JsonObject:
    """Kind and static fields of a stored type."""
    return {"kind": value.kind, **value.statics()}


def _abstract(group: str, described: JsonObject, sizes: Sizes) -> Any:
    """The stored type that is described, with shapes in place of arrays."""
    kind = cast(str, described.get("kind"))  # Anything else is the name of nothing.
    cls = lookup(group, kind)
    statics = {name: value for name, value in described.items() if name != "kind"}
    hints, known = get_type_hints(cls, include_extras=True), cls.static_names()
    for name, value in statics.items():
        if name not in known:
            raise ValueError(f"{kind}: unknown entry {name!r}; expected {', '.join(known) or 'none'}")
        check_value(hints[name], value, kind, name)
    return cls.abstract(sizes, **statics)
