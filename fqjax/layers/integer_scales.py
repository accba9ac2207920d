"""Integer Scale for models that are quantized already: group scales become integers, codes stay as they are."""

import dataclasses
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from fqjax.core.formats.grouped import Grouped, GroupedTensor, group_sums_of
from fqjax.core.integer_scale import AMPLIFIER, amplify, channel_units, narrow, safe_amplifier
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.stacked import quantized_layers, stacked, unstacked
from fqjax.layers.surgery import replace_modules
from fqjax.report.report import Report, report_of
from fqjax.runtime.errors import InputError

ModelT = TypeVar("ModelT", bound=nnx.Module)


def integer_scales(model: ModelT, amplifier: int = AMPLIFIER, *, units: bool = True) -> tuple[ModelT, Report]:
    """Gives a grouped quantized model integer scales, however it was quantized.

    Args:
      model: a model with layers that have integer activations, and float scales for groups of input channels; it is not
        changed.
      amplifier: most that scales are multiplied with before they are rounded, a power of two.  A layer whose accumulator
        could overflow takes a smaller one; a layer for which none is safe keeps its float scales.
      units: divide the scales of an output channel by the largest first; without, they are amplified as they are, as in the
        paper (:mod:`fqjax.core.integer_scale`).

    Returns:
      A new model, and the report on it, in which ``scales`` says what became of each layer.  The layers' errors in it are
      those measured with float scales.

    Raises:
      InputError: if no layer has float scales for groups.
    """
    model = unstacked(model)
    layers = {name: layer for name, layer in quantized_layers(model).items() if has_float_groups(layer)}
    if not layers:
        raise InputError("integer_scales: expected a model with float scales for groups of channels; it has none")
    changed = replace_modules(
        model, {name: with_integer_scales(layer, amplifier, units) for name, layer in layers.items()}
    )
    return stacked(changed), report_of(changed)


def with_integer_scales(layer: QuantizedLinear, amplifier: int = AMPLIFIER, units: bool = True) -> QuantizedLinear:
    """One layer with integer scales; the layer itself if no amplifier is safe, or it has no float scales of groups."""
    weight, quantizer = layer.weight.get_value(), layer.input.get_value()
    if not has_float_groups(layer):
        return layer
    sums = group_sums_of(weight)
    used = sums > 0  # The scale of a group without codes, such as padding, means nothing.
    unit = channel_units(jnp.where(used, weight.group_scale, 0)) if units else jnp.float32(1)
    unit = jnp.where(unit > 0, unit, 1.0)
    scales = jnp.where(used, weight.group_scale / unit, 1.0)
    found = safe_amplifier(scales, sums, x_qmax=quantizer.qmax, bits=layer.bits, most=amplifier)
    if found is None:
        return layer
    scale = weight.scale * unit / found
    form = dataclasses.replace(weight.format, scales="integer", granularity="channel" if scale.ndim else "tensor")
    integers = narrow(amplify(scales, found))
    changed = GroupedTensor(codes=weight.codes, scale=scale, group_scale=integers, format=form)
    figures = dataclasses.replace(layer.figures, accumulator_bound=changed.bound(quantizer.qmax))
    return layer.changed(changed, quantizer, figures)


def has_float_groups(layer: QuantizedLinear) -> bool:
    """Whether a layer has float scales of groups, and integer activations."""
    form = layer.weight.get_value().format
    return isinstance(form, Grouped) and form.scales == "float" and layer.input.get_value().qmax is not None
