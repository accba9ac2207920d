"""Smoothing folded into the norm or layer before a layer, for formats that know of no smoothing.

A layer that divides its input by s before it is quantized can leave that to whoever makes the input:

  a norm       whose weight and bias are divided by s: exact but for one rounding of them to their dtype;
  a layer      whose output channels reach the input channel by channel (values through attention, up through its gate, the
               first layer of an MLP through ReLU): its scales and bias are divided by s, and its codes stay as they are.
               Where several input channels read the same output channel, as query heads that share a value head do, they
               need the same s.
"""

import dataclasses
from collections.abc import Iterable
from typing import cast

import numpy as np
from flax import nnx

from fqjax.layers.linear import QuantizedLinear
from fqjax.models.sites import Norm, Rows, Site, sites_of
from fqjax.runtime.errors import InputError

TOLERANCE = 1e-6
"""How far factors may differ that count as the same: some roundings in float32."""

UNSMOOTHED = "w8a8; w4a8, w4a8-integer-scale, w4a8-integer-scale-folded or w4a16, each plain or with -gptq"
"""Presets that neither smooth nor flatten, and can be written for every model."""


@dataclasses.dataclass(frozen=True)
class Folding:
    """Divisors of modules, by dotted path: norms channel by channel, layers by output channels."""

    norms: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def smoothing_of(layer: QuantizedLinear) -> np.ndarray:
    """Divisors of a layer's input, channel by channel, float64 (K,); ones without smoothing."""
    quantizer = layer.input.get_value()
    fixed = quantizer.fixed_scale()
    scale = 1.0 if fixed is None else np.float64(fixed)
    factors = 1 / (np.asarray(quantizer.multiplier, np.float64) * scale)
    return np.ones_like(factors) if np.abs(factors - 1).max() <= TOLERANCE else factors


def folding_obstacle(sites: Iterable[Site], names: Iterable[str]) -> str | None:
    """Why smoothing of a model cannot be folded, before there are factors.

    Args:
      sites: of the model.
      names: dotted paths of the layers that are smoothed.

    Returns:
      The first layer for which it cannot, and why; None if it can for all.
    """
    producers = _producers(sites)
    for name in names:
        producer = producers.get(name)
        if isinstance(producer, Rows) and len(np.unique(producer.rows)) < len(producer.rows):
            return f"{name}: smoothing differs between heads that share a value head"
        if not isinstance(producer, Norm | Rows):
            return f"{name}: smoothing cannot be folded into what stands in front of it"
    return None


def _producers(sites: Iterable[Site]) -> dict[str, object]:
    """Who makes the input of a layer, by its dotted path, for layers that alone read it."""
    return {site.consumers[0]: site.producer for site in sites if len(site.consumers) == 1}


def fold_smoothing(model: nnx.Module, layers: dict[str, QuantizedLinear]) -> Folding:
    """Finds for every smoothed layer what can take its smoothing over.

    Args:
      model: one of fqjax's.
      layers: its quantized layers, by dotted path.

    Raises:
      InputError: naming the layer, and why its smoothing cannot be folded.
    """
    folding = Folding({}, {})
    producers = _producers(sites_of(model))
    for name, layer in layers.items():
        factors = smoothing_of(layer)
        if (factors == 1).all():
            continue
        producer = producers.get(name)
        if isinstance(producer, Norm):
            folding.norms[producer.path] = factors
        elif isinstance(producer, Rows):
            folding.outputs[producer.path] = _by_row(name, producer.rows, factors, _outputs(model, producer.path))
        else:
            raise InputError(
                f"{name}: its smoothing cannot be folded into what stands in front of it; expected a norm that it alone "
                f"reads, a layer that scales through, or no smoothing, as in {UNSMOOTHED}"
            )
    return folding


def _by_row(name: str, rows: np.ndarray, factors: np.ndarray, outputs: int) -> np.ndarray:
    """The factor of every output channel of the producer."""
    found = np.ones(outputs)
    found[rows] = factors
    if np.abs(found[rows] / factors - 1).max() > TOLERANCE:
        raise InputError(
            f"{name}: its smoothing differs between input channels that read the same channel in front (heads that share a "
            f"value head), and cannot be folded; expected a scheme without smoothing ({UNSMOOTHED}), or the layer in "
            f"floating point (--ignore {name.split('.')[-1]})"
        )
    return found


def _outputs(model: nnx.Module, name: str) -> int:
    module = module_at(model, name)
    if isinstance(module, QuantizedLinear):
        return module.weight.get_value().shape[0]
    return cast(nnx.Linear, module).out_features


def module_at(model: nnx.Module, name: str) -> nnx.Module:
    """The module with a dotted path."""
    for part in name.split("."):
        model = cast(nnx.List, model)[int(part)] if part.isdigit() else getattr(model, part)
    return model
