"""Measures the integer matmuls beside XLA's and cuBLAS's, and writes the result as JSON and as a table.

Examples:
    python scripts/benchmark_kernels.py                                     # the shapes of well-known models
    python scripts/benchmark_kernels.py --shapes 4096x4096 --rows 1 16      # some

The same as ``fqjax bench kernels``, with the table written beside the JSON.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

from fqjax.bench.kernels import default_shapes, line, markdown, parse_shape, run, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", metavar="NxK")
    parser.add_argument("--rows", nargs="*", type=int)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further shape after so many seconds")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/kernels"), help="written with .json and .md")
    a = parser.parse_args()
    shapes, rows = default_shapes()
    if a.shapes:
        shapes = [parse_shape(shape) for shape in a.shapes]
    end = time.monotonic() + a.seconds
    shapes = itertools.takewhile(lambda shape: time.monotonic() < end, shapes)
    result = run(shapes, a.rows or rows, lambda row: print(line(row), flush=True))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    a.out.with_suffix(".md").write_text(markdown(result))
    print(f"{summary(result)}\nwrote {a.out}.json and .md")


if __name__ == "__main__":
    main()
