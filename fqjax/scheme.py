"""Schemes: which method quantizes a model, with which settings.  Presets have names; every field can be overridden."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from fqjax.runtime.errors import InputError

Method = Literal["none", "absmax", "smoothquant", "flattenquant", "grouped"]
Rule = Literal["tukey", "mean", "search"]

PAPER_INT4_SHARE = 0.4829
"""Share of the linear layers' multiply-accumulates that the FlattenQuant paper computes in INT4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Everything that decides how a model is quantized.

    Attributes:
      name: preset this scheme started from.
      summary: one line: what it is and what it costs.
      method: "none" leaves the model in floating point; "absmax" takes one scale per tensor from the largest value;
        "smoothquant" smooths first; "flattenquant" smooths and flattens, with 4 or 8 bits layer by layer; "grouped" takes a
        scale for every output channel and group of input channels, and activations with a scale for every token.
      alpha: smoothing strength in [0, 1] (:mod:`fqjax.core.transforms.diagonal`); None for no smoothing.
      int4_share: least share of the linear multiply-accumulates in INT4, in [0, 1]; 1 for all layers but those that
        ``int8_layers`` keeps.
      selection: which layers that are: those whose quantization disturbs the model's output least ("sensitivity"), those
        whose own output's distribution changes least ("kl", as in the paper), or "budget": for every layer the bits and the
        number of extra channels, so that the sum of the disturbances is least.
      compression: with the selection "budget", how many times fewer bytes than in bfloat16 the linear weights take at least;
        0 for any number.  Where that cannot be had, nearly as few as can; where padding takes what INT4 saves, any number.
      int8_layers: regular expression; a layer in whose dotted path it is found is not quantized to INT4.  Empty for none.
      equalize: rescale output channels along the model's paths first (:mod:`fqjax.core.transforms.equalizing`).
      flatten_activations, flatten_weights: which operand may be flattened.
      int4_activation_bits: of the activations of layers with 4-bit weights: 4, or 8; with the method "grouped" also 16, for
        activations that stay in floating point (weight-only quantization).
      weight_scales: "tensor" for one scale a weight, "channel" for one every output channel.
      rounding: of the weights: "nearest", or "gptq", layer by layer, each making up for the errors before it
        (:mod:`fqjax.core.rounding.gptq`).
      upstream: with "gptq", how much of the error of the blocks in front a layer takes back, from 0 to 1
        (:mod:`fqjax.drivers.moments`); only of layers whose activations have 4 bits.
      threshold_rule: how it is decided where channels are cut: a rule (:mod:`fqjax.core.thresholds`), or "search" for the
        best thresholds and smoothing of each layer in INT4 (:mod:`fqjax.core.threshold_search`).
      threshold_strength, threshold_strength_int8: the rule's parameter for layers whose activations are in INT4, and in
        INT8, where a coarser cut does as well and costs fewer extra channels.
      max_expansion: most that a layer's K'/K may be, at least 1.
      activation_percentile: of a channel's magnitudes in the rows kept by calibration, which counts as its largest, from 50
        to 100; less than 100 lets single extreme tokens be clipped.  At 100 it is the largest of all rows that passed.
      group_size: with the method "grouped", how many neighbouring input channels share a scale: 16, 32, 64 or 128.
      scales: of the groups: "float"; "integer", times an amplifier and rounded, codes left as they are; or "folded", integers
        small enough to be multiplied into the codes (:mod:`fqjax.core.integer_scale`).
      amplifier: with integer scales, the most that they are multiplied with before they are rounded, a power of two.
      awq: with the method "grouped", scale input channels by their activations first (:mod:`fqjax.methods.grouped`).
      int8_head: whether the output head is quantized too: INT8, a scale for every token's row and for every hidden state;
        with it the embeddings where they are tied to it (:mod:`fqjax.layers.head`).
      sample_rows: rows of every layer's input kept by calibration to judge errors on.
    """

    name: str
    summary: str = ""
    method: Method
    alpha: float | None = 0.5
    int4_share: float = 0.0
    selection: Literal["sensitivity", "kl", "budget"] = "sensitivity"
    compression: float = 0.0
    int8_layers: str = ""
    equalize: bool = True
    flatten_activations: bool = True
    flatten_weights: bool = True
    int4_activation_bits: int = 4
    weight_scales: Literal["tensor", "channel"] = "tensor"
    rounding: Literal["nearest", "gptq"] = "nearest"
    upstream: float = 0.3
    threshold_rule: Rule = "tukey"
    threshold_strength: float = 0.25
    threshold_strength_int8: float = 3.0
    max_expansion: float = 1.25
    activation_percentile: float = 100.0
    group_size: int = 128
    scales: Literal["float", "integer", "folded"] = "float"
    amplifier: int = 1024
    awq: bool = False
    int8_head: bool = False
    sample_rows: int = 512

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), hints[field.name])
        _check_range("alpha", self.alpha, 0, 1)
        _check_range("int4_share", self.int4_share, 0, 1)
        _check_range("upstream", self.upstream, 0, 1)
        _check_range("compression", self.compression, 0, 4)
        _check_range("threshold_strength", self.threshold_strength, 0, 100)
        _check_range("threshold_strength_int8", self.threshold_strength_int8, 0, 100)
        _check_range("max_expansion", self.max_expansion, 1, 16)
        _check_range("activation_percentile", self.activation_percentile, 50, 100)
        _check_range("sample_rows", self.sample_rows, 1, 1 << 20)
        try:
            re.compile(self.int8_layers)
        except re.error as error:
            raise InputError(f"int8_layers={self.int8_layers}: not a regular expression ({error})") from None
        if self.int4_activation_bits not in (4, 8, 16):
            raise InputError(f"int4_activation_bits={self.int4_activation_bits}: expected 4, 8 or 16")
        if self.int4_activation_bits == 16 and (self.method, self.scales) != ("grouped", "float"):
            raise InputError("int4_activation_bits=16: expected method=grouped and scales=float with it")
        if self.group_size not in (16, 32, 64, 128):
            raise InputError(f"group_size={self.group_size}: expected 16, 32, 64 or 128")
        if self.amplifier not in [1 << i for i in range(21)]:
            raise InputError(f"amplifier={self.amplifier}: expected a power of two, 2**20 at most")

    @property
    def naive(self) -> bool:
        """Whether the scheme does without what holds the loss down in others: one to compare with rather than to use.

        Such are schemes that round every layer to the nearest code and make up for nothing (no smoothing, no flattening,
        neither GPTQ nor AWQ), and those that compute every layer in INT4, activations too, and spare none.
        """
        plain = self.method in ("absmax", "grouped") and self.rounding == "nearest" and not self.awq
        return plain or (self.int4_share == 1 and self.int4_activation_bits == 4 and not self.int8_layers)

    def kept_in_int8(self, names: Iterable[str]) -> set[str]:
        """The layers, by dotted path, that :attr:`int8_layers` keeps out of INT4.

        Raises:
          InputError: if there is a pattern, and it is found in none.
        """
        found = {name for name in names if self.int8_layers and re.search(self.int8_layers, name)}
        if self.int8_layers and not found:
            raise InputError(f"int8_layers={self.int8_layers}: found in the path of no linear layer")
        return found

    def override(self, settings: list[str] | tuple[str, ...]) -> "Scheme":
        """Returns the scheme with ``KEY=VALUE`` settings applied, as ``fqjax convert --set`` takes them.

        Raises:
          InputError: naming the key or value that does not fit.
        """
        hints = typing.get_type_hints(type(self))
        changes: dict[str, Any] = {}
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator:
                raise InputError(f"--set {setting}: expected KEY=VALUE")
            if key not in hints or key in ("name", "summary"):
                known = ", ".join(k for k in hints if k not in ("name", "summary"))
                raise InputError(f"--set {setting}: a scheme has no field {key!r}; its fields are: {known}")
            changes[key] = _parse(key, text, hints[key])
        return dataclasses.replace(self, **changes)


def _parse(key: str, text: str, hint: Any) -> Any:
    """Reads a field's value from text."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options and text.lower() == "none":
        return None
    kind = options[0]
    if typing.get_origin(kind) is Literal:
        return text
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False}
        if text.lower() not in words:
            raise InputError(f"{key}={text}: expected true or false")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{key}={text}: expected {_describe(hint)}") from None


def _check_type(key: str, value: Any, hint: Any) -> None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return
        elif (option is float and type(value) in (int, float)) or type(value) is option:
            return
    raise InputError(f"{key}={value}: expected {_describe(hint)}")


def _describe(hint: Any) -> str:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = {float: "a number", int: "a whole number", bool: "true or false", types.NoneType: "none", str: "text"}
    names = []
    for option in options:
        literal = typing.get_origin(option) is Literal
        names += [str(choice) for choice in typing.get_args(option)] if literal else [words[option]]
    return " or ".join(names)


def _check_range(key: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise InputError(f"{key}={value}: expected a number from {low} to {high}")


SEARCHED: dict[str, Any] = {
    "threshold_rule": "search",
    "rounding": "gptq",
    "selection": "budget",
    "max_expansion": 1.5,
}
"""Thresholds and bits looked for layer by layer, weights rounded by GPTQ."""
FOR_HOPPER: dict[str, Any] = {"int4_activation_bits": 8, "weight_scales": "channel", "rounding": "gptq"}
"""INT8 activations and a scale for every output channel, which cost a Hopper GPU nothing."""


def _grouped_presets() -> Iterator[Scheme]:
    """W4A8 with three kinds of scales and W4A16, in groups of 128, each with three ways to come to the codes."""
    kinds: dict[str, tuple[Literal["float", "integer", "folded"], str]] = {
        "w4a8": (
            "float",
            "INT4 weights with a float scale for each group of 128 channels, INT8 activations with one a token",
        ),
        "w4a8-integer-scale": (
            "integer",
            "The same with integer scales, so that all sums stay in int32 (Integer Scale)",
        ),
        "w4a8-integer-scale-folded": (
            "folded",
            "The same with integer scales so small that they are multiplied into the codes",
        ),
        "w4a16": (
            "float",
            "INT4 weights with a float scale for each group of 128 channels, activations in bfloat16 (weight-only)",
        ),
    }
    for name, (scales, what) in kinds.items():
        common: dict[str, Any] = {
            "method": "grouped",
            "int4_share": 1.0,
            "equalize": False,
            "alpha": None,
            "scales": scales,
            "int4_activation_bits": 16 if name == "w4a16" else 8,
        }
        yield Scheme(name=name, summary=f"{what}.", **common)
        yield Scheme(name=f"{name}-gptq", rounding="gptq", summary=f"{name} with weights rounded by GPTQ.", **common)
        yield Scheme(
            name=f"{name}-awq", awq=True, summary=f"{name} with channels scaled by their activations (AWQ).", **common
        )


PRESETS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="bf16",
            method="none",
            summary="No quantization: the reference that every other scheme is compared with.",
        ),
        Scheme(
            name="w8a8",
            method="absmax",
            alpha=None,
            equalize=False,
            summary="INT8, one scale per tensor from the largest value. Breaks on models with outlier channels.",
        ),
        Scheme(
            name="smoothquant",
            method="smoothquant",
            equalize=False,
            summary="INT8, one scale per tensor, ranges moved from activations to weights (SmoothQuant).",
        ),
        Scheme(
            name="flattenquant",
            method="flattenquant",
            int4_share=PAPER_INT4_SHARE,
            compression=2.4,
            **SEARCHED,
            summary="Large channels flattened, one scale per tensor, INT4 (W4A4) for at least 48.29 % of the linear "
            "multiply-accumulates and INT8 for the rest (FlattenQuant).",
        ),
        Scheme(
            name="flattenquant-w4a4",
            method="flattenquant",
            int4_share=1.0,
            compression=3.6,
            **SEARCHED,
            summary="The same with INT4 throughout, activations too; the loss shows.",
        ),
        Scheme(
            name="flattenquant-w8a8",
            method="flattenquant",
            summary="Large channels flattened, one scale per tensor, INT8 throughout. Nearly free of loss.",
        ),
        Scheme(
            name="flattenquant-hopper",
            method="flattenquant",
            int4_share=PAPER_INT4_SHARE,
            **FOR_HOPPER,
            summary="INT4 weights for at least 48.29 % of the multiply-accumulates, INT8 activations throughout: as fast as "
            "INT4 ones on a GPU without INT4 tensor cores, and more accurate.",
        ),
        Scheme(
            name="flattenquant-hopper-int4",
            method="flattenquant",
            int4_share=1.0,
            **FOR_HOPPER,
            summary="The same with INT4 weights throughout.",
        ),
        *_grouped_presets(),
    )
}


def resolve_scheme(scheme: str | Scheme) -> Scheme:
    """Looks a preset up by name; a :class:`Scheme` is returned as it is.

    Raises:
      InputError: naming the presets, if there is none of that name.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in PRESETS:
        raise InputError(f"unknown scheme {scheme!r}; the schemes are: {', '.join(PRESETS)}")
    return PRESETS[scheme]
