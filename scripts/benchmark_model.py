"""Times whole models with random weights, every scheme beside bfloat16, and writes the result as JSON and as a table.

Examples:
    python scripts/benchmark_model.py                                               # Llama-3-8B on a GPU
    python scripts/benchmark_model.py --model opt-30b --schemes bf16 flattenquant --prefill 8x1024 --decode

The same as ``fqjax bench model``, with the table written beside the JSON, where results of other models and devices are kept,
and those of other schemes and sizes from the same versions.
"""

import argparse
import json
from pathlib import Path

import jax

from fqjax.bench import model as bench
from fqjax.bench import model_record
from fqjax.bench.model_cases import SCHEMES, parse_case
from fqjax.bench.random_models import architecture
from fqjax.runtime.compiling import use_compilation_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b" if jax.default_backend() == "gpu" else "tiny")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--prefill", nargs="*", metavar="BxT")
    parser.add_argument("--decode", nargs="*", metavar="BxT")
    parser.add_argument("--extra", type=float, default=0.05, help="share of extra channels of schemes that flatten")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further scheme after so many seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks/models"), help="written with .json, .md and _profile.md"
    )
    parser.add_argument("--compilation-cache", type=Path, help="keep compiled programs there, and take them from there")
    a = parser.parse_args()
    if a.compilation_cache:
        use_compilation_cache(a.compilation_cache)
    cases = None
    if a.prefill is not None or a.decode is not None:
        cases = [parse_case("prefill", text) for text in a.prefill or ()]
        cases += [parse_case("decode", text) for text in a.decode or ()]
    record, profile = a.out.with_suffix(".json"), a.out.with_name(a.out.name + "_profile").with_suffix(".md")
    before = json.loads(record.read_text()) if record.is_file() else {}

    def write(result: bench.ModelResult) -> None:
        """With what the record held before; after every scheme, so that nothing is lost if a later one ends the run."""
        key = f"{a.model} on {result['device']}"
        results = before | {key: model_record.combined(before.get(key), result)}
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(results, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(model_record.markdown(results))
        profile.write_text(model_record.profiles(results))

    result = bench.run(
        a.model,
        architecture(a.model),
        a.schemes,
        cases,
        extra=a.extra,
        seconds=a.seconds,
        report=lambda row: print(bench.line(row), flush=True),
        keep=write,
    )
    write(result)  # With what was left out after the last scheme.
    print(f"wrote {record}, {a.out}.md and {profile}")


if __name__ == "__main__":
    main()
