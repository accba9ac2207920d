"""Finding the linear layers of any NNX model, and putting other modules in their place."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from flax import nnx

from fqjax.runtime.errors import InputError

ModelT = TypeVar("ModelT", bound=nnx.Module)

HEAD_PATTERN = r"(^|\.)(lm_head|head|unembed|router)$"
"""Layers left alone in any model: output heads and expert routers, by their usual names."""


class Selection(NamedTuple):
    """The linear layers of a model, by dotted path, split into those to quantize and those to leave.

    Attributes:
      linears: layers to quantize.
      skipped: layers to leave in float, each with the reason.
    """

    linears: dict[str, nnx.Linear]
    skipped: dict[str, str]

    def leaving(self, reasons: Mapping[str, str]) -> "Selection":
        """The selection with some of the layers to quantize among those to leave, each with the reason."""
        linears = {name: linear for name, linear in self.linears.items() if name not in reasons}
        return Selection(linears, self.skipped | dict(reasons))


def dotted(path: Iterable[object]) -> str:
    """A module's path as text: ``layers.0.mlp.down_proj``."""
    return ".".join(str(part) for part in path)


def find_linears(model: nnx.Module) -> dict[str, nnx.Linear]:
    """Every ``nnx.Linear`` of the model by its dotted path; a layer reached by several paths is listed once.

    Subclasses count too, unless they compute something else (override ``__call__``).
    """
    return {
        dotted(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear) and type(node).__call__ is nnx.Linear.__call__
    }


def select_linears(model: nnx.Module, ignore: Iterable[str] = (), *, required: bool = True) -> Selection:
    """Decides which linear layers are quantized.

    Args:
      model: any NNX module.
      ignore: regular expressions; a layer is left in float if one of them is found in its dotted path
        (``re.search``).
      required: whether a model without a layer to quantize is an error.

    Raises:
      InputError: if a pattern is not a regular expression or matches no layer, if a layer's weights are stacked (as
        ``nnx.vmap`` and ``nnx.scan`` make them), or if the model has no layer to quantize.
    """
    found = find_linears(model)
    reasons = [(re.compile(p), "kept in float by the model") for p in getattr(model, "keep_in_float", ())]
    reasons.append((re.compile(HEAD_PATTERN), "an output head or router"))
    for text in ignore:
        pattern = _compile(text)
        if not any(pattern.search(name) for name in found):
            raise InputError(f"--ignore {text!r} matches no linear layer; the layers are: {_shorten(found)}")
        reasons.append((pattern, f"ignored by {text!r}"))
    selection = Selection({}, {})
    for name, linear in found.items():
        reason = next((why for pattern, why in reasons if pattern.search(name)), None)
        if reason:
            selection.skipped[name] = reason
            continue
        if linear.kernel.shape != (linear.in_features, linear.out_features):
            raise InputError(
                f"{name}: its weight has shape {linear.kernel.shape}, expected "
                f"{(linear.in_features, linear.out_features)}; layers stacked by vmap or scan are not supported"
            )
        selection.linears[name] = linear
    if required and not selection.linears:
        raise InputError(f"{type(model).__name__} has no nnx.Linear layer to quantize (of {len(found)} found)")
    return selection


def replace_modules(model: ModelT, replacements: Mapping[str, nnx.Module] | Callable[[str, Any], object]) -> ModelT:
    """Returns a copy of the model with modules replaced; the original keeps its modules and its state.

    Args:
      model: any NNX module.
      replacements: new modules by dotted path, or a function of path and module that returns the module to use.

    A module that is reached by several paths is replaced at all of them by the same object.
    """
    swap = replacements if callable(replacements) else lambda name, node: replacements.get(name, node)
    return nnx.recursive_map(lambda path, node: swap(dotted(path), node), nnx.clone(model))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"--ignore {pattern!r} is not a regular expression: {error}") from None


def _shorten(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
