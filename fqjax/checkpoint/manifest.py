"""``fqjax.json``, the manifest of a checkpoint's arrays: version, architecture, format of every layer, recipes.

A recipe says what a layer was quantized with.  It is kept as it is and never read: a checkpoint can be loaded by
programs that know nothing of the method that made it.
"""

import dataclasses
import json
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import jax
import jax.numpy as jnp
from flax import nnx

from fqjax.checkpoint.fields import ModelConfig, check_depth
from fqjax.checkpoint.layer_entries import FloatName, LayerEntry, abstract_layer, describe_layer
from fqjax.checkpoint.manifest_v1 import from_version_1
from fqjax.layers.head import Int8Table, padded_head_width
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.stacked import quantized_layers
from fqjax.models import FAMILIES, architecture_of
from fqjax.registry import known
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, exists, inside, read_json
from fqjax.runtime.validation import Size, check_value, validated
from fqjax.version import __version__

MANIFEST_FILE = "fqjax.json"
FORMAT_VERSION = 2

ENTRY_TYPES: dict[str, object] = {"architecture": dict | None, "layers": dict, "recipes": list}
"""Entries that every manifest has, with their types."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The manifest's entry on one of fqjax's models, as :func:`describe` writes it."""

    name: str
    config: dict
    dtype: FloatName


class ArchitectureEntry(TypedDict):
    """The same as JSON has it."""

    name: str
    config: JsonObject
    dtype: FloatName


class Manifest(TypedDict):
    """A manifest of this version, whose entries on single layers are still to be checked."""

    format: str
    format_version: int
    written_by: str
    recipes: list[object]
    architecture: ArchitectureEntry | None
    layers: dict[str, JsonObject]
    int8_head: NotRequired[JsonObject]


@dataclasses.dataclass(frozen=True)
class HeadEntry:
    """The manifest's entry on an output head in INT8."""

    name: str
    out_features: Size
    in_features: Size
    width: Size
    dtype: FloatName


def describe(model: nnx.Module) -> JsonObject:
    """The manifest of a model."""
    layers = quantized_layers(model)
    recipes = list(dict.fromkeys(layer.recipe for layer in layers.values()))
    name = architecture_of(model)
    head = _describe_head(model)
    return {
        "format": "fqjax",
        "format_version": FORMAT_VERSION,
        "written_by": f"fqjax {__version__}",
        "recipes": [_opaque(recipe) for recipe in recipes],
        "architecture": None
        if name is None
        else {"name": name, "config": dataclasses.asdict(model.config), "dtype": jnp.dtype(model.dtype).name},  # pyright: ignore
        "layers": {name: describe_layer(layer, recipes.index(layer.recipe)) for name, layer in layers.items()},
    } | ({} if head is None else {"int8_head": dataclasses.asdict(head)})


def _describe_head(model: nnx.Module) -> HeadEntry | None:
    name = getattr(model, "head_name", None)
    head = getattr(model, name, None) if isinstance(name, str) else None
    if not isinstance(head, Int8Table):
        return None
    (rows, width), dtype = head.codes.get_value().shape, jnp.dtype(head.dtype).name
    return HeadEntry(name, rows, head.features, width, dtype)  # pyright: ignore[reportArgumentType]


def read_manifest(directory: Path) -> Manifest:
    """Read and check a checkpoint's manifest; one of an earlier version becomes one of this.

    Raises:
      InputError: if there is none, it is not one, or a newer fqjax wrote it.
    """
    return current(read_stored_manifest(directory), directory)


def read_stored_manifest(directory: Path) -> JsonObject:
    """The manifest of any version that this fqjax reads, as it was written.

    Raises:
      InputError: as :func:`read_manifest` does.
    """
    path = directory / MANIFEST_FILE
    if not exists(path):
        raise InputError(f"{directory}: not an fqjax checkpoint: it has no {MANIFEST_FILE}")
    manifest = read_json(inside(directory, MANIFEST_FILE), "object, and so not a manifest of an fqjax checkpoint")
    found = manifest.get("format_version")
    if manifest.get("format") != "fqjax" or type(found) is not int or found < 1:
        raise InputError(f"{path}: not a manifest of an fqjax checkpoint (not of the format 'fqjax', with a version)")
    if found > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {found}; this fqjax reads versions up to {FORMAT_VERSION}; install a newer fqjax"
        )
    return manifest


def read_manifest_if_any(directory: Path) -> JsonObject:
    """The same, or nothing where there is no manifest.

    Raises:
      InputError: if there is one that is not valid.
    """
    return read_stored_manifest(directory) if exists(directory / MANIFEST_FILE) else {}


def current(manifest: JsonObject, directory: Path) -> Manifest:
    """A manifest of this version, of one of any version that is read.

    Raises:
      InputError: if it is not a valid manifest of its version.
    """
    path = directory / MANIFEST_FILE
    if manifest["format_version"] == 1:
        manifest = from_version_1(manifest, path)
    for entry, hint in ENTRY_TYPES.items():
        if entry not in manifest:
            raise InputError(f"{path}: not a manifest of an fqjax checkpoint (no entry {entry!r})")
        check_value(hint, manifest[entry], str(path), entry)
    return cast(Manifest, manifest)


def read_config(manifest: Manifest, directory: Path) -> ModelConfig:
    """The configuration of the architecture that the manifest names.

    Raises:
      InputError: if it names no architecture that fqjax has, or a configuration that does not fit it.
    """
    entry, where = manifest["architecture"], f"{directory / MANIFEST_FILE}: no valid architecture"
    if entry is None:
        raise InputError(f"{directory}: holds a model that is not one of fqjax's own; pass it as load(path, model=...)")
    validated(Architecture, entry, where)
    if entry["name"] not in FAMILIES:
        raise InputError(f"{where}: name {entry['name']!r}; expected one of {known('families')}")
    kind = FAMILIES[entry["name"]].config
    return validated(kind, entry["config"], where)


def abstract_architecture(manifest: Manifest, directory: Path, arrays: int) -> nnx.Module:
    """The float model the manifest describes, with shapes in place of arrays.

    Args:
      manifest: as :func:`read_manifest` returns it.
      directory: the checkpoint's.
      arrays: how many are stored; no model has more layers.

    Raises:
      InputError: if the manifest names no architecture that fqjax has, or a configuration that does not fit it.
    """
    config, entry = read_config(manifest, directory), manifest["architecture"]
    assert entry is not None  # Or there were no configuration.
    check_depth(f"{directory / MANIFEST_FILE}", config, arrays)
    try:
        model = FAMILIES[entry["name"]].model
        return nnx.eval_shape(lambda: model(config, dtype=jnp.dtype(entry["dtype"]), rngs=nnx.Rngs(0)))
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{directory / MANIFEST_FILE}: no valid architecture ({error})") from None


def abstract_layers(manifest: Manifest, directory: Path) -> dict[str, QuantizedLinear]:
    """The quantized layers, with shapes in place of arrays.

    Raises:
      InputError: naming the layer whose entry is not valid, or whose accumulator could overflow.
    """
    path, layers = directory / MANIFEST_FILE, {}
    for name, values in manifest["layers"].items():
        where = f"{path}: layer {name!r} has no valid format"
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected an object")
        entry = validated(LayerEntry, values, where)
        if not 0 <= entry.recipe < len(manifest["recipes"]):
            raise InputError(f"{where}: recipe {entry.recipe}: expected the index of one of recipes")
        recipe = manifest["recipes"][entry.recipe]
        try:
            layers[name] = abstract_layer(name, entry, recipe if isinstance(recipe, str) else json.dumps(recipe))
        except InputError as error:
            told = str(error)
            raise InputError(f"{path}: {told}" if told.startswith(f"{name}:") else f"{where} ({told})") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where} ({error})") from None
    return layers


def abstract_head(manifest: Manifest, directory: Path, model: nnx.Module) -> dict[str, nnx.Module]:
    """The output head in INT8 by its name, with shapes in place of arrays; nothing if it is in floating point.

    Raises:
      InputError: if the entry is not valid, or does not fit the model.
    """
    values = manifest.get("int8_head")
    if values is None:
        return {}
    where = f"{directory / MANIFEST_FILE}: int8_head"
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
    if (entry.out_features, entry.in_features) != expected or entry.width != padded_head_width(entry.in_features):
        raise InputError(
            f"{where}: of {entry.out_features} x {entry.in_features}, width {entry.width}; expected {expected}"
        )
    codes = jax.ShapeDtypeStruct((entry.out_features, entry.width), jnp.int8)
    scale = jax.ShapeDtypeStruct((entry.out_features,), jnp.float32)
    return {entry.name: Int8Table(codes, scale, features=entry.in_features, dtype=entry.dtype)}  # pyright: ignore


def _opaque(recipe: str) -> object:
    """A recipe as JSON where it is some, for people to read."""
    try:
        return json.loads(recipe)
    except ValueError:
        return recipe
