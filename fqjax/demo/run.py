"""The whole path on the bundled checkpoint: quantize by several schemes, compare, save, load, generate."""

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.text import Text

from fqjax.checkpoint.hugging_face import load_hf
from fqjax.checkpoint.orbax.read import load
from fqjax.checkpoint.orbax.write import refuse_existing, save
from fqjax.data.python_docs import held_out_text, reference_text
from fqjax.data.text import calibration_batches, decode_new, encode, encode_prompt
from fqjax.evaluation.perplexity import perplexity
from fqjax.inference.generate import generate
from fqjax.models.causal_lm import CausalLM
from fqjax.presets import PRESETS
from fqjax.quantize import quantize
from fqjax.report.report import Report, format_bytes
from fqjax.runtime.progress import part_of_all
from fqjax.server.run import lacking_packages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKPOINT = Path(__file__).parent / "checkpoint"
SAVED = "flattenquant"
"""The row whose model is saved, and then evaluated and run as loaded."""

WINDOW, WINDOWS, SAMPLES = 256, 24, 32
PROMPT = "Return a list of the"

UNCUT = ["flatten_activations=false", "flatten_weights=false"]


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      scheme: preset.
      settings: what is changed in it, as ``--set`` takes it.
      meaning: what the row shows.
    """

    scheme: str
    settings: list[str]
    meaning: str


ROWS = {
    "bf16": Row("bf16", [], "the model as it is"),
    "w8a8": Row("w8a8", [], "INT8, one scale a tensor; outliers use up the codes"),
    "smoothquant": Row("smoothquant", [], "smoothed: outliers move in part into the weights"),
    "smoothquant+equalize": Row("smoothquant", ["equalize=true"], "output channels are equalized first"),
    "flattenquant-w8a8": Row("flattenquant-w8a8", [], "and what is left of outliers is flattened"),
    "flattenquant, uncut": Row("flattenquant", UNCUT, "half of the arithmetic in INT4, nothing flattened"),
    "flattenquant": Row("flattenquant", [], "half of the arithmetic in INT4, flattened"),
    "w4a8-awq": Row("w4a8-awq", [], "all weights in INT4, a scale for each group of 128"),
}
"""What is shown, by the name in the table: each row tells one piece apart from the row before."""

INTRODUCTION = f"""\
A Llama of 2.9 M parameters, trained on Python's documentation, with outlier
channels like a large model's. Every scheme calibrates on {SAMPLES} windows of its
training text; perplexity is measured on documentation it never saw.

  ratio         perplexity over that in bf16: 1.000 is no loss
  INT4          share of the linear layers' arithmetic with weights of 4 bits
  K'/K          input channels of those layers, flattened ones over those before
  linear bytes  what the linear layers take in memory
"""
CONCLUSION = """\
Here smoothing and equalization do the most. What flattening adds to them can't
be told from chance, in INT8 or in INT4. The text is nonsense, as the model is
small; it shows that both models run.
"""
COLUMNS = {"perplexity": 11, "ratio": 7, "INT4": 8, "K'/K": 7, "linear bytes": 14, "seconds": 9}
"""Headings after the first, and how wide each column is."""
NAME_WIDTH = 22


def run_demo(out: Path, console: Console) -> None:
    """Runs the demonstration and leaves an fqjax checkpoint in ``out``.

    Raises:
      InputError: if ``out`` exists or cannot be written.
    """
    refuse_existing(out)
    console.print(INTRODUCTION, highlight=False)
    model, tokenizer = load_hf(CHECKPOINT)
    held_out = encode(tokenizer, held_out_text())
    batches = calibration_batches(encode(tokenizer, reference_text()), model.config, samples=SAMPLES, window=WINDOW)
    _print_row(console, "", list(COLUMNS))
    _print_row(console, "", ["-" * (width - 2) for width in COLUMNS.values()])
    models, reference = {}, 0.0
    for i, (name, row) in enumerate(ROWS.items()):
        start = time.perf_counter()
        with part_of_all(f"{name} ({i + 1} of {len(ROWS)})"):
            candidate, report = quantize(model, PRESETS[row.scheme].override(row.settings), batches)
            if name == SAVED:
                save(out, candidate, tokenizer=tokenizer, report=report)
                candidate = load(out)
            value = perplexity(candidate, held_out, WINDOW, windows=WINDOWS)
        reference = reference or value
        if name in ("bf16", SAVED):
            models[name] = candidate
        _print_row(console, name, _cells(value, value / reference, report, time.perf_counter() - start))
    console.print()
    for name, row in ROWS.items():
        console.print(f"  {name:{NAME_WIDTH}}{row.meaning}", highlight=False)
    console.print(f"\n{CONCLUSION}", highlight=False)
    for name, candidate in models.items():
        console.print(Text.assemble((f"{name} writes: ", "bold"), _continue(candidate, tokenizer)))
    console.print(how_to_go_on(out), highlight=False, markup=False, soft_wrap=True)


def _print_row(console: Console, name: str, cells: list[str]) -> None:
    line = f"{name:{NAME_WIDTH}}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)
    )
    console.print(line, highlight=False)


def _cells(value: float, ratio: float, report: Report, seconds: float) -> list[str]:
    return [
        f"{value:.2f}",
        f"{ratio:.3f}",
        f"{report.int4_mac_share:.1%}",
        f"{report.expansion:.3f}",
        format_bytes(report.bytes),
        f"{seconds:.1f}",
    ]


def _continue(model: CausalLM, tokenizer: "PreTrainedTokenizerBase") -> str:
    tokens = encode_prompt(tokenizer, model.config, PROMPT)
    new = generate(model, tokens, max_new_tokens=24)
    return PROMPT + decode_new(tokenizer, model.config, tokens, new).replace("\n", " ")


def how_to_go_on(out: Path) -> str:
    """What can be done with the checkpoint in ``out``, as commands that can be called from here."""
    program = _program()
    lacking = lacking_packages()
    extra = f"  {shlex.quote(sys.executable)} -m pip install 'fqjax[serve]'\n" if lacking else ""
    return f"""
The {SAVED} model is in {out}. Look at it:
  {program} inspect {shlex.quote(str(out))}

Serve it to a browser, and to clients of OpenAI's interface:
{extra}  {program} serve {shlex.quote(str(out))}

With a model of your own (a directory or a hub id of Hugging Face):
  {program} convert path/to/model out --scheme w4a8-gptq --calibration text.txt
  {program} eval out --text test.txt
{program} schemes lists all; docs/choosing_a_scheme.md says which to take."""


def _program() -> str:
    """The command as it can be called from here: by its path, where its environment is not active."""
    called = Path(sys.argv[0])
    if called.name != "fqjax" or shutil.which("fqjax") == str(called.absolute()):
        return "fqjax"
    return shlex.quote(str(called))
