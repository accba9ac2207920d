"""The plan of a conversion: everything that can be known, and found wrong, before a weight is read."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx

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
from fqjax.drivers.ties import units_of
from fqjax.layers.surgery import Selection, select_linears
from fqjax.models import FAMILIES
from fqjax.models.sites import Site, sites_of
from fqjax.presets import PRESETS, check_data_free
from fqjax.rewrites.fold import folding_obstacle
from fqjax.runtime.arguments import check_whole
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, exists, reason
from fqjax.runtime.notices import said_at_the_end
from fqjax.scheme import Scheme
from fqjax.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    @property
    def export_obstacle(self) -> str | None:
        """Why the result cannot be exported in the format compressed-tensors; None if nothing is known against it."""
        if self.stored_bits:  # It comes from that format.
            return None
        return self.conversion.scheme.export_obstacle(folding_obstacle(self.sites, self.selection.linears))


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


def size_of(linear: nnx.Linear) -> int:
    """Weights of a linear layer."""
    return linear.in_features * linear.out_features


def _check_share(scheme: Scheme, linears: dict[str, nnx.Linear], config: ModelConfig) -> None:
    """Refuses layers to keep in INT8 that put the share of INT4 out of reach.

    A token passes every layer once, but of a mixture's experts only some.
    """
    if scheme.method is None:
        return
    kept, experts = scheme.kept_in_int8(linears), getattr(config, "num_experts_per_tok", 1)
    units = units_of(linears)
    macs = {unit: size_of(linears[names[0]]) * min(len(names), experts) for unit, names in units.items()}
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
