"""Integer Scale for models that are quantized already: group scales become integers, codes stay as they are."""

import dataclasses
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from fqjax.core.integer_scale import AMPLIFIER, amplify, channel_units, narrow, safe_amplifier
from fqjax.core.qtensor import QTensor
from fqjax.layers.linear import QuantizedLinear, group_sums_of, measured_bound
from fqjax.layers.stacked import stacked, unstacked
from fqjax.layers.surgery import replace_modules
from fqjax.report.report import Report, quantized_layers, report_of
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
    layers = {
        name: layer
        for name, layer in quantized_layers(model).items()
        if layer.weight.get_value().format.group_size
        and not layer.weight.get_value().format.integer_scales
        and layer.input.get_value().bits < 16
    }
    if not layers:
        raise InputError("integer_scales: expected a model with float scales for groups of channels; it has none")
    changed = replace_modules(
        model, {name: with_integer_scales(layer, amplifier, units) for name, layer in layers.items()}
    )
    return stacked(changed), report_of(changed)


def with_integer_scales(layer: QuantizedLinear, amplifier: int = AMPLIFIER, units: bool = True) -> QuantizedLinear:
    """One layer with integer scales; the layer itself if no amplifier is safe."""
    weight, quantizer = layer.weight.get_value(), layer.input.get_value()
    assert weight.group_scale is not None
    sums = group_sums_of(weight)
    used = sums > 0  # The scale of a group without codes, such as padding, means nothing.
    unit = channel_units(jnp.where(used, weight.group_scale, 0)) if units else jnp.float32(1)
    unit = jnp.where(unit > 0, unit, 1.0)
    scales = jnp.where(used, weight.group_scale / unit, 1.0)
    found = safe_amplifier(scales, sums, x_qmax=quantizer.qmax, bits=layer.bits, most=amplifier)
    if found is None:
        return layer
    form = dataclasses.replace(weight.format, integer_scales=True)
    changed = QTensor(weight.codes, weight.scale * unit / found, form, narrow(amplify(scales, found)))
    bound = measured_bound(changed, quantizer)
    return QuantizedLinear(
        changed,
        quantizer,
        None if layer.bias is None else layer.bias[...],
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        summary=dataclasses.replace(layer.summary, accumulator_bound=bound),
    )
