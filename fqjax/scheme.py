"""Schemes: which method quantizes a model, with which settings.  Presets have names; every field can be overridden."""

import dataclasses
import types
import typing
from typing import Any, Literal

from fqjax.core.thresholds import Rule
from fqjax.errors import InputError

Method = Literal["none", "absmax", "smoothquant", "flattenquant"]

PAPER_INT4_SHARE = 0.4829
"""Share of the linear layers' multiply-accumulates that the FlattenQuant paper computes in INT4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Everything that decides how a model is quantized.

    Attributes:
      name: preset this scheme started from.
      summary: one line: what it is and what it costs.
      method: "none" leaves the model in floating point; "absmax" takes one scale per tensor from the largest value;
        "smoothquant" smooths first; "flattenquant" smooths and flattens, with 4 or 8 bits layer by layer.
      alpha: smoothing strength in [0, 1] (:mod:`fqjax.core.smoothing`); None for no smoothing.
      int4_share: least share of the linear multiply-accumulates in INT4, in [0, 1].
      equalize: rescale output channels along the model's paths first (:mod:`fqjax.core.equalization`).
      flatten_activations, flatten_weights: which operand may be flattened.
      threshold_rule: how it is decided where channels are cut (:mod:`fqjax.core.thresholds`).
      threshold_strength, threshold_strength_int8: the rule's parameter for layers in INT4, and in INT8, where a coarser
        cut does as well and costs fewer extra channels.
      max_expansion: most that a layer's K'/K may be, at least 1.
      sample_rows: rows of every layer's input kept by calibration to judge errors on.
    """

    name: str
    summary: str = ""
    method: Method
    alpha: float | None = 0.5
    int4_share: float = 0.0
    equalize: bool = True
    flatten_activations: bool = True
    flatten_weights: bool = True
    threshold_rule: Rule = "tukey"
    threshold_strength: float = 0.25
    threshold_strength_int8: float = 3.0
    max_expansion: float = 1.25
    sample_rows: int = 512

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), hints[field.name])
        _check_range("alpha", self.alpha, 0, 1)
        _check_range("int4_share", self.int4_share, 0, 1)
        _check_range("threshold_strength", self.threshold_strength, 0, 100)
        _check_range("threshold_strength_int8", self.threshold_strength_int8, 0, 100)
        _check_range("max_expansion", self.max_expansion, 1, 16)
        _check_range("sample_rows", self.sample_rows, 1, 1 << 20)

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
            summary="Large channels flattened, one scale per tensor, INT4 (W4A4) for at least 48.29 % of the linear "
            "multiply-accumulates and INT8 for the rest (FlattenQuant, as published).",
        ),
        Scheme(
            name="flattenquant-w8a8",
            method="flattenquant",
            summary="Large channels flattened, one scale per tensor, INT8 throughout. Nearly free of loss.",
        ),
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
