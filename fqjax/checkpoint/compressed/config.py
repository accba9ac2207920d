"""``quantization_config`` in config.json: which modules a checkpoint holds as integers, and how.

The format (https://github.com/vllm-project/compressed-tensors) gives every group of modules a scheme:

    "quantization_config": {
      "quant_method": "compressed-tensors",
      "format": "pack-quantized",
      "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true}}},
      "ignore": ["lm_head"]}

A target is a module's name, ``re:`` and a regular expression that fits from its start, or the class ``Linear``; among
several the first of these kinds counts.  What fqjax cannot express is refused here, before a tensor is looked at.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, cast

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, linked, read_json
from fqjax.runtime.patterns import compile_pattern

ENTRIES = ("quantization_config", "compression_config")
"""What the entry of config.json is called, and what it was called once."""

METHOD = "compressed-tensors"
LINEAR = "Linear"
INT, PACKED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"
FORMATS = (INT, PACKED, MIXED, "naive-quantized")
"""Formats in which integers are stored; "naive-quantized" has the tensors of "int-quantized"."""

Activations = Literal["static", "token"]
Strategy = Literal["tensor", "channel", "group"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """How a module's weight and input are quantized; symmetric integers always.

    Attributes:
      bits: of a weight's code, 4 or 8.
      strategy: what has a scale: the "tensor", a "channel" (output channel), or a "group" of input channels in one.
      group_size: input channels of a group; 0 without groups.
      activations: int8 with one "static" scale or with one scale a "token"; None for floating point.
    """

    bits: int
    strategy: Strategy
    group_size: int = 0
    activations: Activations | None = None

    def to_json(self, targets: Iterable[str]) -> JsonObject:
        """The entry in ``config_groups`` for modules with this scheme."""
        symmetric = {"type": "int", "symmetric": True}
        weights = symmetric | {"num_bits": self.bits, "strategy": self.strategy, "dynamic": False}
        if self.strategy == "group":
            weights["group_size"] = self.group_size
        inputs = None
        if self.activations is not None:
            token = self.activations == "token"
            inputs = symmetric | {"num_bits": 8, "strategy": "token" if token else "tensor", "dynamic": token}
        return {
            "targets": list(targets),
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }

    @property
    def format(self) -> str:
        """The format that modules with this scheme are written in."""
        return INT if self.bits == 8 and self.strategy != "group" else PACKED


PRESETS = {
    "W8A8": LayerScheme(bits=8, strategy="channel", activations="token"),
    "INT8": LayerScheme(bits=8, strategy="channel", activations="token"),
    "W4A8": LayerScheme(bits=4, strategy="group", group_size=128, activations="token"),
    "W4A16": LayerScheme(bits=4, strategy="group", group_size=128),
}
"""Schemes that a configuration may name in place of writing them out."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Schemes of modules, as ``quantization_config`` gives them.

    Attributes:
      schemes: by target, in the order of the configuration.
      ignore: targets that are left in floating point all the same.
    """

    schemes: Mapping[str, LayerScheme]
    ignore: tuple[str, ...]

    def scheme_of(self, module: str) -> LayerScheme | None:
        """The scheme of a linear module, by its name in the checkpoint; None if it is in floating point."""
        if any(_fits(target, module) for target in self.ignore):
            return None
        # Names before regular expressions before classes, each in alphabetical order, as compressed-tensors takes them.
        ranked = sorted(self.schemes, key=lambda target: (target == LINEAR, target.startswith("re:"), target))
        return next((self.schemes[target] for target in ranked if _fits(target, module)), None)


def read_quantization(directory: Path) -> Quantization | None:
    """The quantization that config.json describes; None if it describes none.

    Raises:
      InputError: naming the entry that fqjax cannot express, and what was expected.
    """
    path = linked(directory, "config.json")
    content = read_json(path, "configuration")
    found = [entry for name in ENTRIES if (entry := content.get(name)) is not None]
    _expect(str(path), found[1:] in ([], found[:1]), f"{' and '.join(ENTRIES)} differ; expected one of them")
    return parse_quantization(found[0], str(path)) if found else None


def parse_quantization(entry: object, where: str) -> Quantization:
    """Checks and reads the entry.

    Args:
      entry: as JSON gives it.
      where: the file, for the message.

    Raises:
      InputError: as :func:`read_quantization`.
    """
    where = f"{where}: quantization_config"
    entry = _object(where, entry)
    # Early checkpoints nest what later ones have side by side.
    nested = entry.get("quantization_config")
    entry = {**entry, **nested} if isinstance(nested, dict) else entry
    method = entry.get("quant_method", METHOD)
    _expect(where, method == METHOD, f"quant_method {method!r} is not supported; expected {METHOD!r}")
    _refuse(where, entry, "kv_cache_scheme", "a quantized key-value cache")
    _refuse(where, entry, "moe_sparsity_config", "sparse experts")
    _refuse(where, entry, "transform_config", "transforms (rotations)")
    sparsity = entry.get("sparsity_config") or {}
    kind = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    _expect(where, kind == "dense", f"sparsity_config with format {kind!r} (sparse weights) cannot be expressed")
    _format(where, entry)
    groups = entry.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"{where}: expected an object config_groups with at least one group")
    schemes: dict[str, LayerScheme] = {}
    for name, group in groups.items():
        found = _group(f"{where}: config_groups: {name}", name, group)
        again = [target for target in found if schemes.get(target, found[target]) != found[target]]
        _expect(where, not again, f"config_groups: {name}: target {again[:1]} is in another group, with another scheme")
        schemes |= found
    ignore = _targets(f"{where}: ignore", entry.get("ignore") or [])
    return Quantization(schemes, tuple(ignore))


def write_quantization(schemes: Mapping[str, LayerScheme], ignore: Iterable[str]) -> JsonObject:
    """The entry for modules with these schemes, by name; ``ignore`` names the other linear modules."""
    kinds = list(dict.fromkeys(schemes.values()))
    targets = {
        kind: [name for name in schemes if schemes[name] == kind] if len(kinds) > 1 else [LINEAR] for kind in kinds
    }
    formats = {kind.format for kind in kinds}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": kind.to_json(targets[kind]) for i, kind in enumerate(kinds)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(where: str, name: str, group: object) -> dict[str, LayerScheme]:
    """The schemes of one group, by target."""
    if isinstance(group, list):
        scheme = PRESETS.get(name.upper())
        _expect(where, scheme is not None, f"the preset is not supported; expected one of {', '.join(PRESETS)}")
        return dict.fromkeys(_targets(where, group), scheme)  # pyright: ignore[reportReturnType]
    group = _object(where, group, "expected an object or a list of targets")
    if group.get("format") is not None:
        _format(where, group)
    _refuse(where, group, "output_activations", "quantized outputs")
    scheme = _scheme(where, group.get("weights"), group.get("input_activations"))
    targets = _targets(where, group.get("targets"))
    classes = [t for t in targets if t != LINEAR and not t.startswith("re:") and t[:1].isupper() and "." not in t]
    _expect(where, not classes, f"target {classes[:1]} cannot be expressed; expected modules of the class {LINEAR!r}")
    return dict.fromkeys(targets, scheme)


def _scheme(where: str, weights: object, inputs: object) -> LayerScheme:
    weights = _integers(f"{where}: weights", weights)
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    here = f"{where}: weights"
    _expect(here, type(bits) is int and bits in (4, 8), f"num_bits {bits!r}: expected 4 or 8")
    _expect(here, not weights.get("dynamic"), "dynamic weights cannot be expressed")
    _expect(
        here, strategy in ("tensor", "channel", "group"), f"strategy {strategy!r}: expected tensor, channel or group"
    )
    order = weights.get("actorder")
    _expect(
        here,
        order in (None, False, "weight", "static"),
        f"actorder {order!r} (groups of channels that are no neighbours) cannot be expressed",
    )
    groups = 0
    if strategy == "group":
        groups = size if isinstance(size, int) and not isinstance(size, bool) else 0
        fits = groups > 0 and (groups % 16 == 0 or 16 % groups == 0)
        _expect(here, fits, f"group_size {size!r}: expected a multiple of 16, or 1, 2, 4 or 8")
    activations = None if inputs is None else _activations(f"{where}: input_activations", inputs)
    if activations is None:
        _expect(where, bits == 4, "8-bit weights with activations in floating point cannot be expressed")
    return LayerScheme(
        bits=cast(int, bits), strategy=cast(Strategy, strategy), group_size=groups, activations=activations
    )


def _activations(where: str, inputs: object) -> Activations:
    inputs = _integers(where, inputs)
    bits, dynamic = inputs.get("num_bits", 8), inputs.get("dynamic", False)
    strategy = inputs.get("strategy") or "tensor"
    _expect(where, type(bits) is int and bits == 8, f"num_bits {bits!r}: expected 8")
    if (strategy, dynamic) == ("tensor", False):
        return "static"
    if (strategy, dynamic) == ("token", True):
        return "token"
    raise InputError(
        f"{where}: strategy {strategy!r} with dynamic {dynamic!r} cannot be expressed; expected tensor with false, or token "
        "with true"
    )


def _integers(where: str, entry: object) -> JsonObject:
    args = _object(where, entry)
    kind = str(args.get("type", "int")).lower()
    _expect(where, kind == "int", f"type {kind!r} (such as fp8) cannot be expressed; expected 'int'")
    _expect(where, args.get("symmetric", True) is True, "asymmetric codes (zero points) cannot be expressed")
    return args


def _format(where: str, entry: Mapping[str, object]) -> None:
    found = entry.get("format")
    expected = ", ".join(map(repr, FORMATS))
    _expect(where, found in FORMATS, f"format {found!r} cannot be expressed; expected one of {expected}")


def _targets(where: str, targets: object) -> list[str]:
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{where}: expected a list of targets")
    for target in targets:
        if target.startswith("re:"):
            compile_pattern(target.removeprefix("re:"), f"{where}: target {target!r}")
    return targets


def _fits(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, LINEAR)


def _refuse(where: str, entry: Mapping[str, object], name: str, what: str) -> None:
    _expect(where, not entry.get(name), f"{name} ({what}) cannot be expressed; expected none")


def _object(where: str, entry: object, message: str = "expected an object") -> JsonObject:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {message}")
    return entry


def _expect(where: str, condition: object, message: str) -> None:
    if not condition:
        raise InputError(f"{where}: {message}")
