"""Conversion of a Hugging Face checkpoint into a quantized Orbax directory, as ``fqjax convert`` does it.

Everything that can be wrong with the input is looked for first: the plan is made from headers and configurations alone,
before a weight is read.  The work then goes on in ``OUT.partial``, which remembers each finished step; the directory OUT
appears at the end, complete, by one rename.  A conversion may be killed at any moment; ``--resume`` goes on from there.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

from fqjax.checkpoint.compressed.config import read_quantization
from fqjax.checkpoint.fields import check_depth
from fqjax.checkpoint.files import read_json
from fqjax.checkpoint.hugging_face import (
    abstract_model,
    check_layers,
    check_tensors,
    read_architecture,
    read_model,
    resolve_directory,
)
from fqjax.checkpoint.manifest import NAME
from fqjax.checkpoint.orbax import refuse_existing, write
from fqjax.checkpoint.safetensors import TensorFiles
from fqjax.checkpoint.tokenizer import check_vocabulary, load_tokenizer
from fqjax.core.flatten import padded_width
from fqjax.corpus import reference_text
from fqjax.errors import InputError
from fqjax.findings import Findings
from fqjax.memo import DirectoryMemo, write_whole
from fqjax.models import FAMILIES
from fqjax.models.head import with_int8_head
from fqjax.quantize import quantize_with
from fqjax.report import Report, format_bytes, narrow_table, report_of
from fqjax.scheme import PRESETS, Scheme
from fqjax.surgery import Selection, select_linears
from fqjax.text import calibration_batches, encode, read_text

try:
    import fcntl
except ImportError:  # Not on Windows, where two conversions into one directory go unnoticed.
    fcntl = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert, and how.

    Attributes:
      source: Hugging Face directory or hub id.
      out: directory to create.
      scheme: method and settings.
      calibration: text file; None takes Python's own documentation.
      samples: windows of calibration text.
      window: tokens in a window, BOS among them.
      ignore: regular expressions of layers to leave in float.
      any_scheme: whether the scheme may be passed over; a source that is quantized already is converted as it is, with
        no scheme but "bf16".
    """

    source: str
    out: Path
    scheme: Scheme
    calibration: Path | None = None
    samples: int = 64
    window: int = 512
    ignore: tuple[str, ...] = ()
    any_scheme: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion whose input has been found good.

    Attributes:
      conversion: what was asked for.
      directory: the local source.
      architecture: its name and configuration.
      selection: layers to quantize and to leave; abstract.
      tokenizer: of the source, or None.
      batches: calibration data; empty for a scheme that needs none.
      fingerprint: identifies source, text and settings.
      stored_bits: of the layers that are quantized in the source, by dotted path.
    """

    conversion: Conversion
    directory: Path
    architecture: tuple[str, Any]
    selection: Selection
    tokenizer: Any
    batches: list[np.ndarray]
    fingerprint: dict[str, Any]
    stored_bits: dict[str, int]


def plan(conversion: Conversion) -> Plan:
    """Checks everything that can be checked without reading a weight.

    Raises:
      InputError: naming what is wrong, and what was expected.
    """
    refuse_existing(conversion.out)
    directory = resolve_directory(conversion.source)
    if (directory / NAME).is_file():
        raise InputError(f"{directory}: already an fqjax checkpoint; expected a Hugging Face directory")
    name, config = read_architecture(directory)
    files = TensorFiles(directory)
    check_depth(f"{directory / 'config.json'}", config, len(files.names()))
    model = abstract_model(name, config, jnp.bfloat16)
    parameters = dict(nnx.to_flat_state(nnx.state(model)))
    layers = check_layers(files, FAMILIES[name], parameters, read_quantization(directory))
    check_tensors(files, FAMILIES[name], parameters, layers)
    if layers:
        conversion = _as_it_is(conversion)
    selection = select_linears(model, conversion.ignore)
    conversion.scheme.kept_in_int8(selection.linears)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    text, batches = "", []
    if conversion.scheme.method != "none":
        text, batches = _calibration(conversion, tokenizer, config)
    return Plan(
        conversion,
        directory,
        (name, config),
        selection,
        tokenizer,
        batches,
        _fingerprint(conversion, files, text),
        {name: layer.bits for name, layer in layers.items()},
    )


def _as_it_is(conversion: Conversion) -> Conversion:
    """The conversion of a source that is quantized already, in which nothing is quantized anew."""
    if conversion.scheme.method != "none" and not conversion.any_scheme:
        raise InputError(
            f"{conversion.source}: quantized already, in the format compressed-tensors; expected no scheme, settings or "
            "layers to ignore, as it is converted as it is"
        )
    return dataclasses.replace(conversion, scheme=PRESETS["bf16"])


def convert(made: Plan, *, resume: bool = False) -> Report:
    """Carries a plan out.

    Args:
      made: what :func:`plan` returned.
      resume: go on with a conversion that was interrupted.

    Returns:
      The report on the converted model; the directory is written.

    Raises:
      InputError: if a weight or an activation is not finite, a layer could overflow, or an unfinished conversion stands
        in the way.  Nothing is left behind then, unless ``resume`` was asked for.
    """
    start = time.perf_counter()
    staging = staging_directory(made.conversion.out)
    with _claimed(staging, made.fingerprint, resume):
        try:
            model, findings = _quantized(made, staging)
            finished = staging / "checkpoint"
            shutil.rmtree(finished, ignore_errors=True)
            write(finished, model, made.tokenizer, findings)
            refuse_existing(made.conversion.out)
            finished.rename(made.conversion.out)
        except InputError:
            if not resume:
                shutil.rmtree(staging, ignore_errors=True)
            raise
    shutil.rmtree(staging, ignore_errors=True)
    return report_of(model, time.perf_counter() - start, findings)


def staging_directory(out: Path) -> Path:
    """Where an unfinished conversion keeps what it has."""
    return out.with_name(out.name + ".partial")


def plan_table(made: Plan) -> Table:
    """The plan as ``--dry-run`` prints it: every linear layer with its shape, format and estimated bytes."""
    scheme = made.conversion.scheme
    kinds = {0.0: "INT8", 1.0: "INT4"}
    kind = "bf16" if scheme.method == "none" else kinds.get(scheme.int4_share, "INT4 or INT8")
    kept = scheme.kept_in_int8(made.selection.linears)
    table = narrow_table(f"{made.directory} to {made.conversion.out}, scheme {scheme.name}", "")
    for heading in ("layer", "out x in", "format", "bf16", "estimate"):
        table.add_column(heading, justify="left" if heading in ("layer", "format") else "right", no_wrap=True)
    before, after = 0, 0.0
    for name, linear in made.selection.linears.items():
        plain = 2 * linear.in_features * linear.out_features
        stored = made.stored_bits.get(name)
        label = f"INT{stored}" if stored else "INT8" if name in kept else kind
        if stored:
            estimate = plain * stored / 16
        else:
            estimate = plain if scheme.method == "none" else _estimated_bytes(linear, scheme, int4=name not in kept)
        before, after = before + plain, after + estimate
        shape = f"{linear.out_features} x {linear.in_features}"
        table.add_row(name, shape, label, format_bytes(plain), format_bytes(estimate))
    for name in made.selection.skipped:
        table.add_row(name, "", "INT8" if scheme.int8_head and name == "lm_head" else "float", "", "", style="dim")
    windows = sum(len(batch) for batch in made.batches)
    reasons = "".join(f"\n{name}: {reason}." for name, reason in made.selection.skipped.items())
    table.caption = (
        f"Linear layers: {format_bytes(before)} in bf16, about {format_bytes(after)} before flattening.\n"
        f"Calibration: {windows} windows of {made.conversion.window} tokens.{reasons}"
    )
    return table


def _estimated_bytes(linear: nnx.Linear, scheme: Scheme, *, int4: bool) -> float:
    """Of codes and group scales, before flattening."""
    share = scheme.int4_share if int4 else 0.0

    def size(bits: int) -> float:
        width = padded_width(linear.in_features, bits)
        scales = 4 * width / scheme.group_size if scheme.method == "grouped" else 0
        return linear.out_features * (width * bits / 8 + scales)

    return share * size(4) + (1 - share) * size(8)


def _quantized(made: Plan, staging: Path) -> tuple[nnx.Module, Findings | None]:
    conversion = made.conversion
    model = read_model(made.directory, *made.architecture, jnp.bfloat16)
    if conversion.scheme.method == "none":
        return (with_int8_head(model) if conversion.scheme.int8_head else model), None
    memo = DirectoryMemo(staging, conversion.scheme)
    return quantize_with(memo, model, conversion.scheme, made.batches, conversion.ignore)


def _calibration(conversion: Conversion, tokenizer: Any, config: Any) -> tuple[str, list[np.ndarray]]:
    if tokenizer is None:
        raise InputError(f"{conversion.source}: has no tokenizer, which calibration needs")
    text = reference_text() if conversion.calibration is None else read_text(conversion.calibration)
    try:
        batches = calibration_batches(
            encode(tokenizer, text), config, samples=conversion.samples, window=conversion.window
        )
    except InputError as error:
        raise InputError(f"{conversion.calibration or 'calibration'}: {error}") from None
    return text, batches


def _fingerprint(conversion: Conversion, files: TensorFiles, text: str) -> dict[str, Any]:
    shards = sorted({files.directory / file for file in files.files.values()})
    return {
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in shards},
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "scheme": dataclasses.asdict(conversion.scheme),
        "samples": conversion.samples,
        "window": conversion.window,
        "ignore": list(conversion.ignore),
    }


@contextlib.contextmanager
def _claimed(staging: Path, fingerprint: dict[str, Any], resume: bool) -> Iterator[None]:
    """Holds the staging directory for this process, begun anew or taken up where it was left."""
    record = staging / "plan.json"
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        if staging.exists() and not resume:
            raise InputError(f"{staging}: an unfinished conversion; pass --resume to go on with it, or remove it")
        staging.mkdir(exist_ok=resume)
        lock = open(staging / "lock", "w")
    except OSError as error:
        raise InputError(f"{staging}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{staging}: another conversion is writing to it") from None
        if not record.is_file():
            write_whole(record, json.dumps(fingerprint, indent=1).encode())
        begun = read_json(record, "record of a conversion")
        differing = [key for key in fingerprint if begun.get(key) != fingerprint[key]]
        if differing:
            raise InputError(f"{staging}: begun with other {differing[0]}; remove it, or convert as it was begun")
        yield
