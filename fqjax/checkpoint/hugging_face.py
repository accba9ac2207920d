"""Hugging Face directories and hub ids into Flax models, without torch.

Every parameter of the model is one or several tensors of the checkpoint: a linear layer's kernel is the transposed weight,
a fused layer's the concatenation of its parts.  All names, shapes and files are checked before the first value is read.
Layers that are quantized already become quantized layers (:mod:`fqjax.checkpoint.compressed`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import PathParts
from jaxtyping import DTypeLike

from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.compressed.config import Quantization, read_quantization
from fqjax.checkpoint.compressed.read import StoredLayer, read_layers, stored_layer
from fqjax.checkpoint.fields import ModelConfig, check_depth
from fqjax.checkpoint.foreign import foreign
from fqjax.checkpoint.naming import HEAD, Source, found
from fqjax.checkpoint.safetensors import TensorFiles
from fqjax.checkpoint.text_tokens import with_text_tokens
from fqjax.checkpoint.tokenizer import load_tokenizer
from fqjax.layers.stacked import stacked
from fqjax.layers.surgery import replace_modules, shorten
from fqjax.models import FAMILIES, Family
from fqjax.models.alike import shapes_alone
from fqjax.models.causal_lm import CausalLM
from fqjax.runtime.arguments import check_float_dtype, check_path
from fqjax.runtime.errors import InputError
from fqjax.runtime.notices import said_at_the_end, say_once
from fqjax.runtime.progress import track

Parameters = Mapping[PathParts, nnx.Variable]
"""A model's parameters by path, as ``nnx.to_flat_state`` gives them."""

DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
"""Files that are downloaded of a hub repository."""

ConfigT = TypeVar("ConfigT", bound=ModelConfig)

UNUSED_ENDINGS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of tensors that some exports contain and no model needs."""


@said_at_the_end()
def load_hf(path_or_id: str | Path, dtype: DTypeLike = jnp.bfloat16) -> tuple[CausalLM, Any]:
    """Load a Hugging Face checkpoint.

    Args:
      path_or_id: a directory with config.json and safetensors, or the id of a hub repository ("org/name").
      dtype: dtype of the model's parameters and activations.

    Returns:
      The Flax model, and its tokenizer (None if the directory has none).  A checkpoint that is quantized in the format
      compressed-tensors gives a quantized model, with the same codes and scales.

    Raises:
      InputError: naming the file, tensor or entry at fault: no such directory, an unsupported architecture, a missing
        or truncated shard, a tensor that is missing, of the wrong shape or not finite, a quantization that fqjax cannot
        express.
    """
    dtype = check_float_dtype("dtype", dtype)
    directory = resolve_directory(path_or_id)
    name, config = read_architecture(directory)
    tokenizer = load_tokenizer(directory)
    model = read_model(directory, name, with_text_tokens(config, directory, tokenizer), dtype)
    return model, tokenizer


def resolve_directory(path_or_id: str | Path) -> Path:
    """A local directory as it is, a hub id as the directory it was downloaded to.

    Raises:
      InputError: if there is no such directory and the hub does not supply one.
    """
    path = check_path("path_or_id", path_or_id)
    if path.is_dir():
        return path
    text = str(path_or_id)
    if (why := foreign(path)) is not None:
        raise InputError(f"{text}: {why}")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(f"{text}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=DOWNLOAD_PATTERNS))
    except Exception as error:  # The hub's client raises a dozen kinds; all mean that the checkpoint is not to be had.
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{text}: no such directory, and not available from the Hugging Face hub ({why})") from None


def abstract_model(name: str, config: ModelConfig, dtype: DTypeLike) -> CausalLM:
    """The model with shapes and dtypes in place of arrays."""
    with shapes_alone():
        return nnx.eval_shape(lambda: FAMILIES[name].model(config, dtype=dtype, rngs=nnx.Rngs(0)))


def read_model(directory: Path, name: str, config: ModelConfig, dtype: DTypeLike) -> CausalLM:
    """Builds the model from the directory's tensors, one at a time."""
    files = TensorFiles(directory)
    check_depth(f"{directory / 'config.json'}", config, len(files.names()))
    config = with_own_head(config, files, FAMILIES[name])
    graphdef, state = nnx.split(abstract_model(name, config, dtype))
    flat = dict(nnx.to_flat_state(state))
    quantization = read_quantization(directory)
    layers = check_layers(files, FAMILIES[name], flat, quantization)
    sources = check_tensors(files, FAMILIES[name], flat, layers)
    for path, source in track(sources.items(), "loading", len(sources)):
        flat[path] = flat[path].replace(read_source(files, source, dtype))
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return stacked(replace_modules(model, read_layers(model, files, layers, dtype)), in_place=True) if layers else model


def with_own_head(config: ConfigT, files: TensorFiles, family: Family) -> ConfigT:
    """The configuration, untied where the files hold a head that is not the embedding, whatever config.json says.

    Fine-tuning that shards its parameters unties the two and leaves config.json as it was.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return config
    naming = found(files.names(), family)
    head = [name for name in files.names() if name.startswith(f"{naming.head}.")]
    if not head or any(files.files.get(name) in files.missing for name in (*head, naming.embedding)):
        return config
    if head == [f"{naming.head}.weight"] and files.same(head[0], naming.embedding):
        return config
    say_once(
        f"{files.directory}: tie_word_embeddings is true in config.json, but {head[0]} is not the embedding; the head of the "
        "files is used"
    )
    files.unlisted.discard(head[0])  # All is said of it.
    return dataclasses.replace(config, tie_word_embeddings=False)  # pyright: ignore[reportArgumentType]


def check_layers(
    files: TensorFiles, family: Family, parameters: Parameters, quantization: Quantization | None
) -> dict[str, StoredLayer]:
    """Finds the layers that are quantized in the checkpoint, by dotted path, and checks their tensors by the files' headers.

    Raises:
      InputError: naming a tensor that is missing or of another shape or dtype than the configuration implies, or modules
        that would have to be quantized alike.
    """
    layers: dict[str, StoredLayer] = {}
    if quantization is None:
        return layers
    naming = found(files.names(), family)
    for file in files.missing:
        raise InputError(f"{files.directory / file}: missing; of a checkpoint that is quantized all is needed")
    for path, parameter in parameters.items():
        if path[-1] == "kernel":
            name = ".".join(str(part) for part in path[:-1])
            modules = [tensor.removesuffix(".weight") for tensor in naming.source(path).tensors]
            layer = stored_layer(files, quantization, name, modules, parameter.shape[::-1])
            layers |= {} if layer is None else {name: layer}
    return layers


def check_tensors(
    files: TensorFiles, family: Family, parameters: Parameters, layers: Mapping[str, StoredLayer] | None = None
) -> dict[PathParts, Source]:
    """Finds every parameter's tensors and checks their shapes, without reading values.

    Args:
      files: of the checkpoint.
      family: of the architecture.
      parameters: by path.
      layers: those that are quantized in the checkpoint, as :func:`check_layers` returns them; their weights are left out.

    Raises:
      InputError: naming a tensor that is missing, unexpected, or of another shape than the configuration implies.
    """
    naming, layers = found(files.names(), family), layers or {}
    kernels = {(*name.split("."), "kernel") for name in layers}
    sources = {path: naming.source(path) for path in parameters if tuple(str(part) for part in path) not in kernels}
    for path, source in sources.items():
        for tensor in source.tensors:
            if tensor not in files:
                raise InputError(f"{files.directory}: tensor {tensor!r} is missing{_hint(files, tensor)}")
        if all(files.has_header(tensor) for tensor in source.tensors):
            _check_shape(files, source, parameters[path].shape)
    wanted = {tensor for source in sources.values() for tensor in source.tensors}
    wanted |= {tensor for layer in layers.values() for tensor in layer.tensors}
    unused = wanted | {f"{naming.head}.weight"}  # If it is tied.
    ignored = []
    for tensor in files.names():
        if tensor in unused or f".{tensor}".endswith(UNUSED_ENDINGS):
            continue
        what = f"{files.directory}: tensor {tensor!r} is not part of the architecture in config.json"
        if tensor not in files.unlisted:
            raise InputError(what)
        ignored.append(what)
    if taken := sorted(wanted & files.unlisted):
        say_once(f"{files.directory}: {shorten(taken)}: in a shard, though not listed in the index; read from there")
    if ignored:
        say_once(f"{ignored[0]}, nor listed in the index; it is not read ({len(ignored)} in all)")
    return sources


def _hint(files: TensorFiles, tensor: str) -> str:
    """What in config.json a missing tensor contradicts."""
    module = tensor.removesuffix(".weight")
    if any(f"{module}.{ending}" in files for ending in ("weight_packed", "weight_scale")):
        return f"; {module} is quantized in the files, but not in the quantization_config of config.json"
    if module == HEAD:
        return "; tie_word_embeddings is not true in config.json, expected so where the head is the embedding"
    return ""


def _check_shape(files: TensorFiles, source: Source, wanted: tuple[int, ...]) -> None:
    shapes = [files.shape(tensor) for tensor in source.tensors]
    wanted = wanted[::-1] if source.transpose else wanted
    if source.part is not None:
        (shape,) = shapes
        if shape[1:] != wanted or source.part >= shape[0]:
            raise InputError(
                f"{files.directory}: tensor {source.tensors[0]!r} has shape {shape}, config.json implies {wanted} for each "
                f"of more than {source.part} experts"
            )
        return
    rows = sum(shape[0] if shape else 0 for shape in shapes)
    for tensor, shape in zip(source.tensors, shapes, strict=True):
        if shape[1:] != wanted[1:] or len(shape) != len(wanted) or rows != wanted[0]:
            whole = "" if len(shapes) == 1 else f" ({' + '.join(t.split('.')[-2] for t in source.tensors)} together)"
            raise InputError(
                f"{files.directory}: tensor {tensor!r} has shape {shape}, config.json implies {wanted}{whole}"
            )


def read_source(files: TensorFiles, source: Source, dtype: DTypeLike) -> jax.Array:
    """Reads one parameter."""
    parts = [files.read(tensor, dtype, source.part) for tensor in source.tensors]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
    return jnp.asarray(values.T if source.transpose else values)
