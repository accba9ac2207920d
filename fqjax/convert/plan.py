"""The plan of a conversion: everything that can be known, and found wrong, before a weight is read."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.checksums import file_checksums
from fqjax.checkpoint.compressed.config import read_quantization
from fqjax.checkpoint.fields import ModelConfig, check_depth
from fqjax.checkpoint.hugging_face import (
    Parameters,
    abstract_model,
    check_layers,
    check_tensors,
    resolve_directory,
    with_own_head,
)
from fqjax.checkpoint.manifest import MANIFEST_FILE
from fqjax.checkpoint.orbax.write import refuse_existing
from fqjax.checkpoint.safetensors import TensorFiles
from fqjax.checkpoint.target import check_target
from fqjax.checkpoint.text_tokens import with_text_tokens
from fqjax.checkpoint.tokenizer import check_vocabulary, load_tokenizer
from fqjax.convert.staging import is_complete
from fqjax.core.table import bytes_of
from fqjax.data.python_docs import reference_text
from fqjax.data.text import calibration_batches, encode, read_text, usual_window
from fqjax.drivers.candidates import check_share
from fqjax.drivers.method import Method
from fqjax.drivers.settings import Compensated
from fqjax.drivers.ties import units_of
from fqjax.layers.linear import layer_bytes
from fqjax.layers.surgery import Selection, select_linears
from fqjax.models import FAMILIES
from fqjax.models.sites import Site, reading_alike, sites_of
from fqjax.presets import PRESETS, check_data_free
from fqjax.report.report import format_bytes, narrow_table
from fqjax.runtime.arguments import check_whole
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, exists, reason
from fqjax.runtime.notices import said_at_the_end
from fqjax.scheme import Scheme
from fqjax.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROCESS_BYTES, FLOAT32_COPIES = 800e6, 6
"""Bytes of the process without a model, and copies of a layer in float32 that are there at once, from what
scripts/measure_conversion_memory.py measured."""


CONTENT_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "*/*.jinja")
"""Files of a source that a conversion may read, but for its weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """Request for a conversion: of which model, how, and where to.

    Attributes:
      source: Hugging Face directory or hub id.
      out: directory to create.
      scheme: method and settings.
      calibration: text file; None takes the documentation of Python 3.12 that comes with the package.
      data_free: whether there is to be no calibration; the weights alone decide.
      samples: windows of calibration text.
      window: tokens in a window, BOS among them; by default 512, or as many as the model has positions.
      ignore: regular expressions of layers to leave in float.
      any_scheme: whether the scheme may be passed over; a source that is quantized already is converted as it is, with
        no scheme but "bf16".
    """

    source: str
    out: Path
    scheme: Scheme
    calibration: Path | None = None
    data_free: bool = False
    samples: int = 64
    window: int | None = None
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
      sites: where the model's linear layers read something.
      tokenizer: of the source, or None.
      batches: calibration data; empty for a scheme that needs none.
      fingerprint: identifies source, text and settings.
      stored_bits: of the layers that are quantized in the source, by dotted path.
      outer_bytes: of each module outside the blocks, as it is read.
      lacking: what a conversion needs and is not there, a line each; empty but in a dry run.
    """

    conversion: Conversion
    directory: Path
    architecture: tuple[str, ModelConfig]
    selection: Selection
    sites: list[Site]
    tokenizer: "PreTrainedTokenizerBase | None"
    batches: list[np.ndarray]
    fingerprint: JsonObject
    stored_bits: dict[str, int]
    outer_bytes: dict[str, int]
    lacking: tuple[str, ...] = ()


@said_at_the_end()
def plan(conversion: Conversion, *, dry_run: bool = False) -> Plan:
    """Checks everything that can be checked without reading a weight.

    Args:
      conversion: what is asked for.
      dry_run: whether shards and the tokenizer may be missing; what is there is checked all the same.

    Raises:
      InputError: naming what is wrong, and what was expected.
    """
    check_target(conversion.out)
    if not is_complete(conversion.out):
        refuse_existing(conversion.out)
    directory = resolve_directory(conversion.source)
    contents = {} if dry_run else _contents(directory)  # Before they are read: what changes between is noticed.
    if exists(directory / MANIFEST_FILE):
        raise InputError(f"{directory}: already an fqjax checkpoint; expected a Hugging Face directory")
    name, config = read_architecture(directory)
    conversion = dataclasses.replace(
        conversion,
        window=usual_window(conversion.window, config),
        samples=check_whole("--samples", conversion.samples, 1, None),
    )
    files = TensorFiles(directory, partial=dry_run)
    check_depth(f"{directory / 'config.json'}", config, len(files.names()) if files.files else None)
    config = with_own_head(config, files, FAMILIES[name])
    model = abstract_model(name, config, jnp.bfloat16)
    parameters = dict(nnx.to_flat_state(nnx.state(model)))
    layers = check_layers(files, FAMILIES[name], parameters, read_quantization(directory))
    if files.files:
        check_tensors(files, FAMILIES[name], parameters, layers)
    if layers:
        conversion = _as_it_is(conversion)
    selection = conversion.scheme.applied(select_linears(model, conversion.ignore))
    _check_share(conversion.scheme, selection.linears, config)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    config = with_text_tokens(config, directory, tokenizer)
    text, batches, lacking = "", [], [f"{directory / file}: missing" for file in files.missing]
    if conversion.data_free:
        check_data_free(conversion.scheme, "--calibration none: ")
    elif conversion.scheme.method is not None:
        if tokenizer is None and dry_run:
            lacking.append(f"{conversion.source}: has no tokenizer, which calibration needs")
        else:
            text, batches = _calibration(conversion, tokenizer, config)
    return Plan(
        conversion,
        directory,
        (name, config),
        selection,
        sites_of(model),
        tokenizer,
        batches,
        {} if dry_run else _fingerprint(conversion, files, contents, text),
        {name: layer.bits for name, layer in layers.items()},
        _outer_bytes(parameters),
        tuple(lacking),
    )


def _check_share(scheme: Scheme, linears: dict[str, nnx.Linear], config: ModelConfig) -> None:
    """Refuses layers to keep in INT8 that put the share of INT4 out of reach.

    A token passes every layer once, but of a mixture's experts only some.
    """
    if scheme.method is None:
        return
    kept, experts = scheme.kept_in_int8(linears), getattr(config, "num_experts_per_tok", 1)
    units = units_of(linears)
    macs = {unit: _size(linears[names[0]]) * min(len(names), experts) for unit, names in units.items()}
    able = sum(macs[unit] for unit, names in units.items() if kept.isdisjoint(names))
    check_share(scheme.method.allocation, able, sum(macs.values()))


def _as_it_is(conversion: Conversion) -> Conversion:
    """The conversion of a source that is quantized already, in which nothing is quantized anew."""
    if conversion.scheme.method is not None and not conversion.any_scheme:
        raise InputError(
            f"{conversion.source}: quantized already, in the format compressed-tensors; expected no scheme, settings or "
            "layers to ignore, as it is converted as it is"
        )
    return dataclasses.replace(conversion, scheme=PRESETS["bf16"])


def plan_table(made: Plan) -> Table:
    """The plan as ``--dry-run`` prints it: every linear layer with its shape, format and estimated bytes."""
    scheme = made.conversion.scheme
    kinds = {0.0: "INT8", 1.0: "INT4"}
    kind = "bf16" if scheme.method is None else kinds.get(scheme.method.allocation.int4_share, "INT4 or INT8")
    kept = scheme.kept_in_int8(made.selection.linears)
    table = narrow_table(f"{made.directory} to {made.conversion.out}, scheme {scheme.name}", "")
    for heading in ("layer", "out x in", "format", "bf16", "estimate"):
        table.add_column(heading, justify="left" if heading in ("layer", "format") else "right", no_wrap=True)
    plain = {name: 2 * _size(linear) for name, linear in made.selection.linears.items()}
    estimate = estimated_bytes(made)
    for name, linear in made.selection.linears.items():
        stored = made.stored_bits.get(name)
        label = f"INT{stored}" if stored else "INT8" if name in kept else kind
        shape = f"{linear.out_features} x {linear.in_features}"
        table.add_row(name, shape, label, format_bytes(plain[name]), format_bytes(estimate[name]))
    for name in made.selection.skipped:
        table.add_row(name, "", "INT8" if scheme.head and name == "lm_head" else "float", "", "", style="dim")
    windows = sum(len(batch) for batch in made.batches)
    reasons = "".join(f"\n{name}: {reason}." for name, reason in made.selection.skipped.items())
    lacking = "".join(f"\n{line}" for line in made.lacking)
    outer = sum(made.outer_bytes.values())
    table.caption = (
        f"Linear layers: {format_bytes(sum(plain.values()))} in bf16, "
        f"about {format_bytes(sum(estimate.values()))} before flattening.\n"
        f"Embeddings, norms and head: {format_bytes(outer)}.\n"
        f"Memory at most: about {format_bytes(peak_memory(made))}.\n"
        f"Calibration: {f'{windows} windows of {made.conversion.window} tokens' if windows else 'none'}.{reasons}"
        + (f"\nNot there yet:{lacking}" if lacking else "")
    )
    return table


def peak_memory(made: Plan) -> float:
    """An estimate of a conversion's peak memory on a CPU, in bytes; on a GPU a part of it is the device's.

    What is needed at once is either one of the modules outside the blocks, twice while it is read or written; or a block,
    with the rows kept of all of its layers' inputs, and several copies in float32 of its largest layer, or of all experts'
    layers that read the same input, or with GPTQ the moments of its inputs and what is needed beside them.
    """
    scheme, linears = made.conversion.scheme, made.selection.linears
    outer = 2 * max(made.outer_bytes.values(), default=0)
    weights = {name: 2 * _size(linear) for name, linear in linears.items()}
    if scheme.method is None:
        return PROCESS_BYTES + max(outer, 3 * _largest_block(weights))
    rows = {name: 4 * scheme.sample_rows * linear.in_features for name, linear in linears.items()}
    largest, together = max(_size(linear) for linear in linears.values()), scheme.method.shares_inputs
    alike = reading_alike(made.sites, linears) if together else [(name,) for name in linears]
    work = 4 * FLOAT32_COPIES * max(sum(_size(linears[name]) for name in names) for names in alike)
    if isinstance(scheme.method.rounding, Compensated):
        moments = {name: 8 * linear.in_features**2 for name, linear in linears.items()}
        # While they are summed up, codes of 16 bits and two weights in float32; then as much again as the largest take.
        besides = max(_largest_block(weights) + 8 * largest, max(moments.values()))
        work = max(work, _largest_block(moments) + besides)
    return PROCESS_BYTES + max(outer, _largest_block({name: weights[name] + rows[name] for name in linears}) + work)


def _size(linear: nnx.Linear) -> int:
    return linear.in_features * linear.out_features


def _largest_block(sizes: dict[str, int]) -> int:
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        block = ".".join(name.split(".")[:2])
        blocks[block] = blocks.get(block, 0) + size
    return max(blocks.values())


def estimated_bytes(made: Plan) -> dict[str, float]:
    """Estimated bytes of each layer, by dotted path, before flattening; where bits are still to be chosen, on average."""
    scheme = made.conversion.scheme
    kept = scheme.kept_in_int8(made.selection.linears)
    found: dict[str, float] = {}
    for name, linear in made.selection.linears.items():
        if scheme.method is None:
            found[name] = 2 * _size(linear) * made.stored_bits.get(name, 16) / 16
        else:
            share = 0.0 if name in kept else scheme.method.allocation.int4_share
            found[name] = share * _bytes(linear, scheme.method, 4) + (1 - share) * _bytes(linear, scheme.method, 8)
    return found


def _bytes(linear: nnx.Linear, method: Method, bits: int) -> int:
    form, quantizer = method.formats(bits)
    return layer_bytes(linear, form, quantizer, form.padded(linear.in_features))


def _calibration(
    conversion: Conversion, tokenizer: "PreTrainedTokenizerBase | None", config: ModelConfig
) -> tuple[str, list[np.ndarray]]:
    if tokenizer is None:
        raise InputError(f"{conversion.source}: has no tokenizer, which calibration needs")
    text = reference_text() if conversion.calibration is None else read_text(conversion.calibration)
    try:
        batches = calibration_batches(
            encode(tokenizer, text), config, samples=conversion.samples, window=usual_window(conversion.window, config)
        )
    except InputError as error:
        raise InputError(f"{conversion.calibration or 'calibration'}: {error}") from None
    return text, batches


def _outer_bytes(parameters: Parameters) -> dict[str, int]:
    """Bytes of each module outside the blocks."""
    found: dict[str, int] = {}
    for path, variable in parameters.items():
        if path[0] != "layers":
            found[str(path[0])] = found.get(str(path[0]), 0) + bytes_of(variable.get_value())
    return found


def _contents(directory: Path) -> JsonObject:
    """The checksum of every file of a source but its weights, by name."""
    found = (path for pattern in CONTENT_PATTERNS for path in directory.glob(pattern))
    try:
        return dict(file_checksums(directory, found))
    except OSError as error:
        raise InputError(f"{error.filename or directory}: cannot be read ({error.strerror or reason(error)})") from None


def _fingerprint(conversion: Conversion, files: TensorFiles, contents: JsonObject, text: str) -> JsonObject:
    return {
        "version": __version__,
        "scheme": conversion.scheme.to_json(),
        "files": files.signature() | contents,
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "samples": conversion.samples,
        "window": conversion.window,
        "ignore": list(conversion.ignore),
    }
