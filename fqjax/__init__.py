"""fqjax: language models in Flax, quantized to integers.

model, tokenizer = fqjax.load_hf("path/or/hub-id")
qmodel, report = fqjax.quantize(model, "flattenquant", calibration=token_batches)
fqjax.save("out", qmodel, tokenizer=tokenizer)
qmodel = fqjax.load("out")
tokens = fqjax.generate(qmodel, prompt_tokens, max_new_tokens=64)
ppl = fqjax.perplexity(qmodel, token_ids, window=512)
"""

from fqjax.checkpoint.compressed.write import save_compressed_tensors
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.checkpoint.orbax import load, save
from fqjax.checkpoint.tokenizer import load_tokenizer
from fqjax.core.formats.base import QTensor
from fqjax.data.text import calibration_batches
from fqjax.drivers.statistics import Statistics, calibrate
from fqjax.evaluation.perplexity import perplexity
from fqjax.inference.generate import generate
from fqjax.interop.qwix import from_qwix, to_qwix
from fqjax.layers.linear import QuantizedLinear
from fqjax.quantize import integer_scales, quantize
from fqjax.report.report import LayerReport, Report, report_of
from fqjax.runtime.errors import InputError
from fqjax.scheme import PRESETS, Scheme
from fqjax.version import __version__

__all__ = [
    "PRESETS",
    "InputError",
    "LayerReport",
    "QTensor",
    "QuantizedLinear",
    "Report",
    "Scheme",
    "Statistics",
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
    "report_of",
    "save",
    "save_compressed_tensors",
    "to_qwix",
]
