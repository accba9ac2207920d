"""From a float model to one that runs on integers: calibrate, divide the bits among the layers, quantize, replace.

model, scheme, data  ->  statistics of every linear layer   (fqjax.calibration)
->  4 or 8 bits for each of them       (fqjax.core.selection)
->  integer view of each               (fqjax.methods)
->  expanded layers in a new model     (fqjax.linear, fqjax.surgery)
"""

import functools
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from fqjax.calibration import Statistics, calibrate
from fqjax.core.codes import qmax
from fqjax.core.flatten import expansion, flatten_codes
from fqjax.core.selection import select_low_bits
from fqjax.core.wide import WideLinear, relative_error
from fqjax.equalize import equalize
from fqjax.errors import InputError
from fqjax.linear import LayerSummary, QuantizedLinear, measured_bound
from fqjax.memo import Memo
from fqjax.methods import METHODS
from fqjax.progress import track
from fqjax.qtensor import InputQuantizer, QTensor
from fqjax.report import Report, report_of
from fqjax.scheme import Scheme, resolve_scheme
from fqjax.sensitivity import output_sensitivity
from fqjax.surgery import replace_modules, select_linears

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
    if scheme.method == "none":
        return nnx.clone(model), report_of(model)
    if calibration is None:
        raise InputError(f"scheme {scheme.name!r} needs calibration data: an iterable of model inputs")
    quantized = quantize_with(Memo(), model, scheme, calibration, ignore)
    return quantized, report_of(quantized, time.perf_counter() - start)


def quantize_with(
    memo: Memo, model: ModelT, scheme: Scheme, calibration: Iterable[Any], ignore: Iterable[str]
) -> ModelT:
    """:func:`quantize` without its checks, with a memory for what has been worked out before."""
    model = equalize(model) if scheme.equalize else model
    linears = select_linears(model, ignore).linears
    first, batches = _peek(calibration)
    statistics = memo.statistics(lambda: calibrate(model, batches, linears, sample_rows=scheme.sample_rows))
    macs = count_macs(linears, statistics)

    def layer(name: str, bits: int) -> QuantizedLinear:
        return memo.layer(
            name, bits, lambda: quantize_layer(name, linears[name], statistics[name], scheme, bits, macs[name])
        )

    def layers(names: Iterable[str], bits: int) -> dict[str, QuantizedLinear]:
        return {name: layer(name, bits) for name in track(list(names), f"quantizing to INT{bits}")}

    low = layers(linears if scheme.int4_share else (), 4)
    if 0 < scheme.int4_share < 1:
        errors = memo.sensitivities(lambda: output_sensitivity(model, low, first))
        chosen = select_low_bits([errors[name] for name in linears], list(macs.values()), scheme.int4_share)
        low = {name: low[name] for name, is_low in zip(linears, chosen, strict=True) if is_low}
    high = layers((name for name in linears if name not in low), 8)
    return replace_modules(model, low | high)


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


def quantize_layer(
    name: str, linear: nnx.Linear, statistics: Statistics, scheme: Scheme, bits: int, macs: int
) -> QuantizedLinear:
    """Quantizes one linear layer.

    Raises:
      InputError: naming the layer, if its int32 accumulator could overflow.
    """
    wide, error = _measure(*_layer_inputs(linear, statistics), scheme, bits)
    weight, quantizer = expand(wide)
    bound = measured_bound(weight, quantizer)
    summary = LayerSummary(scheme=scheme, relative_error=float(error), accumulator_bound=bound, macs=macs)
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
        bits=wide.bits,
        used=used,
    )
    return weight, quantizer


@jax.jit
def _expand_weight(wide: WideLinear, source: Int32[Array, " e"], part: Int32[Array, " e"]) -> QTensor:
    codes = flatten_codes(wide.w_codes, source, part, qmax(wide.bits))
    return QTensor.from_codes(codes, wide.w_scale, wide.bits)


def _layer_inputs(linear: nnx.Linear, statistics: Statistics) -> tuple[Array, Array, Array]:
    return linear.kernel[...].T, jnp.asarray(statistics.absmax), jnp.asarray(statistics.samples)


@functools.partial(jax.jit, static_argnames=("scheme", "bits"))
def _measure(
    weight: Float[Array, "n k"], x_max: Float[Array, " k"], samples: Float[Array, "s k"], scheme: Scheme, bits: int
) -> tuple[WideLinear, Float[Array, ""]]:
    """A layer's integer view, and the error of its output on the calibration sample."""
    weight = weight.astype(jnp.float32)
    wide = METHODS[scheme.method](weight, x_max, scheme, bits)
    return wide, relative_error(wide, samples, weight)
