"""Finding the linear layers of any NNX model, and putting other modules in their place."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import lax

from fqjax.layers.containers import freeze, thaw
from fqjax.layers.linear import QuantizedVariable
from fqjax.layers.modules import HOW, is_bridged
from fqjax.runtime.arguments import check_texts
from fqjax.runtime.errors import InputError
from fqjax.runtime.patterns import compile_pattern

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


def spoken(name: str) -> str:
    """A layer's dotted path in a message; that of a model which is a layer itself is empty."""
    return name or "the model"


def find_linears(model: nnx.Module) -> dict[str, nnx.Linear]:
    """Every ``nnx.Linear`` of the model by its dotted path; a layer reached by several paths is listed once.

    Subclasses count too, unless they compute something else (override ``__call__``).

    Raises:
      InputError: if a layer has the path of another module, as attributes without a name or with dots in it make them.
    """
    modules = [(dotted(path), node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    counts = Counter(name for name, _ in modules)
    found = {
        name: node
        for name, node in modules
        if isinstance(node, nnx.Linear) and type(node).__call__ is nnx.Linear.__call__
    }
    for name in found:
        if counts[name] > 1:
            raise InputError(
                f"layer {name!r}: another module has this path too; expected names of attributes without dots"
            )
    return found


def select_linears(model: nnx.Module, ignore: Iterable[str] = (), *, required: bool = True) -> Selection:
    """Decides which linear layers are quantized.

    Args:
      model: any NNX module.
      ignore: regular expressions; a layer is left in float if one of them is found in its dotted path
        (``re.search``).
      required: whether a model without a layer to quantize is an error, and one with stacked layers that are not ignored.

    Raises:
      InputError: if a pattern is not a regular expression or matches no layer, if a layer's weights are stacked (as
        ``nnx.vmap`` and ``nnx.scan`` make them), or if the model has no layer to quantize.
    """
    found = find_linears(model)
    reasons = [
        (compile_pattern(p, f"keep_in_float {p!r}"), "kept in float by the model")
        for p in getattr(model, "keep_in_float", ())
    ]
    reasons.append((re.compile(HEAD_PATTERN), "an output head or router"))
    for text in check_texts("ignore", ignore):
        pattern = compile_pattern(text, f"--ignore {text!r}")
        if not any(pattern.search(name) for name in found):
            raise InputError(f"--ignore {text!r} matches no linear layer; the layers are: {shorten(found)}")
        reasons.append((pattern, f"ignored by {text!r}"))
    selection = Selection({}, {})
    for name, linear in found.items():
        reason = next((why for pattern, why in reasons if pattern.search(name)), None) or _of_its_own(linear)
        whole = linear.kernel.shape == (linear.in_features, linear.out_features)
        if not reason and not whole and required:
            raise InputError(
                f"{spoken(name)}: its weight has shape {linear.kernel.shape}, expected "
                f"{(linear.in_features, linear.out_features)}; layers stacked by vmap or scan are not supported, but may be "
                "ignored"
            )
        if reason or not whole:
            selection.skipped[name] = reason or "stacked by vmap or scan"
        else:
            selection.linears[name] = linear
    if required and not selection.linears:
        if any(isinstance(node, QuantizedVariable) for _, node in nnx.iter_graph(model)):
            raise InputError(f"{type(model).__name__} is quantized already; expected a model in floating point")
        if is_bridged(model):
            raise InputError(
                f"model: {type(model).__name__} has no nnx.Linear, but linen modules in nnx.bridge.ToNNX; {HOW}"
            )
        why = "".join(f"; {spoken(name)}: {reason}" for name, reason in list(selection.skipped.items())[:1])
        raise InputError(f"{type(model).__name__} has no nnx.Linear layer to quantize (of {len(found)} found{why})")
    return selection


def left_in_float(model: nnx.Module) -> dict[str, str]:
    """Modules with a matrix of weights that are no layer which could be quantized, by dotted path, each with the reason."""
    linears = find_linears(model)
    reasons = {}
    for path, node in nnx.iter_graph(model):
        name = dotted(path)
        if not isinstance(node, nnx.Module) or name in linears:
            continue
        if any(isinstance(part, nnx.Param) and len(np.shape(part)) > 1 for part in vars(node).values()):
            reasons[name] = _of_its_kind(node)
    return reasons


def _of_its_kind(node: nnx.Module) -> str:
    """Why a module is not quantized that is no ``nnx.Linear``."""
    if isinstance(node, nnx.Embed):
        return "an embedding"
    if isinstance(node, nnx.Linear):
        return f"{type(node).__name__} computes something else than nnx.Linear"
    return f"of kind {type(node).__name__}; nnx.Linear is quantized alone"


def _of_its_own(linear: nnx.Linear) -> str | None:
    """Why a layer is no product of real numbers that codes can stand for; None if it is one.

    A function given for the product, or for what is done to its factors, may compute anything.
    """
    if linear.dot_general is not lax.dot_general:
        return "computes its product with a dot_general of its own"
    if linear.promote_dtype is not nnx_dtypes.promote_dtype:
        return "has a promote_dtype of its own"
    kinds = [linear.kernel.get_value().dtype, linear.dtype, linear.preferred_element_type]
    for kind in kinds:
        if kind is not None and not jnp.issubdtype(kind, jnp.floating):
            return f"computes in {jnp.dtype(kind).name}"
    if not linear.in_features or not linear.out_features:
        return f"has no channels: {linear.in_features} inputs, {linear.out_features} outputs"
    return None


def replace_modules(model: ModelT, replacements: Mapping[str, nnx.Module] | Callable[[str, Any], object]) -> ModelT:
    """Returns a copy of the model with modules replaced; the original keeps its modules and its state.

    Args:
      model: any NNX module.
      replacements: new modules by dotted path, or a function of path and module that returns the module to use.

    A module that is reached by several paths is replaced at all of them by the same object.
    """
    swap = replacements if callable(replacements) else lambda name, node: replacements.get(name, node)
    copy = nnx.clone(model)
    thawed = thaw(copy)
    changed = nnx.recursive_map(lambda path, node: swap(dotted(path), node), copy)
    freeze(changed, thawed)
    return changed


def shorten(names: Iterable[str], most: int = 8) -> str:
    """Names in a message, but not all of very many."""
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
