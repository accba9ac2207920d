"""Published methods, one a file: each composes pieces of :mod:`fqjax.core` into one function.

A method is a pure function ``(layer, scheme, bits, budgets) -> [Grid, ...]``: from what is known of a layer
(:class:`LayerInputs`) and the bits of its weights to the numbers that its activations and weights may become
(:class:`fqjax.core.wide.Grid`), once for each bound on K'/K, or once if it does not flatten.  How the weights are rounded to
them is another choice, the same for every method.
"""

from collections.abc import Callable

from fqjax.core.wide import Grid
from fqjax.methods import absmax, flattenquant, smoothquant
from fqjax.methods.inputs import LayerInputs
from fqjax.scheme import Scheme

METHODS: dict[str, Callable[[LayerInputs, Scheme, int, tuple[float, ...]], list[Grid]]] = {
    "absmax": absmax.grids,
    "smoothquant": smoothquant.grids,
    "flattenquant": flattenquant.grids,
}
"""Every method but "none", by the name that :class:`~fqjax.scheme.Scheme` gives it."""
