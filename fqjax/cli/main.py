"""The ``fqjax`` command.  Every subcommand is a thin layer over one function of the library.

Exit codes: 0 done; 2 bad usage or bad input, with one line on stderr; 130 interrupted.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fqjax.runtime.errors import InputError
from fqjax.runtime.quiet import CLOSED
from fqjax.scheme import PRESETS, resolve_scheme

app = typer.Typer(
    name="fqjax",
    help="Quantize language models to integers with FlattenQuant, and run them in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

INTERRUPTED = 130
"""What typer makes of Ctrl-C."""

Model = Annotated[str, typer.Argument(help="Directory of a Hugging Face or an fqjax checkpoint, or a hub id.")]


def _in_a_directory(path: Path | None) -> Path | None:
    """Refuses a file that could not be written, before the work whose result it is to hold."""
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path}: its directory does not exist")
    return path


KvCache = Annotated[
    str | None,
    typer.Option(help="int8 for keys and values as INT8 codes; by default in the model's dtype.", metavar="KIND"),
]

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write what is printed to this file.", metavar="FILE", callback=_in_a_directory),
]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Hugging Face directory or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Orbax directory to create.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Preset; 'fqjax schemes' lists them. A checkpoint that is quantized already takes none.",
            show_default="flattenquant",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; without it, Python's own documentation.", metavar="FILE")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 64,
    window: Annotated[int, typer.Option(help="Tokens in a window, BOS among them.")] = 512,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Leave layers in float whose dotted path this matches; repeatable.", metavar="REGEX"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field of the preset; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the input, print the plan, change nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
) -> None:
    """Quantize a Hugging Face checkpoint into an Orbax directory; one in compressed-tensors is converted as it is."""
    # The scheme is looked at before anything heavy is imported.
    chosen = resolve_scheme(scheme or "flattenquant").override(settings or [])
    from fqjax.convert import run as conversion

    made = conversion.plan(
        conversion.Conversion(
            source=source,
            out=out,
            scheme=chosen,
            calibration=calibration,
            samples=samples,
            window=window,
            ignore=tuple(ignore or ()),
            any_scheme=scheme is None and not settings and not ignore,
        ),
        dry_run=dry_run,
    )
    if dry_run:
        console.print(conversion.plan_table(made))
        return
    if made.batches and calibration is None:
        console.print("Calibrating on Python's documentation; text like yours serves better: --calibration FILE")
    report = conversion.convert(made, resume=resume)
    console.print(report.table())
    console.print(f"wrote {out} in {report.seconds:.0f} s")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Hugging Face directory to create.")],
) -> None:
    """Write a quantized model in the format compressed-tensors, as vLLM and transformers read it."""
    from fqjax.checkpoint.compressed.write import save_compressed_tensors
    from fqjax.checkpoint.orbax import refuse_existing

    refuse_existing(out)
    loaded, tokenizer = _load_with_tokenizer(model, required=False)
    save_compressed_tensors(out, loaded, tokenizer=tokenizer)
    console.print(f"wrote {out}")


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text to predict.", metavar="FILE")],
    window: Annotated[int, typer.Option(help="Tokens in a window, BOS among them.")] = 512,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    kv_cache: KvCache = None,
    json_file: JsonFile = None,
) -> None:
    """Measure a model's perplexity on a text."""
    kind: Any = _known_cache(kv_cache)
    from fqjax.data.text import encode, read_text
    from fqjax.evaluation.perplexity import cut_windows, perplexity

    content = read_text(text)
    loaded, tokenizer = _load_with_tokenizer(model)
    ids = encode(tokenizer, content)
    start = time.perf_counter()
    value = perplexity(loaded, ids, window, windows=windows, kv_cache=kind)
    tokens = len(cut_windows(ids, window, 0, windows)) * (window - 1)
    result = {"perplexity": value, "tokens": tokens, "seconds": time.perf_counter() - start}
    console.print(f"perplexity {value:.4f} over {tokens} tokens, {result['seconds']:.1f} s")
    _write_json(json_file, result)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.", metavar="TEXT")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to append at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    kv_cache: KvCache = None,
) -> None:
    """Continue a prompt."""
    kind: Any = _known_cache(kv_cache)
    from fqjax.data.text import decode_new, encode_prompt
    from fqjax.inference.generate import generate as run

    loaded, tokenizer = _load_with_tokenizer(model)
    tokens = encode_prompt(tokenizer, loaded.config, prompt)
    new = run(loaded, tokens, max_new_tokens, temperature, top_p, seed, kv_cache=kind)
    # Plain output: a model's text is not markup.
    print(prompt + decode_new(tokenizer, loaded.config, tokens, new))


@app.command()
def inspect(
    model: Model,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Write pictures into this directory.", metavar="DIR")] = None,
) -> None:
    """Show a model layer by layer: bits, flattened channels, error, bytes.

    With --plot also pictures: the channels before and after flattening, the bits of every layer, and what more INT4 would
    cost; the numbers behind them as CSV and JSON.
    """
    from fqjax.report.findings import read_findings
    from fqjax.report.report import quantized_layers, report_of

    loaded = _load_model(model)
    layers = quantized_layers(loaded)
    kinds = {name: (layer.input.get_value().multiplier.size, layer.bits) for name, layer in layers.items()}
    report = report_of(loaded, findings=read_findings(Path(model), kinds))
    console.print(report.table())
    if json_file is not None:
        _write_json(json_file, report.to_json())
    if plot is not None:
        from fqjax.report.plots import plot_report

        for path in plot_report(loaded, report, plot):
            console.print(f"wrote {path}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the quantized checkpoint.")] = Path("fqjax-demo"),
) -> None:
    """Run the whole path on the bundled checkpoint."""
    from fqjax.demo.run import run_demo

    run_demo(out, console)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="What to measure: kernels or model.", metavar="kernels|model")],
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="kernels: output x input channels; repeatable.", metavar="NxK")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", help="kernels: rows of activations; repeatable.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="model: a config.json, or llama-3-8b, llama-3-70b, opt-30b, mixtral-8x7b, tiny."),
    ] = None,
    scheme: Annotated[
        list[str] | None, typer.Option("--scheme", help="model: a preset, or preset+int8-head+int8-cache; repeatable.")
    ] = None,
    prefill: Annotated[
        list[str] | None, typer.Option(help="model: sequences x tokens of prompts; repeatable.", metavar="BxT")
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="model: sequences x tokens in the cache; repeatable.", metavar="BxT")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time the kernels, or a whole model with random weights, on this machine, with the device's ceilings."""
    given = {"kernels": {"--shape": shapes, "--rows": rows}}
    given["model"] = {"--model": model, "--scheme": scheme, "--prefill": prefill, "--decode": decode}
    if what not in given:
        raise InputError(f"bench: there is no benchmark {what!r}; there are: kernels, model")
    for other in given.keys() - {what}:
        for option, value in given[other].items():
            if value:
                raise InputError(f"bench {what}: {option} is an option of bench {other}")
    keep = functools.partial(_write_json, json_file)
    keep(_bench_kernels(shapes, rows) if what == "kernels" else _bench_model(model, scheme, prefill, decode, keep))


def _bench_kernels(shapes: list[str] | None, rows: list[int] | None) -> dict[str, Any]:
    from fqjax.bench.kernels import default_shapes, line, parse_shape, run, summary

    all_shapes, all_rows = default_shapes()
    chosen = [parse_shape(shape) for shape in shapes] if shapes else all_shapes
    if any(m < 1 for m in rows or ()):
        raise InputError(f"--rows must be positive, got {min(rows or ())}")
    result = run(chosen, rows or all_rows, lambda row: console.print(line(row), highlight=False, soft_wrap=True))
    console.print(summary(result), highlight=False)
    return result


def _bench_model(
    model: str | None,
    schemes: list[str] | None,
    prefill: list[str] | None,
    decode: list[str] | None,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    import jax

    from fqjax.bench.model import SCHEMES, line, parse_case, parse_variant, run, summary
    from fqjax.bench.random_models import architecture

    name = model or ("llama-3-8b" if jax.default_backend() == "gpu" else "tiny")
    cases = [parse_case("prefill", text) for text in prefill or ()] + [
        parse_case("decode", text) for text in decode or ()
    ]
    chosen = [parse_variant(scheme) for scheme in schemes or SCHEMES]
    result = run(
        name,
        architecture(name),
        chosen,
        cases or None,
        report=lambda row: console.print(line(row), highlight=False, soft_wrap=True),
        keep=keep,
    )
    console.print(summary(result), highlight=False)
    return result


@app.command()
def schemes() -> None:
    """List the presets: what each is, what it costs."""
    table = Table()
    table.add_column("scheme", no_wrap=True)
    table.add_column("what it is")
    for preset in PRESETS.values():
        table.add_row(preset.name, preset.summary)
    console.print(table)


def _known_cache(kind: str | None) -> str | None:
    """Refuses an unknown kind of cache before a model is loaded."""
    if kind not in (None, "int8"):
        raise InputError(f"--kv-cache {kind}: expected int8")
    return kind


def _load_model(source: str) -> Any:
    from fqjax.checkpoint.source import Source

    return Source(source).model()


def _load_with_tokenizer(source: str, *, required: bool = True) -> tuple[Any, Any]:
    from fqjax.checkpoint.source import Source

    opened = Source(source)
    # The tokenizer first: what is wrong with it shows before the weights are read.
    tokenizer = opened.tokenizer(required=required)
    return opened.model(), tokenizer


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        result = app(arguments, standalone_mode=False)
        if result == INTERRUPTED:
            print("fqjax: interrupted", file=sys.stderr)
        return result if isinstance(result, int) else 0
    except InputError as error:
        return _complain(str(error))
    except Exception as error:
        # typer's usage errors come from a vendored module whose name has changed between versions.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = message()
        return _complain(text) if text else 2


def _complain(message: str) -> int:
    print(f"fqjax: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _quiet_late_reads(unraisable: Any) -> None:
    """Says nothing of reads that end after a failed load closed their event loop; the failure was reported."""
    if str(unraisable.exc_value) != CLOSED:
        sys.__unraisablehook__(unraisable)


def run() -> None:
    """Entry point of the installed command."""
    sys.unraisablehook = _quiet_late_reads
    sys.exit(main())


if __name__ == "__main__":
    run()
