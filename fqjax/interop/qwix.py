"""Quantized weights to and from qwix, whose arrays of codes and scales are called ``QArray`` (https://github.com/google/qwix).

A ``QArray`` has its input channels first, as ``nnx.Linear`` has them in its kernel, and a scale for every tile: the shape of
the scales divides that of the codes.  There is one scale a tile, so a channel's scale and a group's are multiplied, and there
is no padding.
"""

import importlib
import math
from types import ModuleType
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from fqjax.core.formats.base import QTensor
from fqjax.core.formats.grouped import LARGEST_GROUP, Grouped, GroupedTensor
from fqjax.core.formats.uniform import Uniform, UniformTensor
from fqjax.layers.linear import QuantizedLinear
from fqjax.runtime.arguments import check_type
from fqjax.runtime.errors import InputError


class QArray(Protocol):
    """A ``qwix.QArray``.

    Attributes:
      qvalue: codes.
      scale: the shape divides that of the codes.
      zero_point: None for symmetric codes.
      qtype: dtype that the codes stand for.
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    qtype: DTypeLike


def to_qwix(layer: QuantizedLinear) -> QArray:
    """The weight of a layer as a ``qwix.QArray``.

    Args:
      layer: without flattened channels.  Its smoothing, if it has any, stays in the weight: the array is what
        multiplies the smoothed input.

    Returns:
      An array of shape (in, out) with codes in int8, or int4 for 4 bits, and float32 scales (1, 1), (1, out) or
      (groups, out); ``qwix.dequantize`` of it equals the transposed ``layer.weight.dequantize()`` without padding.

    Raises:
      InputError: if qwix is not installed, or the layer has flattened channels.
    """
    check_type("layer", layer, QuantizedLinear, "a fqjax.QuantizedLinear")
    qwix = _qwix()
    weight, k, flattened = layer.weight.get_value(), layer.sizes.inputs, layer.figures.flattened
    if flattened:
        raise InputError(f"to_qwix: {flattened} flattened channels cannot be expressed in a QArray; expected none")
    if not isinstance(weight, UniformTensor | GroupedTensor):
        raise InputError(f"to_qwix: format {weight.format.kind!r} cannot be expressed in a QArray")
    codes = weight.unpacked()[:, :k].T.astype(jnp.int4 if weight.format.bits == 4 else jnp.int8)
    if isinstance(weight, UniformTensor):
        return qwix.QArray(codes, weight.scale.reshape(1, -1))
    # Where groups do not divide the input, smaller ones with the same scale do.
    size = math.gcd(weight.format.group_size, k)
    return qwix.QArray(codes, weight.steps()[:, :k:size].T)


def from_qwix(array: QArray) -> QTensor:
    """The weight that a ``qwix.QArray`` holds.

    Args:
      array: shape (in, out), codes in int4 or int8, symmetric; scales for the whole, for every output channel, or for every
        output channel and group of input channels.

    Returns:
      A tensor of shape (out, K') with the same codes and scales; K' is ``in`` padded to a multiple of 128, or of 256 with 4
      bits.  Groups are cut to 128 channels at most.

    Raises:
      InputError: naming what cannot be expressed: no matrix, another dtype of codes, a zero point, scales that several
        output channels share but not all, groups that are no multiple of 16 channels.
    """
    for name in ("qvalue", "scale", "zero_point", "qtype"):
        if not hasattr(array, name):
            raise InputError(f"array: expected a qwix.QArray, got {type(array).__name__} without {name}")
    shape = tuple(np.shape(array.qvalue))
    if len(shape) != 2:
        raise InputError(f"from_qwix: an array of shape {shape}; expected a matrix (in, out)")
    kinds = {jnp.dtype(jnp.int4): 4, jnp.dtype(jnp.int8): 8}
    bits = kinds.get(jnp.dtype(array.qtype))
    if bits is None or jnp.dtype(array.qvalue.dtype) not in kinds:
        raise InputError(f"from_qwix: codes of {jnp.dtype(array.qtype).name}; expected int4 or int8")
    if array.zero_point is not None and bool(jnp.any(array.zero_point)):
        raise InputError("from_qwix: a zero point that is not 0 cannot be expressed; expected symmetric codes")
    (k, n), scale = shape, jnp.asarray(array.scale, jnp.float32)
    if not bool(jnp.all(jnp.isfinite(scale) & (scale > 0))):
        raise InputError("from_qwix: a scale that is not a finite number above 0")
    groups, columns = scale.shape
    if columns not in (1, n) or k % groups:
        raise InputError(
            f"from_qwix: scales {scale.shape} of an array {shape}; expected (groups, {n}), (1, {n}) or (1, 1)"
        )
    width = Uniform(bits=bits).padded(k)  # pyright: ignore[reportArgumentType]
    codes = jnp.pad(jnp.asarray(array.qvalue).astype(jnp.int8).T, ((0, 0), (0, width - k)))
    if groups == 1:
        form = Uniform(bits=bits, granularity="tensor" if columns == 1 else "channel")  # pyright: ignore
        return form.store(codes, scale[0, 0] if columns == 1 else scale[0])
    whole = k // groups
    if whole % 16:
        raise InputError(f"from_qwix: groups of {whole} channels; expected a multiple of 16")
    size = math.gcd(LARGEST_GROUP, whole)
    every = jnp.repeat(jnp.broadcast_to(scale, (groups, n)), whole // size, axis=0)
    padded = jnp.pad(every, ((0, width // size - len(every)), (0, 0)), constant_values=1)
    return Grouped(bits=bits, group_size=size).store(codes, jnp.float32(1), padded)  # pyright: ignore


def _qwix() -> ModuleType:
    try:
        return importlib.import_module("qwix")
    except ImportError:
        raise InputError("to_qwix: qwix is not installed; pip install qwix") from None
