"""Serves requests by models with random weights, every scheme beside bfloat16, and writes the result as JSON and as a table.

Examples:
    python scripts/benchmark_serving.py                                          # Llama-3-8B on a GPU, a tiny model elsewhere
    python scripts/benchmark_serving.py --slots 64 --prompt 100-500 --new 128 --requests 400 --rate 60
"""

import argparse
import json
from pathlib import Path

import jax

from fqjax.bench import serving
from fqjax.bench.random_models import architecture
from fqjax.runtime.compiling import use_compilation_cache

SCHEMES = ("bf16", "flattenquant-hopper-int4+int8-head+int8-cache")


def span(text: str) -> tuple[int, int]:
    """``"512"`` or ``"100-500"``."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b" if gpu else "tiny")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES if gpu else ("bf16", "w8a8"))
    parser.add_argument("--slots", type=int, nargs="*", default=(16, 64, 256) if gpu else (4,))
    parser.add_argument("--prompt", type=span, default=(512, 512) if gpu else (32, 32), metavar="T or T-T")
    parser.add_argument("--new", type=span, default=(128, 128) if gpu else (16, 16), metavar="T or T-T")
    parser.add_argument("--requests", type=int, help="3 for each slot by default")
    parser.add_argument("--rate", type=float, help="requests a second; all at once by default")
    parser.add_argument("--burst", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=2048 if gpu else 64)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/serving"), help="written with .json and .md")
    parser.add_argument("--compilation-cache", type=Path, help="keep compiled programs there, and take them from there")
    a = parser.parse_args()
    if a.compilation_cache:
        use_compilation_cache(a.compilation_cache)
    loads = [
        serving.Load(
            slots=slots,
            prompt=a.prompt,
            new=a.new,
            requests=a.requests or 3 * slots,
            rate=a.rate,
            burst=a.burst,
            chunk=a.chunk,
        )
        for slots in a.slots
    ]
    record = a.out.with_suffix(".json")
    before = json.loads(record.read_text()) if record.is_file() else {}

    def write(result: serving.ServingResult) -> None:
        """With what the record held before; after every row, so that nothing is lost if a later one ends the run."""
        results = before | {f"{a.model} on {result['device']}": result}
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(results, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(serving.markdown(results.values()))

    serving.run(
        a.model,
        architecture(a.model),
        a.schemes,
        loads,
        report=lambda row: print(serving.line(row), flush=True),
        keep=write,
    )
    print(f"wrote {record} and {a.out}.md")


if __name__ == "__main__":
    main()
