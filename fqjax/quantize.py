"""From a float model to one that runs on integers: calibrate, divide the bits among the layers, quantize, replace.

model, scheme, data  ->  statistics of every linear layer   (fqjax.drivers.statistics)
->  4 or 8 bits for each of them       (fqjax.core.allocation)
->  integer view of each               (fqjax.methods)
->  expanded layers in a new model     (fqjax.drivers.assemble, fqjax.layers.linear, fqjax.layers.surgery)

All but the last goes block by block (fqjax.drivers.pipeline), and does so too when `fqjax convert` streams a checkpoint.
"""

import time
from collections.abc import Iterable, Mapping
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from fqjax.core.integer_scale import AMPLIFIER
from fqjax.drivers.pipeline import quantize_blocks
from fqjax.drivers.store import Store
from fqjax.layers.head import head_of, with_int8_head
from fqjax.layers.integer_scales import has_float_groups, with_integer_scales
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.record import automatic_axes
from fqjax.layers.stacked import quantized_layers, stacked, unstacked
from fqjax.layers.surgery import replace_modules, select_linears, spoken
from fqjax.methods import IntegerScale
from fqjax.models.batches import checked_batches
from fqjax.models.chain import chain, with_auto_axes
from fqjax.models.checks import check_model
from fqjax.presets import check_data_free, resolve_scheme
from fqjax.report.growth import say_what_grew
from fqjax.report.report import Report, report_of
from fqjax.rewrites.equalize import equalize
from fqjax.runtime.arguments import check_flag, check_texts
from fqjax.runtime.errors import InputError
from fqjax.scheme import Scheme

ModelT = TypeVar("ModelT", bound=nnx.Module)


@automatic_axes()
def quantize(
    model: ModelT,
    scheme: str | Scheme = "flattenquant",
    calibration: Iterable[object] | None = None,
    *,
    ignore: Iterable[str] = (),
) -> tuple[ModelT, Report]:
    """Quantizes every linear layer of a model.

    Args:
      model: any ``nnx.Module`` that contains ``nnx.Linear`` layers, nested in any way, called any number of times.  It
        is not changed.  Embeddings, norms, output heads and expert routers stay in floating point.
      scheme: name of a preset (see :data:`fqjax.PRESETS`) or a :class:`fqjax.Scheme`.
      calibration: any iterable of model inputs, for a language model int32 token batches [batch, length].  Without it,
        the model is not run, and scales are chosen by the weights alone; only some schemes can do so, as "w4a16" and
        "w4a8" (:attr:`fqjax.Scheme.calibration`).
      ignore: regular expressions; a layer stays in float where one of them is found in its dotted path.

    Returns:
      A new model of the same class whose linear layers are :class:`~fqjax.layers.linear.QuantizedLinear`, and a
      :class:`~fqjax.report.report.Report`.

    Raises:
      InputError: for an unknown scheme, a pattern that matches nothing, a model without linear layers, missing
        calibration data, a weight or an activation that is not finite, an accumulator that could overflow.
    """
    scheme, ignore = resolve_scheme(scheme), check_texts("ignore", ignore)
    check_model(model)
    start, model = time.perf_counter(), with_auto_axes(model)
    selection = scheme.applied(select_linears(model, ignore))
    check_finite(selection.linears)
    if scheme.head:
        head_of(model)  # Before the work begins.
    if scheme.method is None:
        copied = with_int8_head(model) if scheme.head else nnx.clone(model)
        return copied, report_of(copied, skipped=selection.skipped)
    if calibration is None:
        check_data_free(scheme)
    batches = None if calibration is None else checked_batches(model, calibration)
    model = equalize(model) if scheme.method.equalize else model
    linears = scheme.applied(select_linears(model, ignore)).linears
    layers: dict[str, QuantizedLinear] = {}
    record = quantize_blocks(Store(), chain(model, linears), linears, scheme, batches, layers.update)
    quantized = replace_modules(model, layers)
    layers.clear()
    stacked(quantized, in_place=True)
    quantized = with_int8_head(quantized) if scheme.head else quantized
    report = report_of(quantized, time.perf_counter() - start, record, selection.skipped)
    say_what_grew(report)
    return quantized, report


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
    check_model(model)
    amplifier = IntegerScale(amplifier=amplifier).amplifier  # It refuses one that is out of range.
    check_flag("units", units)
    model = unstacked(model)
    layers = {name: layer for name, layer in quantized_layers(model).items() if has_float_groups(layer)}
    if not layers:
        raise InputError("integer_scales: expected a model with float scales for groups of channels; it has none")
    changed = replace_modules(
        model, {name: with_integer_scales(layer, amplifier, units) for name, layer in layers.items()}
    )
    return stacked(changed), report_of(changed)


def check_finite(linears: Mapping[str, nnx.Linear]) -> None:
    """Refuses a model that holds NaN or infinity.

    Raises:
      InputError: naming the layer.
    """
    for name, linear in linears.items():
        for what, values in (("weight", linear.kernel), ("bias", linear.bias)):
            if values is not None and not bool(jnp.isfinite(values[...]).all()):
                raise InputError(f"{spoken(name)}: its {what} holds a value that is not finite")
