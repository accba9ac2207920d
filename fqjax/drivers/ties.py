"""Layers that are quantized alike: the layers of one name in all experts of a mixture.

Bits are divided among units rather than layers, and the experts of a unit get the same width, so that their codes can be
stacked.  Where they read the same input, they also quantize it alike, once for all.  Any other layer is a unit of its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flax import nnx

from fqjax.drivers.candidates import Outline

_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")

Units = dict[str, tuple[str, ...]]
"""Layers of every unit, by its name: that of the layers with ``*`` for the number of the expert."""


class Choice(NamedTuple):
    """One way to quantize a unit.

    Attributes:
      outline: of all its layers together: sums of bytes, errors averaged over multiply-accumulates.
      options: the number of each layer's option.
    """

    outline: Outline
    options: dict[str, int]


def units_of(linears: Mapping[str, nnx.Linear]) -> Units:
    """The units of some layers, in their order; experts of different sizes are units of their own."""
    found: dict[str, list[str]] = {}
    for name in linears:
        found.setdefault(_EXPERT.sub("*", name), []).append(name)
    units: Units = {}
    for unit, names in found.items():
        shapes = {(linears[name].in_features, linears[name].out_features) for name in names}
        units |= {unit: tuple(names)} if len(names) > 1 and len(shapes) == 1 else {name: (name,) for name in names}
    return units


def choices(options: Mapping[str, Sequence[Outline]], macs: Mapping[str, int]) -> list[Choice]:
    """The ways to quantize a unit, in the order of :func:`fqjax.drivers.candidates.layer_options`.

    Each is a number of bits and a width, in which every layer has the widest of its options that fits.

    Args:
      options: of each of the unit's layers.
      macs: multiply-accumulates of each.
    """
    if len(options) == 1:
        ((name, some),) = options.items()
        return [Choice(outline, {name: i}) for i, outline in enumerate(some)]
    total = sum(macs[name] for name in options)
    weights = {name: macs[name] / total if total else 1 / len(options) for name in options}
    found = []
    for bits, width in sorted({(-o.bits, o.width) for some in options.values() for o in some}):
        fitting = {
            name: [i for i, o in enumerate(some) if o.bits == -bits and o.width <= width]
            for name, some in options.items()
        }
        if all(fitting.values()):
            picked = {name: some[-1] for name, some in fitting.items()}
            parts = {name: options[name][i] for name, i in picked.items()}
            outline = Outline(
                bits=-bits,
                error=sum(weights[name] * o.error for name, o in parts.items()),
                divergence=sum(weights[name] * o.divergence for name, o in parts.items()),
                width=width,
                bytes=sum(o.bytes * width // o.width for o in parts.values()),
            )
            found.append(Choice(outline, picked))
    return found
