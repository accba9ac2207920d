"""Measures what every scheme costs in perplexity, and writes the result as JSON and as a table.

Examples:
    python scripts/benchmark_quality.py                                    # the bundled checkpoint and its text
    python scripts/benchmark_quality.py --model mine=path/to/checkpoint --calibration train.txt --text test.txt
    python scripts/benchmark_quality.py --schemes bf16 w4a8 w4a16            # some of the schemes
    python scripts/benchmark_quality.py --foreign --model mine=path --text test.txt   # calibrated on Python's documentation
    python scripts/benchmark_quality.py --only-document                      # from what the JSON holds already
"""

import functools
import json

import fqjax
from fqjax.bench import quality

HEADING = [
    "# Perplexity of every scheme",
    "",
    "Written by `scripts/benchmark_quality.py`. Ratios are to the same model in bfloat16 in the same run; bytes are",
    "those of the linear layers. Models other than the bundled one do not come with fqjax; the script takes any. A model",
    '"with outliers" is the same function with a few channels made 8 to 64 times larger before its linear layers.',
]
NOTES = {
    "bundled": "The bundled checkpoint has a few very large channels, as `w8a8` shows. INT8 activations of the presets with "
    "groups have one scale a token for all channels: the presets with AWQ, which makes large channels smaller, hold, and "
    "GPTQ alone, which sees to the weights, does not. With activations in bfloat16 (`w4a16-gptq`) it does.",
    "stories260k": "Most layers of stories260k have 64 input channels. Padded to 256, their INT4 codes take as many bytes as "
    "bfloat16, and `flattenquant` asks for no compression of such a model, only for its share of the arithmetic.",
}

if __name__ == "__main__":
    command = quality.parser(__doc__, "docs/benchmarks/quality")
    command.add_argument("--schemes", nargs="*", choices=list(fqjax.PRESETS), metavar="SCHEME", help="some of them")
    command.add_argument("--only-document", action="store_true", help="write the tables anew, measure nothing")
    command.add_argument(
        "--foreign",
        action="store_true",
        help="calibrate on Python's documentation, for a section of its own: a text of another kind than --text",
    )
    a = command.parse_args()
    if a.foreign and (a.calibration or not a.text or not a.model):
        command.error("--foreign needs --model and --text, and takes no --calibration: that is Python's documentation")
    front = functools.partial(quality.overview, notes=NOTES)
    if a.only_document:
        results = json.loads(a.out.with_suffix(".json").read_text())
        a.out.with_suffix(".md").write_text(quality.document(results, HEADING, "scheme", front=front))
    else:
        schemes = {name: fqjax.PRESETS[name] for name in a.schemes or fqjax.PRESETS}
        quality.run(a, schemes, HEADING, "scheme", front=front)
