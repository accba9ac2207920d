"""Schemes: which method quantizes a model, with which settings, and what is left out of it."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from fqjax.drivers.method import Method
from fqjax.registry import from_fields, to_json
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject
from fqjax.runtime.overrides import overridden, split
from fqjax.runtime.patterns import compile_pattern
from fqjax.runtime.settings import Settings

if TYPE_CHECKING:
    from fqjax.layers.surgery import Selection

Kept = Literal["int8", "float"]


@dataclasses.dataclass(frozen=True)
class Rule(Settings):
    """Rule on the layers in whose dotted path a pattern is found (``re.search``).

    Attributes:
      pattern: regular expression.
      keep: "int8" for layers that are not quantized to INT4, "float" for those that are not quantized.
    """

    pattern: str
    keep: Kept

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise InputError(f"rule: pattern of type {type(self.pattern).__name__}: expected a regular expression")
        if isinstance(self.keep, Method):
            raise InputError(
                f"rule {self.pattern!r}: a method for some layers only is not supported; expected int8 or float"
            )
        super().__post_init__()
        compile_pattern(self.pattern, self.label)

    def applies_to(self, name: str) -> bool:
        """Whether the pattern is found in a dotted path."""
        return re.search(self.pattern, name) is not None

    @property
    def label(self) -> str:
        """The rule as a setting."""
        return f"{'int8_layers' if self.keep == 'int8' else 'float_layers'}={self.pattern}"


@dataclasses.dataclass(frozen=True)
class Scheme(Settings):
    """Everything that decides how a model is quantized.

    Attributes:
      name: preset this scheme started from.
      summary: one line: what it is and what it costs.
      method: a published method with its settings (:mod:`fqjax.methods`); None leaves the model in floating point.
      rules: layers that are kept out of INT4, or out of quantization; of several rules for a layer, the first wins.
      head: "int8" to quantize the output head too: INT8, a scale for every token's row and for every hidden state; with it
        the embeddings where they are tied to it (:mod:`fqjax.layers.head`).
      sample_rows: rows of every layer's input kept by calibration to judge errors on.
    """

    fixed: ClassVar[tuple[str, ...]] = ("name", "summary", "rules")

    name: str
    summary: str
    method: Method | None
    rules: tuple[Rule, ...] = ()
    head: Literal["int8"] | None = None
    sample_rows: Annotated[int, Ge(1), Le(1 << 20)] = 512

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.method is None:
            yield "rules", "the scheme quantizes no layer"
            yield "sample_rows", "the scheme quantizes no layer"

    @property
    def calibration(self) -> Literal["none", "optional", "needed"]:
        """Whether the scheme has calibration data run through the model: it never does, it may, or it has to."""
        if self.method is None:
            return "none"
        return "optional" if self.method.data_free else "needed"

    @property
    def naive(self) -> bool:
        """Whether the scheme does without what holds the loss down in others: one to compare with rather than to use.

        Such are schemes that round every layer to the nearest code and make up for nothing (no smoothing, no flattening,
        neither GPTQ nor AWQ), and those that compute every layer in INT4, activations too, and spare none.
        """
        if self.method is None:
            return False
        whole = self.method.allocation.int4_share == 1 and self.method.coarse_activations
        return self.method.naive or (whole and not any(rule.keep == "int8" for rule in self.rules))

    def export_obstacle(self, unfoldable: str | None = None) -> str | None:
        """Why a model quantized with the scheme cannot be exported in the format compressed-tensors, as far as is known.

        Args:
          unfoldable: why smoothing cannot be folded in the model at hand (:func:`fqjax.rewrites.fold.folding_obstacle`);
            None where it can, or no model is given.

        Returns:
          The reason; None if nothing is known to stand in the way.
        """
        method = self.method
        if method is None:
            return "nothing is quantized"
        if self.head is not None:
            return "the output head is in INT8, which readers expect in floating point"
        if method.flattens:
            return "it flattens channels"
        if method.coarse_activations and method.allocation.int4_share > 0:
            return "activations have 4 bits"
        return unfoldable if method.smooths else None

    def kept(self, names: Iterable[str]) -> dict[str, Kept]:
        """Number format that the rules keep layers in, by dotted path; layers that no rule applies to are not in it.

        Raises:
          InputError: if a rule's pattern is found in none of the paths.
        """
        names = list(names)
        for rule in self.rules:
            if not any(rule.applies_to(name) for name in names):
                raise InputError(f"{rule.label}: found in the path of no linear layer")
        kept: dict[str, Kept | None] = {name: self._keep(name) for name in names}
        return {name: keep for name, keep in kept.items() if keep is not None}

    def __post_init__(self) -> None:
        for name in ("name", "summary"):
            if not isinstance(value := getattr(self, name), str):
                raise InputError(f"scheme: {name} of type {type(value).__name__}: expected a text")
        super().__post_init__()

    def applied(self, selection: "Selection") -> "Selection":
        """A model's layers, those that a rule keeps in floating point among those to leave.

        Raises:
          InputError: if a rule's pattern is found in the path of no layer to quantize.
        """
        kept = self.kept(selection.linears)
        return selection.leaving({name: "left in float by a rule" for name, keep in kept.items() if keep == "float"})

    def kept_in_int8(self, names: Iterable[str]) -> set[str]:
        """The layers, by dotted path, that the rules keep out of INT4; they need not be all of a model's."""
        return {name for name in names if self._keep(name) == "int8"}

    def _keep(self, name: str) -> Kept | None:
        return next((rule.keep for rule in self.rules if rule.applies_to(name)), None)

    def override(self, settings: Iterable[str]) -> "Scheme":
        """The scheme with ``KEY=VALUE`` settings applied, as ``fqjax convert --set`` takes them.

        Keys are the fields of the method and of its parts (dotted where two have one of the name), ``sample_rows``,
        ``head``, and two in words of their own: ``int8_head=true`` and ``int8_layers=REGEX``, for a rule.

        Raises:
          InputError: naming the key or value that does not fit, the setting that has no effect, or what is set twice.
        """
        scheme, others, pattern = self, [], None
        for key, text in map(split, settings):
            if key == "int8_layers":
                if pattern is not None:
                    raise InputError(
                        f"--set {key}={text}: {key}={pattern} is set too; expected one, as {pattern}|{text}"
                    )
                pattern = text
                rules = tuple(rule for rule in scheme.rules if rule.keep != "int8")
                scheme = dataclasses.replace(scheme, rules=(*rules, Rule(text, "int8")) if text else rules)
            elif key == "int8_head":
                if text.lower() not in _HEADS:
                    raise InputError(f"int8_head={text}: expected true or false")
                others.append(f"head={_HEADS[text.lower()]}")
            else:
                others.append(f"{key}={text}")
        return overridden(scheme, others, f"scheme {self.name!r}", ("int8_head", "int8_layers"))

    def to_json(self) -> JsonObject:
        """The scheme as JSON has it; a checkpoint keeps it as a record of what its layers were quantized with."""
        return to_json(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object], where: str = "") -> "Scheme":
        """The scheme that :meth:`to_json` described.

        Raises:
          InputError: if it names a method that is not known, or an entry is missing, unknown or of the wrong type.
        """
        return from_fields(cls, values, where)

    def recipe(self) -> str:
        """:meth:`to_json` as text."""
        return json.dumps(self.to_json())


_HEADS = {"true": "int8", "1": "int8", "false": "none", "0": "none"}
