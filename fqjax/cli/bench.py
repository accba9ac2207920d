"""``fqjax bench``: times of the kernels and of whole models."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from fqjax.cli.app import JsonFile, app, console, write_json
from fqjax.runtime.errors import InputError


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
    keep = functools.partial(write_json, json_file)
    keep(_bench_kernels(shapes, rows) if what == "kernels" else _bench_model(model, scheme, prefill, decode, keep))


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
