"""Manifests of version 1, as this version has them.

Version 1 had one type of weight with six flags, one quantizer of inputs, and the scheme of every layer, parsed.
"""

import dataclasses
from pathlib import Path
from typing import Literal, cast

from fqjax.checkpoint.layer_entries import FloatName
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject
from fqjax.runtime.validation import Count, Finite, Size, check_value, validated


@dataclasses.dataclass(frozen=True)
class OldWeight:
    """How version 1 described a weight's codes."""

    bits: Literal[4, 8]
    granularity: Literal["tensor", "channel", "group"]
    packed: bool
    group_size: Count
    integer_scales: bool
    folded: bool


@dataclasses.dataclass(frozen=True)
class OldLayer:
    """How version 1 described a quantized layer.

    The first checkpoints had neither ``channel_scales`` nor ``group_scales``.
    """

    out_features: Size
    in_features: Size
    width: Size
    flattened: Count
    weight: OldWeight
    activation_bits: Literal[4, 8, 16]
    activation_scale: Literal["tensor", "token"]
    bias: FloatName | None
    dtype: FloatName | None
    param_dtype: FloatName
    scheme: int
    relative_error: Finite
    accumulator_bound: Count
    macs: Count
    channel_scales: bool | None = None
    group_scales: Literal["int16", "int32", "float32"] | None = None


def from_version_1(manifest: JsonObject, path: Path) -> JsonObject:
    """The same manifest in the present version.

    Args:
      manifest: as it was written.
      path: of its file, for messages.

    Raises:
      InputError: naming the entry that is not valid.
    """
    for entry, hint in (("schemes", list), ("layers", dict)):
        if entry not in manifest:
            raise InputError(f"{path}: not a manifest of an fqjax checkpoint (no entry {entry!r})")
        check_value(hint, manifest[entry], str(path), entry)
    described = cast(JsonObject, manifest["layers"])
    layers = {n: _layer(f"{path}: layer {n!r} has no valid format", old) for n, old in described.items()}
    kept = {key: value for key, value in manifest.items() if key not in ("schemes", "layers")}
    return kept | {"recipes": manifest["schemes"], "layers": layers}


def _layer(where: str, values: object) -> JsonObject:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object")
    old = validated(OldLayer, values, where)
    same = ("out_features", "in_features", "width", "bias", "dtype", "param_dtype")
    figures = ("relative_error", "accumulator_bound", "macs", "flattened")
    return {name: getattr(old, name) for name in same} | {
        "weight": _weight(where, old),
        "dtypes": _dtypes(old),
        "input": _input(old),
        "transform": None,
        "branches": [],
        "finish": None,
        "recipe": old.scheme,
        "figures": {name: getattr(old, name) for name in figures},
    }


def _weight(where: str, old: OldLayer) -> JsonObject:
    weight, per_channel = old.weight, old.channel_scales
    if per_channel is None:  # Written before grouped weights came with scales of either kind.
        per_channel = weight.granularity == "channel"
    if weight.packed != (weight.bits == 4) or (weight.granularity == "group") != (weight.group_size > 0):
        raise InputError(f"{where}: weight: expected packed codes with 4 bits, and a group size with groups")
    common: JsonObject = {"bits": weight.bits, "granularity": "channel" if per_channel else "tensor"}
    if not weight.group_size:
        return {"kind": "uniform", **common}
    # Of codes of 8 bits, version 1 said that they were folded too; the integers are the same.
    folded = weight.folded and weight.bits == 4
    scales = "folded" if folded else "integer" if weight.integer_scales else "float"
    return {"kind": "grouped", "group_size": weight.group_size, "scales": scales, **common}


def _dtypes(old: OldLayer) -> dict[str, str]:
    if not old.weight.group_size:
        return {}
    return {"group_scale": old.group_scales or ("int32" if old.weight.integer_scales else "float32")}


def _input(old: OldLayer) -> JsonObject:
    if old.activation_bits == 16:
        return {"kind": "floating"}
    return {"kind": "per_token" if old.activation_scale == "token" else "static", "bits": old.activation_bits}
