"""fqjax: language models in Flax, quantized to integers.

model, tokenizer = fqjax.load_hf("path/or/hub-id")
qmodel, report = fqjax.quantize(model, "flattenquant", calibration=token_batches)
fqjax.save("out", qmodel, tokenizer=tokenizer)
qmodel = fqjax.load("out")
tokens = fqjax.generate(qmodel, prompt_tokens, max_new_tokens=64)
ppl = fqjax.perplexity(qmodel, token_ids, window=512)

Names are imported when they are first used (PEP 562), so that ``import fqjax`` alone imports no JAX.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

from fqjax.version import __version__

if TYPE_CHECKING:
    from fqjax.checkpoint.compressed.write import save_compressed_tensors
    from fqjax.checkpoint.hugging_face import load_hf
    from fqjax.checkpoint.orbax.read import load
    from fqjax.checkpoint.orbax.write import save
    from fqjax.checkpoint.tokenizer import load_tokenizer
    from fqjax.core.formats.base import Format, QTensor
    from fqjax.core.layer import LayerInputs, LayerPlan
    from fqjax.core.table import Stored
    from fqjax.data.text import calibration_batches
    from fqjax.drivers.statistics import Statistics, calibrate
    from fqjax.evaluation.perplexity import perplexity
    from fqjax.inference.engine import Engine
    from fqjax.inference.generate import generate, stream
    from fqjax.inference.requests import Request
    from fqjax.inference.serve import serve
    from fqjax.interop.qwix import from_qwix, to_qwix
    from fqjax.layers.linear import QuantizedLinear
    from fqjax.presets import PRESETS
    from fqjax.quantize import integer_scales, quantize
    from fqjax.registry import register, register_scheme
    from fqjax.report.report import LayerReport, Report, report_of
    from fqjax.runtime.errors import InputError
    from fqjax.scheme import Rule, Scheme

__all__ = [
    "PRESETS",
    "Engine",
    "Format",
    "InputError",
    "LayerInputs",
    "LayerPlan",
    "LayerReport",
    "QTensor",
    "QuantizedLinear",
    "Report",
    "Request",
    "Rule",
    "Scheme",
    "Statistics",
    "Stored",
    "__version__",
    "calibrate",
    "calibration_batches",
    "from_qwix",
    "generate",
    "integer_scales",
    "load",
    "load_hf",
    "load_tokenizer",
    "perplexity",
    "quantize",
    "register",
    "register_scheme",
    "report_of",
    "save",
    "save_compressed_tensors",
    "serve",
    "stream",
    "to_qwix",
]

_MODULES = {
    "PRESETS": "presets",
    "Engine": "inference.engine",
    "InputError": "runtime.errors",
    "Format": "core.formats.base",
    "LayerInputs": "core.layer",
    "LayerPlan": "core.layer",
    "LayerReport": "report.report",
    "QTensor": "core.formats.base",
    "QuantizedLinear": "layers.linear",
    "Report": "report.report",
    "Request": "inference.requests",
    "Rule": "scheme",
    "Scheme": "scheme",
    "Statistics": "drivers.statistics",
    "Stored": "core.table",
    "calibrate": "drivers.statistics",
    "calibration_batches": "data.text",
    "from_qwix": "interop.qwix",
    "generate": "inference.generate",
    "integer_scales": "quantize",
    "load": "checkpoint.orbax.read",
    "load_hf": "checkpoint.hugging_face",
    "load_tokenizer": "checkpoint.tokenizer",
    "perplexity": "evaluation.perplexity",
    "quantize": "quantize",
    "register": "registry",
    "register_scheme": "registry",
    "report_of": "report.report",
    "save": "checkpoint.orbax.write",
    "save_compressed_tensors": "checkpoint.compressed.write",
    "serve": "inference.serve",
    "stream": "inference.generate",
    "to_qwix": "interop.qwix",
}
"""The module of every public name."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # What Python itself looks for in a module, and public names; neither imported modules nor parts of the package.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))})


class _Package(types.ModuleType):
    """The package, in which a public name wins over the submodule of the same name, whichever is imported first."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, types.ModuleType) and _MODULES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
