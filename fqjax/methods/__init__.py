"""Published methods, one a file: each composes pieces of :mod:`fqjax.core` into one function.

A method is a pure function ``(layer, scheme, bits) -> plans``: from what is known of a layer (:class:`LayerInputs`) and
the bits of its weight to the ways in which it can be quantized (:class:`~fqjax.core.layer.LayerPlan`), which are alike but
for the numbers in their arrays.  All of it is jitted.  How the weights are rounded is another choice, the same for every
method.
"""

from collections.abc import Callable

from fqjax.core.formats.base import Format
from fqjax.core.inputs import StoredInput
from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.methods import absmax, flattenquant, grouped, smoothquant
from fqjax.scheme import Scheme

METHODS: dict[str, Callable[[LayerInputs, Scheme, int], list[LayerPlan]]] = {
    "absmax": absmax.plans,
    "smoothquant": smoothquant.plans,
    "flattenquant": flattenquant.plans,
    "grouped": grouped.plans,
}
"""Every method but "none", by the name that :class:`~fqjax.scheme.Scheme` gives it."""

FORMATS: dict[str, Callable[[Scheme, int], tuple[Format, type[StoredInput]]]] = {
    "absmax": absmax.formats,
    "smoothquant": absmax.formats,
    "flattenquant": flattenquant.formats,
    "grouped": grouped.formats,
}
"""What each method stores for weights of some bits: the weight's format, and the quantizer of the input."""
