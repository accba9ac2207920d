"""Hugging Face directories and hub ids into Flax models, without torch.

Every parameter of the model is one or several tensors of the checkpoint: a linear layer's kernel is the transposed weight,
a fused layer's the concatenation of its parts.  All names, shapes and files are checked before the first value is read.
Layers that are quantized already become quantized layers (:mod:`fqjax.checkpoint.compressed`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import PathParts
from jaxtyping import DTypeLike

from fqjax.checkpoint.compressed.config import Quantization, read_quantization
from fqjax.checkpoint.compressed.read import StoredLayer, read_layers, stored_layer
from fqjax.checkpoint.fields import ModelConfig, check_counts, check_depth
from fqjax.checkpoint.lazy import quiet_transformers
from fqjax.checkpoint.safetensors import TensorFiles
from fqjax.checkpoint.tokenizer import load_tokenizer
from fqjax.layers.stacked import stacked
from fqjax.layers.surgery import replace_modules
from fqjax.models import FAMILIES, Family
from fqjax.models.causal_lm import CausalLM
from fqjax.runtime.arguments import check_path
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, inside, read_json, reason
from fqjax.runtime.progress import track
from fqjax.runtime.validation import check_given, check_value, validated

if TYPE_CHECKING:
    pass

Parameters = Mapping[PathParts, nnx.Variable]
"""A model's parameters by path, as ``nnx.to_flat_state`` gives them."""

DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
"""Files that are downloaded of a hub repository."""

REQUIRED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Sizes that every configuration has to have: transformers would fill in those of some well-known model."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

UNUSED_ENDINGS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of tensors that some exports contain and no model needs."""


class Source(NamedTuple):
    """Where one parameter comes from: tensors to concatenate along their first axis, and whether to transpose.

    With ``part``, it is that part of one tensor, along its first axis.
    """

    tensors: tuple[str, ...]
    transpose: bool
    part: int | None = None


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
    directory = resolve_directory(path_or_id)
    name, config = read_architecture(directory)
    model = read_model(directory, name, config, dtype)
    return model, load_tokenizer(directory)


def resolve_directory(path_or_id: str | Path) -> Path:
    """A local directory as it is, a hub id as the directory it was downloaded to.

    Raises:
      InputError: if there is no such directory and the hub does not supply one.
    """
    path = check_path("path_or_id", path_or_id)
    if path.is_dir():
        return path
    text = str(path_or_id)
    if path.exists():
        raise InputError(f"{text}: a file; expected a model's directory")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(f"{text}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=DOWNLOAD_PATTERNS))
    except Exception as error:  # The hub's client raises a dozen kinds; all mean that the checkpoint is not to be had.
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{text}: no such directory, and not available from the Hugging Face hub ({why})") from None


def read_architecture(directory: Path) -> tuple[str, ModelConfig]:
    """The architecture's name and the family's configuration, from config.json.

    Raises:
      InputError: if there is no config.json, it names an architecture that fqjax does not have, or an entry is missing,
        absurd or not supported.
    """
    if not (directory / "config.json").exists():
        raise InputError(f"{directory}: not a model directory: it has no config.json")
    path = inside(directory, "config.json")
    raw = read_json(path, "configuration")
    names = raw.get("architectures") or [raw.get("model_type", "unknown")]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{path}: architecture {name} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    check_counts(str(path), raw)
    check_given(family.config, raw, str(path))
    check_value(str, raw.get("model_type"), str(path), "model_type")
    read_quantization(directory)  # What cannot be expressed is better known now than later.
    complete = _completed(path, raw)
    try:
        config = family.config_from_hf(complete)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
    except KeyError as error:
        raise InputError(f"{path}: a {name} configuration needs an entry {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{path}: not a valid {name} configuration ({error})") from None
    return name, validated(family.config, vars(config), str(path))


def _completed(path: Path, raw: JsonObject) -> JsonObject:
    """The configuration with transformers' defaults for what it leaves out, but for the sizes in :data:`REQUIRED_SIZES`."""
    with quiet_transformers() as transformers:
        try:
            aliases = transformers.AutoConfig.for_model(raw.get("model_type")).attribute_map
            absent = [e for e in REQUIRED_SIZES if not {e, aliases.get(e), "text_config"} & set(raw)]
            if not absent:
                return transformers.AutoConfig.from_pretrained(path.parent, trust_remote_code=False).to_dict()
        except Exception as error:  # Any of a dozen kinds, by the entry at fault.
            raise InputError(f"{path}: not a configuration that transformers can read ({reason(error)})") from None
    raise InputError(f"{path}: no entry {absent[0]!r}; expected a whole number above 0")


def abstract_model(name: str, config: ModelConfig, dtype: DTypeLike) -> CausalLM:
    """The model with shapes and dtypes in place of arrays."""
    return nnx.eval_shape(lambda: FAMILIES[name].model(config, dtype=dtype, rngs=nnx.Rngs(0)))


def read_model(directory: Path, name: str, config: ModelConfig, dtype: DTypeLike) -> CausalLM:
    """Builds the model from the directory's tensors, one at a time."""
    files = TensorFiles(directory)
    check_depth(f"{directory / 'config.json'}", config, len(files.names()))
    graphdef, state = nnx.split(abstract_model(name, config, dtype))
    flat = dict(nnx.to_flat_state(state))
    quantization = read_quantization(directory)
    layers = check_layers(files, FAMILIES[name], flat, quantization)
    sources = check_tensors(files, FAMILIES[name], flat, layers)
    for path, source in track(sources.items(), "loading", len(sources)):
        flat[path] = flat[path].replace(read_source(files, source, dtype))
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return stacked(replace_modules(model, read_layers(model, files, layers, dtype)), in_place=True) if layers else model


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
    prefix, stacked = find_prefix(files, family), has_stacks(files, family)
    for file in files.missing:
        raise InputError(f"{files.directory / file}: missing; of a checkpoint that is quantized all is needed")
    for path, parameter in parameters.items():
        if path[-1] == "kernel":
            name = ".".join(str(part) for part in path[:-1])
            modules = [t.removesuffix(".weight") for t in source_of(path, family, prefix, stacked=stacked).tensors]
            layer = stored_layer(files, quantization, name, modules, parameter.shape[::-1])
            layers |= {} if layer is None else {name: layer}
    return layers


def find_prefix(files: TensorFiles, family: Family) -> str:
    """The prefix that this checkpoint puts before its tensors' names."""
    return next((p for p in family.prefixes if any(n.startswith(p) for n in files.names())), family.prefixes[0])


def has_stacks(files: TensorFiles, family: Family) -> bool:
    """Whether this checkpoint holds all experts of a layer in one tensor."""
    stacks = tuple(f".{tensor}" for module, tensor in family.stacked.items() if "*" in module)
    return any(name.endswith(stacks) for name in files.names()) if stacks else False


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
    prefix, stacked, layers = find_prefix(files, family), has_stacks(files, family), layers or {}
    kernels = {(*name.split("."), "kernel") for name in layers}
    sources = {
        path: source_of(path, family, prefix, stacked=stacked)
        for path in parameters
        if tuple(str(part) for part in path) not in kernels
    }
    for path, source in sources.items():
        for tensor in source.tensors:
            if tensor not in files:
                raise InputError(f"{files.directory}: tensor {tensor!r} is missing")
        if all(files.has_header(tensor) for tensor in source.tensors):
            _check_shape(files, source, parameters[path].shape)
    wanted = {tensor for source in sources.values() for tensor in source.tensors}
    wanted |= {tensor for layer in layers.values() for tensor in layer.tensors}
    tied = () if "lm_head.weight" in wanted else ("lm_head.weight",)
    for tensor in files.names():
        if tensor not in wanted and not tensor.endswith((*UNUSED_ENDINGS, *tied)):
            raise InputError(f"{files.directory}: tensor {tensor!r} is not part of the architecture in config.json")
    return sources


def source_of(path: PathParts, family: Family, prefix: str, *, stacked: bool = False) -> Source:
    """The tensors of a parameter, by its path in the model; ``stacked`` as :func:`has_stacks` says."""
    *modules, leaf = (str(part) for part in path)
    name = ".".join(modules)
    if name == "lm_head":
        prefix = ""
    layer, inside = "", name
    if modules[0] == "layers":
        layer, inside = f"layers.{modules[1]}.", ".".join(modules[2:])
    ending = "bias" if leaf == "bias" else "weight"
    pattern, number = _NUMBER.sub("*", inside), _NUMBER.search(inside)
    if stacked and pattern in family.stacked:
        part = None if number is None else int(number[0])
        return Source((f"{prefix}{layer}{family.stacked[pattern]}",), leaf == "kernel", part)
    names = family.fused.get(pattern, (inside,))
    parts = [part if number is None else part.replace("*", number[0]) for part in names]
    return Source(tuple(f"{prefix}{layer}{part}.{ending}" for part in parts), leaf == "kernel")


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
