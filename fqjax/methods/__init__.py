"""Published methods, one a file: each composes pieces of :mod:`fqjax.core` into one function.

A method is a pure function ``(weight, x_max, scheme, bits) -> WideLinear``: from a layer's weight (N, K) and the largest
magnitude of each of its input channels (K,) to its integer view.
"""

from collections.abc import Callable

from jaxtyping import Array

from fqjax.core.wide import WideLinear
from fqjax.methods import absmax, flattenquant, smoothquant
from fqjax.scheme import Scheme

METHODS: dict[str, Callable[[Array, Array, Scheme, int], WideLinear]] = {
    "absmax": absmax.quantize_linear,
    "smoothquant": smoothquant.quantize_linear,
    "flattenquant": flattenquant.quantize_linear,
}
"""Every method but "none", by the name that :class:`~fqjax.scheme.Scheme` gives it."""
