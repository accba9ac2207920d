"""Published methods, one a file: each composes pieces of :mod:`fqjax.core` into one function.

A method is a pure function ``(layer, scheme, bits, budgets) -> (i -> Grid)``: from what is known of a layer
(:class:`LayerInputs`), the bits of its weights and some bounds on K'/K to a function that gives, for the i-th bound,
the numbers that its activations and weights may become (:class:`fqjax.core.formats.uniform.Grid`).  All of it is
jitted, i is traced.  How the weights are rounded to these numbers is another choice, the same for every method.
"""

from collections.abc import Callable

from jaxtyping import Array, Float

from fqjax.core.formats.uniform import Grid
from fqjax.core.layer import LayerInputs
from fqjax.methods import absmax, flattenquant, grouped, smoothquant
from fqjax.scheme import Scheme

METHODS: dict[str, Callable[[LayerInputs, Scheme, int, Float[Array, " b"]], Callable[[Array], Grid]]] = {
    "absmax": absmax.grids,
    "smoothquant": smoothquant.grids,
    "flattenquant": flattenquant.grids,
    "grouped": grouped.grids,
}
"""Every method but "none", by the name that :class:`~fqjax.scheme.Scheme` gives it."""
