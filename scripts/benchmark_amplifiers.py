"""Measures integer group scales with several amplifiers beside the float scales they come from, and writes JSON and a table.

Examples:
    python scripts/benchmark_amplifiers.py                                 # the bundled checkpoint and its text
    python scripts/benchmark_amplifiers.py --model mine=path/to/checkpoint --calibration train.txt --text test.txt
"""

import itertools
from collections.abc import Iterator

import fqjax
from fqjax.bench import quality
from fqjax.bench.environment import Record

CODES = {"to the nearest": "w4a8", "GPTQ": "w4a8-gptq", "AWQ": "w4a8-awq"}
AMPLIFIERS = (128, 512, 1024, 4096)
FORMS = {"by channel": True, "paper": False}
HEADING = [
    "# Amplifiers",
    "",
    "Written by `scripts/benchmark_amplifiers.py`. Weights of 4 bits in groups of 128, activations of 8 bits; the codes of",
    "each kind are the same in all its rows. The change is that of the perplexity against float scales. By channel, scales",
    "are divided by the largest of their output channel before they are amplified; the paper amplifies them as they are.",
    "A layer whose accumulator could overflow takes a smaller amplifier, and keeps its float scales if none is safe. The",
    "margin is that of the layer nearest to overflow, in bits, for the worst activations there could be.",
]


def measure(setting: quality.Setting) -> Iterator[Record]:
    """Rows of one model."""
    for codes, scheme in CODES.items():
        model, _ = fqjax.quantize(setting.model, scheme, setting.batches)
        exact = setting.perplexity(model)
        yield {"codes": codes, "scales": "float", "amplifier": None, "perplexity": exact, "change": 0.0, "margin": None}
        for (form, units), amplifier in itertools.product(FORMS.items(), AMPLIFIERS):
            changed, report = fqjax.integer_scales(model, amplifier, units=units)
            integer = [row for row in report.layers if "integer" in row.scales]
            perplexity = setting.perplexity(changed)
            yield {
                "codes": codes,
                "scales": form,
                "amplifier": amplifier,
                "perplexity": perplexity,
                "change": perplexity / exact - 1,
                "margin": min((row.overflow_margin_bits for row in integer), default=None),
                "float_layers": len(report.layers) - len(integer),
            }


def document(results: dict[str, Record]) -> str:
    """All results in Markdown."""
    lines = list(HEADING)
    for name, result in results.items():
        lines += ["", f"## {name}", "", f"{quality.describe_conditions(result)}.", ""]
        lines += [
            "| codes | scales | amplifier | perplexity | change | margin | float |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for row in result["rows"]:
            margin = "-" if row["margin"] is None else f"{row['margin']:.1f}"
            lines.append(
                f"| {row['codes']} | {row['scales']} | {row['amplifier'] or '-'} | {row['perplexity']:.3f} "
                f"| {row['change']:+.3%} | {margin} | {row.get('float_layers', '-')} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    a = quality.parser(__doc__, "docs/benchmarks/amplifiers").parse_args()
    results: dict[str, Record] = {}
    for name, setting in quality.settings(a):
        rows = []
        for row in measure(setting):
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
        results[name] = quality.conditions(a) | {"rows": rows}
        quality.write(a.out, results, document(results))
