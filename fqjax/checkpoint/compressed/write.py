"""Writes a quantized model as a Hugging Face directory in the format compressed-tensors.

    out/
      config.json                 the architecture, and ``quantization_config``
      generation_config.json      the tokens that begin and end a text
      model.safetensors           codes, scales, and what is in floating point; shards and an index for large models
      tokenizer.json ...          as transformers saves it, if there is one

Codes are written as they are, scales in float32: of tensors, of output channels, or of groups, in which case integer scales
are multiplied with the channel's.  What the format has no word for is refused before anything is written, but for smoothing,
which is folded into what stands before the layer (:mod:`fqjax.rewrites.fold`).
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqjax.checkpoint.compressed.config import INT, LayerScheme, write_quantization
from fqjax.checkpoint.compressed.packing import pack_int32
from fqjax.checkpoint.naming import written as names_of
from fqjax.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE
from fqjax.checkpoint.target import new_directory, saving, write_tensors
from fqjax.checkpoint.text_tokens import GENERATION_FILE
from fqjax.checkpoint.tokenizer import check_writable
from fqjax.core.formats.grouped import Grouped
from fqjax.core.formats.uniform import Uniform, UniformTensor
from fqjax.layers.head import Int8Table
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.stacked import quantized_layers, unstacked
from fqjax.layers.surgery import find_linears
from fqjax.models import FAMILIES, architecture_of
from fqjax.models.causal_lm import CausalLM
from fqjax.models.checks import check_model
from fqjax.models.to_hf import config_to_hf, part_sizes
from fqjax.rewrites.fold import UNSMOOTHED, Folding, fold_smoothing
from fqjax.runtime.arguments import check_path
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import check_new
from fqjax.runtime.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 4 * 10**9
"""Bytes of tensors from which on a file is closed and another begun."""

Tensors = dict[str, np.ndarray]


def save_compressed_tensors(
    path: str | Path, model: nnx.Module, *, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> None:
    """Saves a quantized model as a Hugging Face directory in the format compressed-tensors, for vLLM and transformers.

    The weights that its tensors stand for, codes times scales, are those of the model's layers, to one rounding in float32
    where scales are integers or smoothing is folded into a layer.  Smoothing before which a norm stands is folded into
    the norm, whose weight is then rounded to its dtype once more.

    Args:
      path: directory to write; it must not exist, and appears only when complete.
      model: one of fqjax's models with quantized layers.
      tokenizer: a transformers tokenizer to store in it.

    Raises:
      InputError: if ``path`` exists or cannot be written, the model is not one of fqjax's own or not quantized, or a layer
        cannot be expressed: flattened channels, 4-bit activations, smoothing that cannot be folded.
    """
    path = check_path("path", path)
    check_model(model)
    check_writable(tokenizer)
    model = unstacked(model)
    check_new(path)
    schemes, folding = check_expressible(model)
    with new_directory(Path(os.path.realpath(path))) as staging:
        staging.mkdir()
        _write(staging, cast(CausalLM, model), schemes, folding)
        if tokenizer is not None:
            with saving(staging):
                tokenizer.save_pretrained(staging)


def check_expressible(model: nnx.Module) -> tuple[dict[str, LayerScheme], Folding]:
    """How every quantized layer is written, by dotted path, and what smoothing is folded into.

    Raises:
      InputError: naming the first layer that cannot be expressed, and why.
    """
    if architecture_of(model) is None:
        raise InputError(f"{type(model).__name__}: expected one of fqjax's models: {', '.join(FAMILIES)}")
    if any(isinstance(node, Int8Table) for _, node in nnx.iter_graph(model)):
        raise InputError(
            "the output head is in INT8; expected a model quantized without int8_head, as readers expect it in float"
        )
    layers = quantized_layers(model)
    if not layers:
        raise InputError(
            "the model has no quantized layer; expected one, as in floating point there is nothing to write"
        )
    for name, layer in layers.items():
        quantizer, flattened = layer.input.get_value(), layer.figures.flattened
        if not isinstance(layer.weight.get_value().format, Uniform | Grouped) or not layer.is_plain:
            raise InputError(
                f"{name}: its format cannot be expressed in compressed-tensors; expected codes with scales of tensors, "
                "channels or groups"
            )
        if flattened:
            raise InputError(
                f"{name}: {flattened} flattened channels cannot be expressed in compressed-tensors; expected a scheme "
                f"that can: {UNSMOOTHED}"
            )
        if quantizer.code_bits == 4:
            raise InputError(f"{name}: 4-bit activations cannot be expressed; expected a scheme that can: {UNSMOOTHED}")
    folding = fold_smoothing(model, layers)
    return {name: _scheme(layer, name in folding.outputs) for name, layer in layers.items()}, folding


def _scheme(layer: QuantizedLinear, by_channel: bool) -> LayerScheme:
    """How a layer is written; ``by_channel``: its output channels are divided by factors of their own."""
    weight, quantizer = layer.weight.get_value(), layer.input.get_value()
    fixed = quantizer.fixed_scale() is not None
    activations = None if quantizer.qmax is None else "static" if fixed else "token"
    if isinstance(weight, UniformTensor):
        tensor = not weight.scale.ndim and not by_channel
        return LayerScheme(bits=layer.bits, strategy="tensor" if tensor else "channel", activations=activations)
    # Where groups do not divide the input, smaller ones with the same scale do.
    size = math.gcd(weight.format.group_size, quantizer.inputs)
    return LayerScheme(bits=layer.bits, strategy="group", group_size=size, activations=activations)


def _write(directory: Path, model: CausalLM, schemes: dict[str, LayerScheme], folding: Folding) -> None:
    name = architecture_of(model)
    assert name is not None
    modules = {layer: _modules(model, layer) for layer in schemes}
    by_module = {module: schemes[layer] for layer in schemes for module in modules[layer]}
    ignore = [module for linear in find_linears(model) for module in _modules(model, linear)]
    ignore += [] if "lm_head" in ignore else ["lm_head"]
    config = config_to_hf(name, model.config, model.dtype)
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    ends = {name: token for name, token in ends.items() if token not in (None, [])}
    if ends:
        (directory / GENERATION_FILE).write_text(json.dumps(ends, indent=2) + "\n")
    config["quantization_config"] = write_quantization(by_module, ignore)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_shards(directory, _tensors(model, schemes, folding))


def _modules(model: CausalLM, layer: str) -> list[str]:
    """Names of a linear layer in the checkpoint, those of its parts."""
    family = FAMILIES[architecture_of(model) or ""]
    tensors = names_of(family).source((*layer.split("."), "kernel")).tensors
    return [tensor.removesuffix(".weight") for tensor in tensors]


def _tensors(model: CausalLM, schemes: dict[str, LayerScheme], folding: Folding) -> Iterator[Tensors]:
    """The checkpoint's tensors, those of one layer or parameter after the other."""
    layers = quantized_layers(model)
    for name in track(layers, "writing", len(layers)):
        yield from _quantized(model, name, layers[name], schemes[name], folding.outputs.get(name))
    family = FAMILIES[architecture_of(model) or ""]
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        owner = ".".join(str(part) for part in path[:-1])
        if owner in layers:
            continue
        values = np.asarray(parameter.get_value())
        source = names_of(family).source(path)
        values = values.T if source.transpose else values
        factors = folding.norms.get(owner, folding.outputs.get(owner))
        if factors is not None:
            values = _divided(values, factors)
        yield _split(model, owner, source.tensors, values)


def _quantized(
    model: CausalLM, name: str, layer: QuantizedLinear, scheme: LayerScheme, factors: np.ndarray | None
) -> Iterator[Tensors]:
    """A quantized layer's tensors, part by part."""
    weight, quantizer = layer.weight.get_value(), layer.input.get_value()
    modules, k = _modules(model, name), quantizer.inputs
    codes = np.asarray(weight.unpacked())[:, :k]
    scales = _scales(layer, scheme)
    scales = scales if factors is None else _divided(scales, factors)
    bias = None if layer.bias is None else np.asarray(layer.bias[...])
    bias = bias if bias is None or factors is None else _divided(bias, factors)
    start = 0
    for module, rows in zip(modules, part_sizes(model.config, len(modules), len(codes)), strict=True):
        here = slice(start, start + rows)
        start += rows
        tensors = _stored_codes(module, codes[here], scheme)
        tensors[f"{module}.weight_scale"] = scales if scheme.strategy == "tensor" else scales[here]
        if (fixed := quantizer.fixed_scale()) is not None:
            tensors[f"{module}.input_scale"] = np.asarray(fixed, np.float32).reshape(1)
        if bias is not None:
            tensors[f"{module}.bias"] = bias[here]
        yield tensors


def _stored_codes(module: str, codes: np.ndarray, scheme: LayerScheme) -> Tensors:
    if scheme.format == INT:
        return {f"{module}.weight": codes}
    shape = np.asarray(codes.shape, np.int64)
    return {f"{module}.weight_packed": pack_int32(codes, scheme.bits), f"{module}.weight_shape": shape}


def _scales(layer: QuantizedLinear, scheme: LayerScheme) -> np.ndarray:
    """Float32 scales as the format shapes them: (1,), (out, 1) or (out, groups)."""
    weight, k = layer.weight.get_value(), layer.sizes.inputs
    if isinstance(weight, UniformTensor):
        scale = np.asarray(weight.scale, np.float32).reshape(-1)
        return scale if scheme.strategy == "tensor" else np.broadcast_to(scale, weight.shape[0])[:, None]
    # One column a group, as dequantizing has them, bit for bit.
    every = np.asarray(jax.device_get(weight.steps()))[:, :k]
    return every[:, :: scheme.group_size]


def _divided(values: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Values divided row by row in float64, in their own dtype again."""
    shaped = factors.reshape(-1, *(1,) * (values.ndim - 1))
    divided = values.astype(np.float64) / shaped
    return np.asarray(jnp.asarray(divided.astype(np.float32)).astype(values.dtype))


def _split(model: CausalLM, module: str, tensors: tuple[str, ...], values: np.ndarray) -> Tensors:
    """A parameter as the tensors that it consists of in the checkpoint."""
    sizes = part_sizes(model.config, len(tensors), len(values)) if len(tensors) > 1 else (len(values),)
    return dict(zip(tensors, np.split(values, np.cumsum(sizes)[:-1]), strict=True))


def _write_shards(directory: Path, groups: Iterator[Tensors]) -> None:
    """Writes one file, or, beyond :data:`SHARD_BYTES`, several and their index."""
    pending: Tensors = {}
    written: list[tuple[Path, list[str]]] = []
    total = 0

    def close() -> None:
        file = directory / f"shard-{len(written)}"
        write_tensors(file, pending, {"format": "pt"})
        written.append((file, list(pending)))
        pending.clear()

    for tensors in groups:
        if pending and _bytes(pending) + _bytes(tensors) > SHARD_BYTES:
            close()
        pending |= tensors
        total += _bytes(tensors)
    close()
    if len(written) == 1:
        written[0][0].rename(directory / SINGLE_FILE)
        return
    names = [f"model-{i + 1:05}-of-{len(written):05}.safetensors" for i in range(len(written))]
    for (file, _), name in zip(written, names, strict=True):
        file.rename(directory / name)
    where = {tensor: name for (_, tensors), name in zip(written, names, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _bytes(tensors: Tensors) -> int:
    return sum(values.nbytes for values in tensors.values())
