"""Measures what every scheme costs in perplexity, and writes the result as JSON and as a table.

Examples:
    python scripts/benchmark_quality.py                                    # the bundled checkpoint and its text
    python scripts/benchmark_quality.py --model mine=path/to/checkpoint --calibration train.txt --text test.txt
"""

import fqjax
from fqjax.bench import quality

HEADING = [
    "# Perplexity of every scheme",
    "",
    "Written by `scripts/benchmark_quality.py`. Ratios are to the same model in bfloat16 in the same run; bytes are",
    "those of the linear layers. Models other than the bundled one do not come with fqjax; the script takes any. A model",
    '"with outliers" is the same function with a few channels made 8 to 64 times larger in front of its linear layers.',
]

if __name__ == "__main__":
    a = quality.parser(__doc__, "docs/benchmarks/quality").parse_args()
    quality.run(a, fqjax.PRESETS, HEADING, "scheme")
