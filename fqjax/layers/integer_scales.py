"""Integer Scale for a layer that is quantized already: group scales become integers, codes stay as they are."""

import dataclasses

import jax.numpy as jnp

from fqjax.core.formats.grouped import Grouped, GroupedTensor, group_sums_of
from fqjax.core.integer_scale import AMPLIFIER, amplify, channel_units, narrow, safe_amplifier
from fqjax.layers.linear import QuantizedLinear


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
