"""The whole path on the bundled checkpoint: quantize by every scheme, compare, save, load, generate."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fqjax.checkpoint.hugging_face import load_hf
from fqjax.checkpoint.orbax.read import load
from fqjax.checkpoint.orbax.write import refuse_existing, save
from fqjax.data.python_docs import held_out_text, reference_text
from fqjax.data.text import calibration_batches, decode_new, encode, encode_prompt
from fqjax.evaluation.perplexity import perplexity
from fqjax.inference.generate import generate
from fqjax.models.causal_lm import CausalLM
from fqjax.quantize import quantize
from fqjax.report.report import Report, format_bytes, narrow_table
from fqjax.runtime.progress import part_of_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKPOINT = Path(__file__).parent / "checkpoint"
SAVED = "flattenquant"
"""The scheme whose model is saved, and then evaluated and run as loaded."""

WINDOW, WINDOWS, SAMPLES = 256, 24, 32
PROMPT = "Return a list of the"

ROWS = {
    "bf16": "the model as it is",
    "w8a8": "INT8, one scale a tensor: outlier channels use up the codes",
    "smoothquant": "INT8, smoothed: outliers move in part into the weights",
    "flattenquant-w8a8": "INT8, smoothed and flattened: hardly anything is lost",
    "flattenquant": "the same with half of the arithmetic in INT4",
}
"""The schemes shown, and what each row shows."""


def run_demo(out: Path, console: Console) -> None:
    """Runs the demonstration and leaves an fqjax checkpoint in ``out``.

    Raises:
      InputError: if ``out`` exists or cannot be written.
    """
    refuse_existing(out)
    console.print(
        "A Llama of 2.9 M parameters, trained on Python's documentation, with outlier\n"
        f"channels like a large model's. Every scheme calibrates on {SAMPLES} windows of its\n"
        "training text; perplexity is measured on documentation it never saw.\n",
        highlight=False,
    )
    model, tokenizer = load_hf(CHECKPOINT)
    held_out = encode(tokenizer, held_out_text())
    batches = calibration_batches(encode(tokenizer, reference_text()), model.config, samples=SAMPLES, window=WINDOW)
    table = narrow_table("", "")
    for heading in ("scheme", "perplexity", "ratio", "INT4", "K'/K", "linear bytes", "seconds"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right", no_wrap=True)
    models, reference = {}, 0.0
    for i, scheme in enumerate(ROWS):
        start = time.perf_counter()
        with part_of_all(f"{scheme} ({i + 1} of {len(ROWS)})"):
            candidate, report = quantize(model, scheme, batches)
            if scheme == SAVED:
                save(out, candidate, tokenizer=tokenizer, report=report)
                candidate = load(out)
            value = perplexity(candidate, held_out, WINDOW, windows=WINDOWS)
        reference = reference or value
        models[scheme] = candidate
        _add_row(table, scheme, value, value / reference, report, time.perf_counter() - start)
    console.print(table)
    for scheme, meaning in ROWS.items():
        console.print(f"  {scheme:18}{meaning}", highlight=False)
    console.print()
    for scheme in ("bf16", SAVED):
        text = _continue(models[scheme], tokenizer)
        console.print(Text.assemble((f"{scheme} writes: ", "bold"), text))
    console.print(f"\nThe {SAVED} model is in {out}.\nLook at it with:  fqjax inspect {out}", highlight=False)


def _add_row(table: Table, scheme: str, value: float, ratio: float, report: Report, seconds: float) -> None:
    table.add_row(
        scheme,
        f"{value:.2f}",
        f"{ratio:.3f}",
        f"{report.int4_mac_share:.1%}",
        f"{report.expansion:.3f}",
        format_bytes(report.bytes),
        f"{seconds:.1f}",
    )


def _continue(model: CausalLM, tokenizer: "PreTrainedTokenizerBase") -> str:
    tokens = encode_prompt(tokenizer, model.config, PROMPT)
    new = generate(model, tokens, max_new_tokens=24)
    return PROMPT + decode_new(tokenizer, model.config, tokens, new).replace("\n", " ")
