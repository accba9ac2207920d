"""``fqjax.json``: what a checkpoint's arrays are.  Version, schemes, architecture, and the format of every layer."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fqjax.checkpoint.fields import check_depth
from fqjax.core.channels import padded_width
from fqjax.core.qtensor import InputQuantizer, QFormat, QTensor
from fqjax.layers.head import Int8Table
from fqjax.layers.linear import LayerSummary, QuantizedLinear
from fqjax.models import FAMILIES, architecture_of
from fqjax.report.report import quantized_layers
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import inside, read_json
from fqjax.runtime.validation import Count, Finite, Size, check_value, validated
from fqjax.version import __version__

NAME = "fqjax.json"
FORMAT_VERSION = 1

ENTRIES: dict[str, Any] = {"architecture": dict | None, "layers": dict, "schemes": list[dict]}
"""Entries that every manifest has, with their types."""

MISSING: dict[str, Any] = {"channel_scales": None, "group_scales": None}
"""What layers' entries may lack that were written before there was something to say."""

FloatName = Literal["float64", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The manifest's entry on one of fqjax's models, as :func:`describe` writes it."""

    name: str
    config: dict
    dtype: FloatName


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """The manifest's entry on a quantized layer, as :func:`describe_layer` writes it."""

    out_features: Size
    in_features: Size
    width: Size
    flattened: int
    weight: dict
    channel_scales: bool | None
    group_scales: Literal["int16", "int32", "float32"] | None
    activation_bits: Literal[4, 8, 16]
    activation_scale: Literal["tensor", "token"]
    bias: FloatName | None
    dtype: FloatName | None
    param_dtype: FloatName
    scheme: int
    relative_error: Finite
    accumulator_bound: Count
    macs: Count


@dataclasses.dataclass(frozen=True)
class HeadEntry:
    """The manifest's entry on an output head in INT8."""

    name: str
    out_features: Size
    in_features: Size
    width: Size
    dtype: FloatName


def describe(model: nnx.Module) -> dict[str, Any]:
    """The manifest of a model."""
    layers = quantized_layers(model)
    recipes = list(dict.fromkeys(layer.summary.recipe for layer in layers.values()))
    name = architecture_of(model)
    head = _describe_head(model)
    return {
        "format": "fqjax",
        "format_version": FORMAT_VERSION,
        "written_by": f"fqjax {__version__}",
        "schemes": [json.loads(recipe) for recipe in recipes],
        "architecture": None
        if name is None
        else {"name": name, "config": dataclasses.asdict(model.config), "dtype": jnp.dtype(model.dtype).name},  # pyright: ignore
        "layers": {name: describe_layer(layer, recipes) for name, layer in layers.items()},
    } | ({} if head is None else {"int8_head": dataclasses.asdict(head)})


def _describe_head(model: Any) -> HeadEntry | None:
    name = getattr(model, "head_name", None)
    head = getattr(model, name, None) if isinstance(name, str) else None
    if not isinstance(head, Int8Table):
        return None
    (rows, width), dtype = head.codes.get_value().shape, jnp.dtype(head.dtype).name
    return HeadEntry(name, rows, head.features, width, dtype)  # pyright: ignore[reportArgumentType]


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads and checks a checkpoint's manifest.

    Raises:
      InputError: if there is none, it is not one, or a newer fqjax wrote it.
    """
    path = directory / NAME
    if not path.exists():
        raise InputError(f"{directory}: not an fqjax checkpoint: it has no {NAME}")
    manifest = read_json(inside(directory, NAME), "object, and so not a manifest of an fqjax checkpoint")
    found = manifest.get("format_version")
    if manifest.get("format") != "fqjax" or type(found) is not int or found < 1:
        raise InputError(f"{path}: not a manifest of an fqjax checkpoint (not of the format 'fqjax', with a version)")
    if found > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {found}; this fqjax reads versions up to {FORMAT_VERSION}; install a newer fqjax"
        )
    for entry, hint in ENTRIES.items():
        if entry not in manifest:
            raise InputError(f"{path}: not a manifest of an fqjax checkpoint (no entry {entry!r})")
        check_value(hint, manifest[entry], str(path), entry)
    return manifest


def read_config(manifest: dict[str, Any], directory: Path) -> Any:
    """The configuration of the architecture that the manifest names.

    Raises:
      InputError: if it names no architecture that fqjax has, or a configuration that does not fit it.
    """
    entry, where = manifest["architecture"], f"{directory / NAME}: no valid architecture"
    if entry is None:
        raise InputError(f"{directory}: holds a model that is not one of fqjax's own; pass it as load(path, model=...)")
    validated(Architecture, entry, where)
    if entry["name"] not in FAMILIES:
        raise InputError(f"{where}: name {entry['name']!r}; expected one of {', '.join(FAMILIES)}")
    kind = FAMILIES[entry["name"]].config
    return validated(kind, entry["config"], where)


def abstract_architecture(manifest: dict[str, Any], directory: Path, arrays: int) -> nnx.Module:
    """The float model the manifest describes, with shapes in place of arrays.

    Args:
      manifest: as :func:`read_manifest` returns it.
      directory: the checkpoint's.
      arrays: how many are stored; no model has more layers.

    Raises:
      InputError: if the manifest names no architecture that fqjax has, or a configuration that does not fit it.
    """
    config, entry = read_config(manifest, directory), manifest["architecture"]
    check_depth(f"{directory / NAME}", config, arrays)
    try:
        model = FAMILIES[entry["name"]].model
        return nnx.eval_shape(lambda: model(config, dtype=jnp.dtype(entry["dtype"]), rngs=nnx.Rngs(0)))
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{directory / NAME}: no valid architecture ({error})") from None


def abstract_layers(manifest: dict[str, Any], directory: Path) -> dict[str, QuantizedLinear]:
    """The quantized layers, with shapes in place of arrays.

    Raises:
      InputError: naming the layer whose entry is not valid, or whose accumulator could overflow.
    """
    layers = {}
    for name, entry in manifest["layers"].items():
        where = f"{directory / NAME}: layer {name!r} has no valid format"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object")
        validated(LayerEntry, MISSING | entry, where)
        validated(QFormat, entry["weight"], where)
        if not 0 <= entry["flattened"] <= entry["width"] - entry["in_features"]:
            raise InputError(f"{where}: width {entry['width']}: expected room for in_features and flattened channels")
        if not 0 <= entry["scheme"] < len(manifest["schemes"]):
            raise InputError(f"{where}: scheme {entry['scheme']}: expected the index of one of schemes")
        try:
            layers[name] = abstract_layer(name, entry, manifest["schemes"])
        except InputError as error:
            raise InputError(f"{directory / NAME}: {error}") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} ({error})") from None
    return layers


def abstract_head(manifest: dict[str, Any], directory: Path, model: Any) -> dict[str, nnx.Module]:
    """The output head in INT8 by its name, with shapes in place of arrays; nothing if it is in floating point.

    Raises:
      InputError: if the entry is not valid, or does not fit the model.
    """
    values = manifest.get("int8_head")
    if values is None:
        return {}
    where = f"{directory / NAME}: int8_head"
    check_value(dict, values, where, "int8_head")
    entry = validated(HeadEntry, values, where)
    found = getattr(model, entry.name, None) if entry.name == getattr(model, "head_name", None) else None
    shapes = {
        nnx.Embed: lambda: (found.num_embeddings, found.features),  # pyright: ignore[reportOptionalMemberAccess]
        nnx.Linear: lambda: (found.out_features, found.in_features),  # pyright: ignore[reportOptionalMemberAccess]
    }
    if type(found) not in shapes:
        raise InputError(f"{where}: the model has no output head {entry.name!r}")
    expected = shapes[type(found)]()
    if (entry.out_features, entry.in_features) != expected or entry.width != padded_width(entry.in_features, 8):
        raise InputError(
            f"{where}: of {entry.out_features} x {entry.in_features}, width {entry.width}; expected {expected}"
        )
    codes = jax.ShapeDtypeStruct((entry.out_features, entry.width), jnp.int8)
    scale: Any = jax.ShapeDtypeStruct((entry.out_features,), jnp.float32)
    return {entry.name: Int8Table(codes, scale, features=entry.in_features, dtype=entry.dtype)}  # pyright: ignore


def describe_layer(layer: QuantizedLinear, recipes: list[str]) -> dict[str, Any]:
    """A layer's entry; its scheme is the index of one of ``recipes``."""
    weight, quantizer = layer.weight.get_value(), layer.input.get_value()
    return {
        "out_features": weight.shape[0],
        "in_features": quantizer.multiplier.shape[0],
        "width": weight.shape[1],
        "flattened": quantizer.used,
        "weight": dataclasses.asdict(weight.format),
        "channel_scales": weight.scale.ndim == 1,
        "group_scales": None if weight.group_scale is None else weight.group_scale.dtype.name,
        "activation_bits": quantizer.bits,
        "activation_scale": "token" if quantizer.scale is None else "tensor",
        "bias": None if layer.bias is None else layer.bias.get_value().dtype.name,
        "dtype": None if layer.dtype is None else layer.dtype.name,
        "param_dtype": layer.param_dtype.name,
        "scheme": recipes.index(layer.summary.recipe),
        "relative_error": layer.summary.relative_error,
        "accumulator_bound": layer.summary.accumulator_bound,
        "macs": layer.summary.macs,
    }


def abstract_layer(name: str, entry: dict[str, Any], schemes: list[dict[str, Any]]) -> QuantizedLinear:
    """The layer an entry describes, with shapes in place of arrays."""

    def shaped(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    n, k, width = entry["out_features"], entry["in_features"], entry["width"]
    weight_format = QFormat(**entry["weight"])
    stored = width // 2 if weight_format.packed else width
    per_channel = entry.get("channel_scales")
    if per_channel is None:  # Written before grouped weights came with scales of either kind.
        per_channel = weight_format.granularity == "channel"
    group_scale = None
    if weight_format.group_size:
        expected = ("int32", "int16") if weight_format.integer_scales else ("float32",)
        kind = entry.get("group_scales") or expected[0]
        if kind not in expected:
            raise InputError(f"layer {name!r}: group_scales {kind!r}; expected {' or '.join(expected)}")
        group_scale = shaped((width // weight_format.group_size, n), kind)
    scale = shaped((n,) if per_channel else (), jnp.float32)
    weight = QTensor(shaped((n, stored), jnp.int8), scale, weight_format, group_scale)
    quantizer = InputQuantizer(
        multiplier=shaped((k,), jnp.float32),
        source=shaped((width - k,), jnp.int32),
        part=shaped((width - k,), jnp.int32),
        scale=None if entry["activation_scale"] == "token" else shaped((), jnp.float32),
        bits=entry["activation_bits"],
        used=entry["flattened"],
    )
    summary = LayerSummary(
        recipe=json.dumps(schemes[entry["scheme"]]),
        relative_error=float(entry["relative_error"]),
        accumulator_bound=int(entry["accumulator_bound"]),
        macs=int(entry["macs"]),
    )
    bias = None if entry["bias"] is None else shaped((n,), entry["bias"])
    return QuantizedLinear(
        weight,
        quantizer,
        bias,
        dtype=entry["dtype"],
        param_dtype=entry["param_dtype"],
        summary=summary,
        name=name,
    )
