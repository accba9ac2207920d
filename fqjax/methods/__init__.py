"""Published methods, one paper a file: its settings, and how it composes pieces of :mod:`fqjax.core`.

Settings are frozen dataclasses that check themselves (:mod:`fqjax.runtime.settings`).  Importing them imports no JAX: array
code is imported when a layer is quantized.
"""

from fqjax.drivers.method import Method
from fqjax.drivers.settings import Allocation, Compensated, Nearest
from fqjax.methods.absmax import Absmax
from fqjax.methods.awq import AWQ
from fqjax.methods.base import GroupedMethod, PerTensorMethod
from fqjax.methods.flattenquant import FlattenQuant
from fqjax.methods.gptq import GPTQ
from fqjax.methods.integer_scale import IntegerScale
from fqjax.methods.round_to_nearest import RoundToNearest
from fqjax.methods.smoothquant import SmoothQuant

__all__ = [
    "AWQ",
    "GPTQ",
    "Absmax",
    "Allocation",
    "Compensated",
    "FlattenQuant",
    "GroupedMethod",
    "IntegerScale",
    "Method",
    "Nearest",
    "PerTensorMethod",
    "RoundToNearest",
    "SmoothQuant",
]
