"""``fqjax bench``: times of the kernels, of whole models, and of serving."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from fqjax.cli.app import JsonFile, app, console, write_json
from fqjax.cli.usage import Application
from fqjax.runtime.errors import InputError

bench = Application(no_args_is_help=True, help="Time the kernels, whole models, or serving on this machine.")
app.add_typer(bench, name="bench")

MODELS = "A config.json, or llama-3-8b, llama-3-70b, opt-30b, mixtral-8x7b, tiny."
VARIANTS = "A preset, or preset+int8-head+int8-cache; repeatable."

ModelOption = Annotated[str | None, typer.Option("--model", help=MODELS)]
Schemes = Annotated[list[str] | None, typer.Option("--scheme", help=VARIANTS)]


@bench.command()
def kernels(
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="Output x input channels; repeatable.", metavar="NxK")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", help="Rows of activations; repeatable.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time the integer matmuls beside XLA's and cuBLAS's, with the device's ceilings."""
    write_json(json_file, _bench_kernels(shapes, rows))


@bench.command()
def model(
    name: ModelOption = None,
    scheme: Schemes = None,
    prefill: Annotated[
        list[str] | None, typer.Option(help="Sequences x tokens of prompts; repeatable.", metavar="BxT")
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="Sequences x tokens in the cache; repeatable.", metavar="BxT")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time a whole model with random weights, every scheme beside bf16: prompts and decoded tokens."""
    keep = functools.partial(write_json, json_file)
    keep(_bench_model(name, scheme, prefill, decode, keep))


@bench.command()
def serve(
    name: ModelOption = None,
    scheme: Schemes = None,
    slots: Annotated[list[int] | None, typer.Option("--slots", help="Requests at once; repeatable.")] = None,
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt; drawn between two.", metavar="T|T-T")] = "128",
    new: Annotated[str, typer.Option(help="New tokens of a request; drawn between two.", metavar="T|T-T")] = "32",
    requests: Annotated[int | None, typer.Option(help="How many come; 3 for each slot by default.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second; all at once by default.")] = None,
    burst: Annotated[int, typer.Option(help="Tokens that every slot decodes in a step.")] = 1,
    chunk: Annotated[int, typer.Option(help="Tokens of prompts taken up in a step.")] = 2048,
    json_file: JsonFile = None,
) -> None:
    """Serve requests by a model with random weights: output tokens a second, time to the first token and a token."""
    from fqjax.runtime.arguments import check_whole

    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"--rate {rate:g}: expected requests a second, above 0")
    sizes = [check_whole("--slots", size, 1) for size in slots or (16, 64)]
    counts = [check_whole("--requests", requests, 1) if requests is not None else 3 * size for size in sizes]
    spans = {"prompt": _span("--prompt", prompt), "new": _span("--new", new)}
    for option, value in (("--burst", burst), ("--chunk", chunk)):
        check_whole(option, value, 1)
    settings = {**spans, "rate": rate, "burst": burst, "chunk": chunk}
    keep = functools.partial(write_json, json_file)
    keep(_bench_serving(name, scheme, list(zip(sizes, counts, strict=True)), settings, keep))


def _span(option: str, text: str) -> tuple[int, int]:
    """``"512"`` or ``"100-500"``."""
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise InputError(f"{option} {text}: expected tokens, or two numbers of them as 100-500")
    return int(first), int(last or first)


def _bench_serving(
    model: str | None,
    schemes: list[str] | None,
    sizes: list[tuple[int, int]],
    settings: Mapping[str, object],
    keep: Callable[[Mapping[str, object]], None],
) -> Mapping[str, object]:
    import jax

    from fqjax.bench.environment import describe
    from fqjax.bench.model_cases import parse_variant
    from fqjax.bench.random_models import architecture
    from fqjax.bench.serving import Load, line, run

    gpu = jax.default_backend() == "gpu"
    name = model or ("llama-3-8b" if gpu else "tiny")
    usual = ("bf16", "flattenquant-hopper-int4+int8-head+int8-cache") if gpu else ("bf16", "w8a8")
    chosen = [parse_variant(scheme) for scheme in schemes or usual]
    loads = [Load(slots=slots, requests=count, **settings) for slots, count in sizes]  # pyright: ignore
    result = run(
        name,
        architecture(name),
        chosen,
        loads,
        report=lambda row: console.print(line(row), highlight=False, soft_wrap=True),
        keep=keep,
    )
    console.print(describe(result), highlight=False)
    return result


def _bench_kernels(shapes: list[str] | None, rows: list[int] | None) -> Mapping[str, object]:
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
    keep: Callable[[Mapping[str, object]], None],
) -> Mapping[str, object]:
    import jax

    from fqjax.bench.model import line, run, summary
    from fqjax.bench.model_cases import SCHEMES, parse_case, parse_variant
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
