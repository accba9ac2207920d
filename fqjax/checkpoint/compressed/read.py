"""Tensors of quantized modules into :class:`~fqjax.layers.linear.QuantizedLinear`, code by code and scale by scale.

A module X has X.weight (int8) or X.weight_packed (int32 words) and X.weight_shape; X.weight_scale; and X.input_scale where
its activations have a static scale.  Modules that read the same input are one layer in fqjax's models: their codes are put
one under the other.  Scales of whole tensors that differ become scales of output channels, and groups are cut into smaller
ones with the same scale, so that nothing is rounded.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from fqjax.checkpoint.compressed.config import LayerScheme, Quantization
from fqjax.checkpoint.compressed.packing import unpack_int32
from fqjax.checkpoint.safetensors import FLOAT_DTYPES, TensorFiles
from fqjax.core.channels import PADDING
from fqjax.core.formats.base import QTensor
from fqjax.core.formats.grouped import LARGEST_GROUP, Grouped
from fqjax.core.formats.uniform import Uniform
from fqjax.core.stored_inputs import FloatingInput, PerTokenInput, StaticInput, StoredInput
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.record import Figures
from fqjax.layers.surgery import find_linears
from fqjax.runtime.errors import InputError
from fqjax.runtime.notices import say_once
from fqjax.runtime.progress import track

OPTIONAL_ENDINGS = ("weight_zero_point", "input_zero_point", "weight_g_idx", "weight_shape")
"""Tensors that a module may have, and that say nothing new where fqjax can express it."""


COMPRESSED_RECIPE = '{"name": "compressed-tensors", "summary": "Read from a compressed-tensors checkpoint."}'
"""Of layers read: another program quantized them."""


SMALL_GROUP = 16
"""Input channels below which groups are joined, where all have the scales of their neighbours."""


class Part(NamedTuple):
    """A module of the checkpoint: its name, its scheme, and the shape (out, in) of its weight."""

    module: str
    scheme: LayerScheme
    shape: tuple[int, int]


class StoredLayer(NamedTuple):
    """A layer of the model that is quantized in the checkpoint.

    Attributes:
      name: dotted path in the model.
      parts: the modules that it consists of, from the first output channel to the last.
      tensors: names of all tensors of theirs but biases.
      input_scale: of the activations, where it is static.
    """

    name: str
    parts: tuple[Part, ...]
    tensors: frozenset[str]
    input_scale: float | None

    @property
    def bits(self) -> int:
        """Of a weight's code."""
        return self.parts[0].scheme.bits


def stored_layer(
    files: TensorFiles, quantization: Quantization, name: str, modules: Iterable[str], shape: tuple[int, ...]
) -> StoredLayer | None:
    """Checks a layer's tensors by the files' headers; reads no more of them than static scales of activations.

    Args:
      files: of the checkpoint.
      quantization: of its configuration.
      name: dotted path of the layer in the model.
      modules: that it consists of in the checkpoint.
      shape: of the layer's weight, (out, in).

    Returns:
      The layer; None if it is in floating point.

    Raises:
      InputError: naming the tensor or module at fault; also for input scales that differ among modules that read the same
        input.
    """
    named = {module: quantization.scheme_of(module) for module in modules}
    # A float weight without a scale is in floating point, whatever config.json says: writers leave heads out in silence.
    schemes = {module: None if _is_float(files, module) else scheme for module, scheme in named.items()}
    if not any(schemes.values()):
        if any(named.values()) and name != "lm_head":
            say_once(f"{files.directory}: {' + '.join(named)}: in floating point in the files, though not under ignore")
        return None
    where = f"{files.directory}: {' + '.join(schemes)}"
    found = [scheme for scheme in schemes.values() if scheme is not None]
    if len(found) < len(schemes):
        raise InputError(f"{where}: some are quantized and some are not; expected the same, as they are one layer here")
    if name == "lm_head":
        raise InputError(f"{where}: is quantized; expected it under ignore, as fqjax keeps heads in floating point")
    if len({(scheme.bits, scheme.activations) for scheme in found}) > 1:
        raise InputError(f"{where}: expected the same bits and kind of activations, as they are one layer here")
    parts = tuple(
        Part(module, scheme, _shape(files, module, scheme, shape[1]))
        for module, scheme in zip(schemes, found, strict=True)
    )
    if sum(part.shape[0] for part in parts) != shape[0]:
        raise InputError(f"{where}: {sum(p.shape[0] for p in parts)} output channels, config.json implies {shape[0]}")
    tensors = frozenset(tensor for part in parts for tensor in _check_tensors(files, part))
    return StoredLayer(name, parts, tensors, _input_scale(files, name, parts))


def _is_float(files: TensorFiles, module: str) -> bool:
    """Whether the files hold a module in floating point."""
    weight, others = f"{module}.weight", (f"{module}.weight_scale", f"{module}.weight_packed")
    return weight in files and files.stored(weight).dtype in FLOAT_DTYPES and not any(name in files for name in others)


def read_layer(files: TensorFiles, layer: StoredLayer, bias: jax.Array | None, dtype: DTypeLike) -> QuantizedLinear:
    """Builds a layer from its tensors.

    Args:
      files: of the checkpoint.
      layer: as :func:`stored_layer` returns it.
      bias: (out,), or None.
      dtype: of its output and, by name, of the weight that it stands for.

    Raises:
      InputError: naming the tensor or module at fault: a code out of range, a scale that is not above 0, a zero point or an
        order of channels that cannot be expressed, an accumulator that could overflow.
    """
    weight = _weight(files, layer)
    quantizer = _input_quantizer(layer, weight.shape[1])
    n, k = sum(part.shape[0] for part in layer.parts), layer.parts[0].shape[1]
    return QuantizedLinear(
        weight,
        quantizer,
        bias,
        dtype=dtype,
        param_dtype=dtype,
        figures=Figures(accumulator_bound=weight.bound(quantizer.qmax), macs=n * k),
        recipe=COMPRESSED_RECIPE,
        name=f"{files.directory}: {layer.name}",
    )


def read_layers(
    model: nnx.Module, files: TensorFiles, layers: Mapping[str, StoredLayer], dtype: DTypeLike
) -> dict[str, nnx.Module]:
    """The quantized layers of a model whose other parameters have been read, by dotted path."""
    linears = find_linears(model)
    made: dict[str, nnx.Module] = {}
    for name, layer in track(layers.items(), "loading", len(layers)):
        bias = linears[name].bias
        made[name] = read_layer(files, layer, None if bias is None else bias[...], dtype)
    return made


def _shape(files: TensorFiles, module: str, scheme: LayerScheme, k: int) -> tuple[int, int]:
    """Of a module's weight, from the header of its codes."""
    packed = f"{module}.weight_packed" in files
    name, kind = (f"{module}.weight_packed", "I32") if packed else (f"{module}.weight", "I8")
    width = math.ceil(k * scheme.bits / 32) if packed else k
    dtype, shape = _stored(files, name)
    if dtype != kind or len(shape) != 2 or shape[1] != width or not shape[0]:
        raise InputError(
            f"{files.directory}: tensor {name!r} is {dtype} {shape}; expected {kind} (out, {width}), with {scheme.bits} bits "
            f"and {k} input channels"
        )
    return shape[0], k


def _check_tensors(files: TensorFiles, part: Part) -> list[str]:
    """The names of a module's tensors, with the shapes of the scales checked."""
    module, scheme, (n, k) = part
    shapes: dict[str, list[tuple[int, ...]]] = {
        "tensor": [(1,), ()],
        "channel": [(n, 1), (n,)],
        "group": [(n, math.ceil(k / (scheme.group_size or k)))],
    }
    scales = {"weight_scale": shapes[scheme.strategy]}
    if scheme.activations == "static":
        scales["input_scale"] = shapes["tensor"]
    for ending, expected in scales.items():
        name = f"{module}.{ending}"
        dtype, shape = _stored(files, name)
        if dtype not in FLOAT_DTYPES or shape not in expected:
            raise InputError(
                f"{files.directory}: tensor {name!r} is {dtype} {shape}; expected floating point, {expected[0]}"
            )
    codes = "weight_packed" if f"{module}.weight_packed" in files else "weight"
    present = [f"{module}.{ending}" for ending in OPTIONAL_ENDINGS if f"{module}.{ending}" in files]
    return [f"{module}.{ending}" for ending in (codes, *scales)] + present


def _stored(files: TensorFiles, name: str) -> tuple[str, tuple[int, ...]]:
    if name not in files:
        raise InputError(f"{files.directory}: tensor {name!r} is missing")
    return files.stored(name)


def _weight(files: TensorFiles, layer: StoredLayer) -> QTensor:
    """The codes of all parts one under the other, with scales that serve them all."""
    codes = np.concatenate([_codes(files, part) for part in layer.parts])
    scales = [_scales(files, part) for part in layer.parts]
    strategies = {part.scheme.strategy for part in layer.parts}
    k = codes.shape[1]
    width = Uniform(bits=layer.bits).padded(k)  # pyright: ignore[reportArgumentType]
    scale, group_scale = jnp.float32(1), None
    if "group" in strategies:
        group_scale = _group_scales(layer, scales, width)
    elif strategies == {"tensor"} and len({float(part[0, 0]) for part in scales}) == 1:
        scale = jnp.asarray(scales[0][0, 0])
    else:
        scale = jnp.asarray(np.concatenate(scales)[:, 0])
    if group_scale is None and layer.parts[0].scheme.activations is None:
        # Weight-only layers have groups; here all of a channel have its scale.
        group_scale = jnp.ones((width // LARGEST_GROUP, len(codes)), jnp.float32)
    padded = jnp.asarray(np.pad(codes, ((0, 0), (0, width - k))))
    granularity = "channel" if scale.ndim else "tensor"
    if group_scale is None:
        form = Uniform(bits=layer.bits, granularity=granularity)  # pyright: ignore[reportArgumentType]
        return form.store(padded, scale)
    size = width // group_scale.shape[0]
    grouped = Grouped(bits=layer.bits, group_size=size, granularity=granularity)  # pyright: ignore[reportArgumentType]
    return grouped.store(padded, scale, group_scale)


def _group_scales(layer: StoredLayer, scales: list[np.ndarray], width: int) -> jax.Array:
    """Scales of groups so small that each lies in one group of every part, (width / size, out); 1 for padding."""
    k = layer.parts[0].shape[1]
    sizes = [part.scheme.group_size or LARGEST_GROUP for part in layer.parts]
    size = math.gcd(LARGEST_GROUP, *sizes)
    starts = np.arange(0, k, size)
    rows = [
        part[:, starts // whole if part.shape[1] > 1 else np.zeros_like(starts)]
        for part, whole in zip(scales, sizes, strict=True)
    ]
    found = np.concatenate(rows).T
    if size < SMALL_GROUP:
        while size < LARGEST_GROUP and _in_pairs(found):
            found, size = found[::2], 2 * size
    return jnp.asarray(np.pad(found, ((0, width // size - len(found)), (0, 0)), constant_values=1))


def _in_pairs(scales: np.ndarray) -> bool:
    """Whether each group has the scales of its neighbour, as where larger ones were cut to divide the input channels."""
    pairs = len(scales) // 2 * 2
    return bool(np.array_equal(scales[0:pairs:2], scales[1:pairs:2]))


def _codes(files: TensorFiles, part: Part) -> np.ndarray:
    """Int8 codes (out, in) of a module."""
    module, scheme, (_, k) = part
    packed = f"{module}.weight_packed" in files
    name = f"{module}.{'weight_packed' if packed else 'weight'}"
    codes = unpack_int32(files.read_integers(name), scheme.bits, k) if packed else files.read_integers(name)
    if scheme.bits == 4 and (codes.min() < -8 or codes.max() > 7):
        raise InputError(f"{files.directory}: tensor {name!r} holds codes beyond -8 and 7; expected 4 bits")
    if packed and f"{module}.weight_shape" in files:
        shape = tuple(int(size) for size in files.read_integers(f"{module}.weight_shape").reshape(-1))
        if shape != part.shape:
            raise InputError(f"{files.directory}: tensor '{module}.weight_shape' is {shape}, expected {part.shape}")
    for ending in ("weight_zero_point", "input_zero_point"):
        if f"{module}.{ending}" in files and files.read_integers(f"{module}.{ending}").any():
            raise InputError(f"{files.directory}: tensor '{module}.{ending}' is not 0; zero points cannot be expressed")
    if f"{module}.weight_g_idx" in files:
        order = files.read_integers(f"{module}.weight_g_idx").reshape(-1)
        if not np.array_equal(order, np.arange(k) // (scheme.group_size or k)):
            raise InputError(
                f"{files.directory}: tensor '{module}.weight_g_idx' orders channels by activation; expected groups of "
                "neighbours"
            )
    return codes


def _scales(files: TensorFiles, part: Part) -> np.ndarray:
    """Float32 scales (out, groups) of a module, (out, 1) without groups."""
    scale = _positive(files, f"{part.module}.weight_scale")
    columns = scale.shape[1] if scale.ndim == 2 else 1
    return np.broadcast_to(scale.reshape(-1, columns), (part.shape[0], columns))


def _positive(files: TensorFiles, name: str) -> np.ndarray:
    values = files.read(name, np.float32)
    if not (values > 0).all():
        raise InputError(f"{files.directory}: tensor {name!r} holds a scale that is not above 0")
    return values


def _input_scale(files: TensorFiles, name: str, parts: tuple[Part, ...]) -> float | None:
    """The static scale that all parts have for their activations; None if those have none."""
    if parts[0].scheme.activations != "static":
        return None
    found = {part.module: float(_positive(files, f"{part.module}.input_scale").reshape(())) for part in parts}
    if len(set(found.values())) > 1:
        each = ", ".join(f"{module.split('.')[-1]} {value:.6g}" for module, value in found.items())
        raise InputError(
            f"{files.directory}: {name}: input_scale differs ({each}); expected the same, as the modules read the same "
            "input, which is quantized once"
        )
    return found[parts[0].module]


def _input_quantizer(layer: StoredLayer, width: int) -> StoredInput:
    k, weight_only = layer.parts[0].shape[1], layer.parts[0].scheme.activations is None
    multiplier = jnp.ones(k, jnp.float32)
    source, part = jnp.zeros(width - k, jnp.int32), jnp.full(width - k, PADDING, jnp.int32)
    if weight_only:
        return FloatingInput(multiplier=multiplier, source=source, part=part)
    if layer.input_scale is None:
        return PerTokenInput(multiplier=multiplier, source=source, part=part, bits=8)
    scale = jnp.float32(layer.input_scale)
    return StaticInput(multiplier=multiplier / scale, source=source, part=part, scale=scale, bits=8)
