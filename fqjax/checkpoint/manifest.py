"""``fqjax.json``: what a checkpoint's arrays are.  Version, schemes, architecture, and the format of every layer."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fqjax.errors import InputError
from fqjax.linear import LayerSummary, QuantizedLinear
from fqjax.models import FAMILIES, architecture_of
from fqjax.qtensor import InputQuantizer, QFormat, QTensor
from fqjax.report import quantized_layers
from fqjax.scheme import Scheme

NAME = "fqjax.json"
FORMAT_VERSION = 1


def describe(model: nnx.Module) -> dict[str, Any]:
    """The manifest of a model."""
    layers = quantized_layers(model)
    schemes = list(dict.fromkeys(layer.summary.scheme for layer in layers.values()))
    name = architecture_of(model)
    return {
        "format": "fqjax",
        "format_version": FORMAT_VERSION,
        "written_by": f"fqjax {version('fqjax')}",
        "schemes": [dataclasses.asdict(scheme) for scheme in schemes],
        "architecture": None
        if name is None
        else {"name": name, "config": dataclasses.asdict(model.config), "dtype": jnp.dtype(model.dtype).name},  # pyright: ignore
        "layers": {name: describe_layer(layer, schemes) for name, layer in layers.items()},
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads and checks a checkpoint's manifest.

    Raises:
      InputError: if there is none, it is not one, or a newer fqjax wrote it.
    """
    path = directory / NAME
    if not path.is_file():
        raise InputError(f"{directory}: not an fqjax checkpoint: it has no {NAME}")
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format_version"]
        if manifest["format"] != "fqjax" or not isinstance(found, int):
            raise ValueError("not of the format 'fqjax'")
        missing = {"schemes", "architecture", "layers"} - set(manifest)
        if found <= FORMAT_VERSION and missing:
            raise ValueError(f"no entry {sorted(missing)[0]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest of an fqjax checkpoint ({error})") from None
    if found > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {found}; this fqjax reads versions up to {FORMAT_VERSION}; install a newer fqjax"
        )
    return manifest


def abstract_architecture(manifest: dict[str, Any], directory: Path) -> nnx.Module:
    """The float model the manifest describes, with shapes in place of arrays.

    Raises:
      InputError: if the manifest names no architecture that fqjax has, or a configuration that does not fit it.
    """
    entry = manifest["architecture"]
    if entry is None:
        raise InputError(f"{directory}: holds a model that is not one of fqjax's own; pass it as load(path, model=...)")
    try:
        family = FAMILIES[entry["name"]]
        config = family.config(**{key: _hashable(value) for key, value in entry["config"].items()})
        return nnx.eval_shape(lambda: family.model(config, dtype=jnp.dtype(entry["dtype"]), rngs=nnx.Rngs(0)))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / NAME}: no valid architecture ({error})") from None


def abstract_layers(manifest: dict[str, Any], directory: Path) -> dict[str, QuantizedLinear]:
    """The quantized layers, with shapes in place of arrays.

    Raises:
      InputError: naming the layer whose entry is not valid, or whose accumulator could overflow.
    """
    layers = {}
    for name, entry in manifest["layers"].items():
        try:
            layers[name] = abstract_layer(name, entry, manifest["schemes"])
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{directory / NAME}: layer {name!r} has no valid format ({error})") from None
    return layers


def describe_layer(layer: QuantizedLinear, schemes: list[Scheme]) -> dict[str, Any]:
    """A layer's entry; its scheme is the index of one of ``schemes``."""
    weight, quantizer = layer.weight.get_value(), layer.input.get_value()
    return {
        "out_features": weight.shape[0],
        "in_features": quantizer.multiplier.shape[0],
        "width": weight.shape[1],
        "flattened": quantizer.used,
        "weight": dataclasses.asdict(weight.format),
        "channel_scales": weight.scale.ndim == 1,
        "activation_bits": quantizer.bits,
        "activation_scale": "token" if quantizer.scale is None else "tensor",
        "bias": None if layer.bias is None else layer.bias[...].dtype.name,
        "dtype": None if layer.dtype is None else layer.dtype.name,
        "param_dtype": layer.param_dtype.name,
        "scheme": schemes.index(layer.summary.scheme),
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
    per_channel = entry.get("channel_scales", weight_format.granularity == "channel")
    group_scale = None
    if weight_format.group_size:
        kind = jnp.int32 if weight_format.integer_scales else jnp.float32
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
        scheme=Scheme(**schemes[entry["scheme"]]),
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


def _hashable(value: Any) -> Any:
    """JSON lists back to the tuples they were."""
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value
