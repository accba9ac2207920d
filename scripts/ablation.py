"""Measures what each piece of FlattenQuant is worth, by leaving it out, and writes the result as JSON and as a table.

Examples:
    python scripts/ablation.py                                                       # the bundled checkpoint
    python scripts/ablation.py --model mine=path/to/checkpoint --calibration train.txt --text test.txt

A variant is the preset ``flattenquant`` with a few settings changed.
"""

import fqjax
from fqjax.bench import quality

ANY_SIZE_SETTINGS = ["compression=0"]
NEAREST_SETTINGS = ["rounding=nearest"]
THRESHOLD_RULE_SETTINGS = ["threshold_rule=tukey", "selection=sensitivity", "max_expansion=1.25", *ANY_SIZE_SETTINGS]
VARIANTS: dict[str, list[str]] = {
    "everything": [],
    "no smoothing": ["alpha=none"],
    "nothing flattened": ["flatten_activations=false", "flatten_weights=false"],
    "activations flattened alone": ["flatten_weights=false"],
    "weights flattened alone": ["flatten_activations=false"],
    "no equalization": ["equalize=false"],
    "thresholds by rule": THRESHOLD_RULE_SETTINGS,
    "rounded to the nearest": NEAREST_SETTINGS,
    "thresholds by rule, rounded to the nearest": THRESHOLD_RULE_SETTINGS + NEAREST_SETTINGS,
    "layers by sensitivity": ["selection=sensitivity", *ANY_SIZE_SETTINGS],
    "layers by the KL criterion": ["selection=kl", *ANY_SIZE_SETTINGS],
    "activations up to the 99.9th percentile": ["activation_percentile=99.9"],
    "earlier errors left alone (upstream 0)": ["upstream=0"],
    "earlier errors taken back whole (upstream 1)": ["upstream=1"],
    "INT4 share 0": ["int4_share=0", *ANY_SIZE_SETTINGS],
    "INT4 share 25 %": ["int4_share=0.25", *ANY_SIZE_SETTINGS],
    "INT4 share 50 %": ["int4_share=0.5", *ANY_SIZE_SETTINGS],
    "INT4 share 75 %": ["int4_share=0.75", *ANY_SIZE_SETTINGS],
    "INT4 share 100 %": ["int4_share=1", *ANY_SIZE_SETTINGS],
}
"""Settings of the preset ``flattenquant``, as ``--set`` takes them."""
HEADING = [
    "# What each piece of FlattenQuant is worth",
    "",
    "Written by `scripts/ablation.py`. Each variant is `flattenquant` with the change named; the ratio is that of the",
    "perplexity to the same model in bfloat16, bytes are those of the linear layers. A model",
    '"with outliers" is the same function with a few channels made 8 to 64 times larger before its linear layers.',
]

if __name__ == "__main__":
    command = quality.parser(__doc__, "docs/benchmarks/ablation")
    command.add_argument("--variants", nargs="*", choices=list(VARIANTS), metavar="VARIANT", help="some of them")
    a = command.parse_args()
    preset = fqjax.PRESETS["flattenquant"]
    schemes = {name: preset.override(VARIANTS[name]) for name in a.variants or VARIANTS}
    quality.run(a, schemes, HEADING, "variant", timed=False)
