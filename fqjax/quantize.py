"""From a float model to one that runs on integers: calibrate, divide the bits among the layers, quantize, replace.

model, scheme, data  ->  statistics of every linear layer   (fqjax.calibration)
->  4 or 8 bits for each of them       (fqjax.core.selection)
->  integer view of each               (fqjax.methods)
->  expanded layers in a new model     (fqjax.linear, fqjax.surgery)
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from fqjax.blocks import Simulated
from fqjax.calibration import Statistics, calibrate
from fqjax.compensate import compensate
from fqjax.core.codes import qmax
from fqjax.core.flatten import expansion, flatten_codes
from fqjax.core.wide import WideLinear, relative_error, relative_square
from fqjax.equalize import equalize
from fqjax.errors import InputError
from fqjax.findings import Findings
from fqjax.integer_scale import with_integer_scales
from fqjax.linear import LayerSummary, QuantizedLinear, measured_bound
from fqjax.memo import Memo
from fqjax.methods import LayerInputs
from fqjax.models.head import head_of, with_int8_head
from fqjax.options import Option, costs_by_bits, layer_inputs, layer_options, select
from fqjax.progress import track
from fqjax.qtensor import InputQuantizer, QTensor
from fqjax.report import Report, report_of
from fqjax.scheme import Scheme, resolve_scheme
from fqjax.sensitivity import output_sensitivity
from fqjax.surgery import find_linears, replace_modules, select_linears

ModelT = TypeVar("ModelT", bound=nnx.Module)


def quantize(
    model: ModelT,
    scheme: str | Scheme = "flattenquant",
    calibration: Iterable[Any] | None = None,
    *,
    ignore: Iterable[str] = (),
) -> tuple[ModelT, Report]:
    """Quantizes every linear layer of a model.

    Args:
      model: any ``nnx.Module`` that contains ``nnx.Linear`` layers, nested in any way, called any number of times.  It
        is not changed.  Embeddings, norms, output heads and expert routers stay in floating point.
      scheme: name of a preset (see :data:`fqjax.PRESETS`) or a :class:`fqjax.Scheme`.
      calibration: any iterable of model inputs, for a language model int32 token batches [batch, length].  Every scheme
        but "bf16" needs it.
      ignore: regular expressions; a layer stays in float where one of them is found in its dotted path.

    Returns:
      A new model of the same class whose linear layers are :class:`~fqjax.linear.QuantizedLinear`, and a
      :class:`~fqjax.report.Report`.

    Raises:
      InputError: for an unknown scheme, a pattern that matches nothing, a model without linear layers, missing
        calibration data, a weight or an activation that is not finite, an accumulator that could overflow.
    """
    scheme = resolve_scheme(scheme)
    start = time.perf_counter()
    check_finite(select_linears(model, ignore).linears)
    if scheme.int8_head:
        head_of(model)  # Before the work begins.
    if scheme.method == "none":
        copied = with_int8_head(model) if scheme.int8_head else nnx.clone(model)
        return copied, report_of(copied)
    if calibration is None:
        raise InputError(f"scheme {scheme.name!r} needs calibration data: an iterable of model inputs")
    quantized, findings = quantize_with(Memo(), model, scheme, calibration, ignore)
    return quantized, report_of(quantized, time.perf_counter() - start, findings)


def quantize_with(
    memo: Memo, model: ModelT, scheme: Scheme, calibration: Iterable[Any], ignore: Iterable[str]
) -> tuple[ModelT, Findings]:
    """:func:`quantize` without its checks and its report, with a memory for what has been worked out before."""
    # On a GPU, float32 would else be multiplied with 10 bits of mantissa.
    with jax.default_matmul_precision("float32"):
        return _quantize_with(memo, model, scheme, calibration, ignore)


def _quantize_with(
    memo: Memo, model: ModelT, scheme: Scheme, calibration: Iterable[Any], ignore: Iterable[str]
) -> tuple[ModelT, Findings]:
    model = equalize(model) if scheme.equalize else model
    linears = select_linears(model, ignore).linears
    kept = scheme.kept_in_int8(linears)
    first, batches = _peek(calibration)
    batches = list(batches) if scheme.rounding == "gptq" else batches  # Gone through more than once.
    statistics = memo.statistics(lambda: calibrate(model, batches, linears, sample_rows=scheme.sample_rows))
    macs = count_macs(linears, statistics)

    options = {
        name: layer_options(linear, statistics[name], scheme, int4=name not in kept)
        for name, linear in track(linears.items(), "searching", len(linears))
    }

    made: dict[tuple[str, int, int], QuantizedLinear] = {}

    def nearest(name: str, option: Option) -> QuantizedLinear:
        def compute() -> QuantizedLinear:
            inputs = layer_inputs(linears[name], statistics[name], scheme)
            return assemble(name, linears[name], option.grid.round(inputs.weight), inputs, scheme, macs[name])

        key = name, option.grid.bits, option.width
        if key not in made:  # Layers that were tried in INT4 and stay in it need not be made twice.
            made[key] = memo.layer(name, option.grid.bits, compute, stage=f"nearest{option.width}")
        return made[key]

    def try_all() -> dict[str, float]:
        low = {name: nearest(name, found[-1]) for name, found in options.items()}
        return output_sensitivity(model, low, first)

    sensitivities = functools.cache(lambda: memo.sensitivities(try_all))

    parameters = jax.tree.leaves([nnx.state(linear, nnx.Param) for linear in linears.values()])
    plain_bytes = 2 * sum(leaf.size for leaf in parameters)
    chosen = select(options, macs, plain_bytes, scheme, sensitivities)
    layers = {name: nearest(name, option) for name, option in track(chosen.items(), "quantizing", len(chosen))}
    if scheme.rounding == "gptq":
        layers = _compensated(memo, model, scheme, layers, chosen, statistics, macs, batches)
    if scheme.scales == "integer":
        layers = {
            name: _with_integer_scales(layer, linears[name], statistics[name], scheme) for name, layer in layers.items()
        }
    costs = costs_by_bits(options, chosen, sensitivities()) if sensitivities.cache_info().currsize else {}
    quantized = replace_modules(model, layers)
    quantized = with_int8_head(quantized) if scheme.int8_head else quantized
    return quantized, Findings({name: statistics[name].absmax for name in layers}, costs)


def _with_integer_scales(
    layer: QuantizedLinear, linear: nnx.Linear, statistics: Statistics, scheme: Scheme
) -> QuantizedLinear:
    """The layer with integer scales, where they are safe, and its error measured again."""
    changed = with_integer_scales(layer, scheme.amplifier)
    inputs = layer_inputs(linear, statistics, scheme)
    error = relative_square(Simulated(changed).product(inputs.samples), inputs.samples @ inputs.weight.T)
    summary = dataclasses.replace(changed.summary, relative_error=float(error))
    return changed.with_summary(summary)


def _compensated(
    memo: Memo,
    model: nnx.Module,
    scheme: Scheme,
    nearest: dict[str, QuantizedLinear],
    chosen: Mapping[str, Option],
    statistics: Mapping[str, Statistics],
    macs: Mapping[str, int],
    batches: Iterable[Any],
) -> dict[str, QuantizedLinear]:
    """The layers with their weights rounded anew, block by block."""
    linears = find_linears(model)
    grids = {name: option.grid for name, option in chosen.items()}

    def finish(name: str, view: Callable[[], WideLinear]) -> QuantizedLinear:
        def compute() -> QuantizedLinear:
            inputs = layer_inputs(linears[name], statistics[name], scheme)
            return assemble(name, linears[name], view(), inputs, scheme, macs[name])

        return memo.layer(name, nearest[name].bits, compute, stage="compensated")

    return compensate(model, nearest, grids, batches, finish, upstream=scheme.upstream)


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and an iterable that still begins with it."""
    if isinstance(batches, np.ndarray | jax.Array):
        raise InputError("calibration: expected an iterable of batches, got one array; pass a list of it")
    if isinstance(batches, Sequence) and batches:
        return batches[0], batches  # As it is, so that progress can say how much is left.
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("calibration: the data holds no batch")
    return first, itertools.chain([first], iterator)


def check_finite(linears: Mapping[str, nnx.Linear]) -> None:
    """Refuses a model that holds NaN or infinity.

    Raises:
      InputError: naming the layer.
    """
    for name, linear in linears.items():
        if not bool(jnp.isfinite(linear.kernel[...]).all()):
            raise InputError(f"{name}: its weight holds a value that is not finite")


def count_macs(linears: Mapping[str, nnx.Linear], statistics: Mapping[str, Statistics]) -> dict[str, int]:
    """Multiply-accumulates of each layer for one token: K * N, times the calls a token makes.

    The layer that saw the fewest rows counts as called once a token.
    """
    once = min(seen.rows for seen in statistics.values())
    return {
        name: round(linear.in_features * linear.out_features * statistics[name].rows / once)
        for name, linear in linears.items()
    }


def assemble(
    name: str, linear: nnx.Linear, wide: WideLinear, inputs: LayerInputs, scheme: Scheme, macs: int
) -> QuantizedLinear:
    """The layer that runs, of its integer view.

    Raises:
      InputError: naming the layer, if its int32 accumulator could overflow.
    """
    weight, quantizer = expand(wide)
    error = float(relative_error(wide, inputs.samples, inputs.weight))
    bound = measured_bound(weight, quantizer)
    summary = LayerSummary(scheme=scheme, relative_error=error, accumulator_bound=bound, macs=macs)
    bias = None if linear.bias is None else linear.bias[...]
    return QuantizedLinear(
        weight, quantizer, bias, dtype=linear.dtype, param_dtype=linear.param_dtype, summary=summary, name=name
    )


def expand(wide: WideLinear) -> tuple[QTensor, InputQuantizer]:
    """Lays a layer's integer view out over K' channels, as the integer matmul needs it."""
    source, x_part, w_part, used = expansion(np.asarray(wide.x_pieces), np.asarray(wide.w_pieces), wide.bits)
    weight = _expand_weight(wide, jnp.asarray(source), jnp.asarray(w_part))
    quantizer = InputQuantizer(
        multiplier=wide.multiplier,
        source=jnp.asarray(source),
        part=jnp.asarray(x_part),
        scale=wide.x_scale,
        bits=wide.x_bits,
        used=used,
    )
    return weight, quantizer


@jax.jit
def _expand_weight(wide: WideLinear, source: Int32[Array, " e"], part: Int32[Array, " e"]) -> QTensor:
    if wide.group_scale is None:
        codes = flatten_codes(wide.w_codes, source, part, qmax(wide.bits))
        return QTensor.from_codes(codes, wide.w_scale, wide.bits)
    codes = jnp.pad(wide.w_codes.astype(jnp.int8), ((0, 0), (0, len(source))))
    missing = codes.shape[1] // wide.group_size - len(wide.group_scale)
    groups = jnp.pad(wide.group_scale, ((0, missing), (0, 0)), constant_values=1)
    folded = jnp.issubdtype(groups.dtype, jnp.integer)  # A method makes no other integer scales.
    groups = groups.astype(jnp.int16) if folded else groups  # They are from 1 to 15.
    return QTensor.from_codes(codes, wide.w_scale, wide.bits, groups, folded=folded)
