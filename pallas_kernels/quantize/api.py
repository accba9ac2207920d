"""Entry points that turn real activations into integer codes, fused with the norm or the activation function before.

Every function takes ``implementation``: None picks the fastest one that supports the call on this device, a name asks for
that one and raises ``NotImplementedError`` if it cannot take the case.

  "triton"  one pass over the rows, written in Pallas Triton, for NVIDIA GPUs (:mod:`pallas_kernels.quantize.dispatch`)
  "xla"     the reference, compiled by XLA, for any device

They add up a row in different orders and divide differently in the last bit, so that a value within rounding of a half can
get the one code or the other.  All work under ``jit``, ``vmap`` and ``shard_map``; none has a gradient.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Int32

from pallas_kernels.gradient import without_gradient
from pallas_kernels.quantize import dispatch, reference
from pallas_kernels.quantize.kind import IMPLEMENTATIONS, Implementation, Quantization


class Quantized(NamedTuple):
    """Codes of rows, with their scales and the normalised sum.

    Attributes:
      codes: int8 (..., k + e).
      scale: one a row, (...,); None if scales are fixed.
      x: input of the norm, (..., k): the sum with the residual; None without one.
    """

    codes: Int8[Array, "*rows width"]
    scale: Float32[Array, "*rows"] | None = None
    x: Float[Array, "*rows k"] | None = None


def quantize_activations(
    x: Float[Array, "*rows k"],
    multiplier: Float32[Array, " k"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    *,
    qmax: int,
) -> Int8[Array, "*rows width"]:
    """Quantizes with fixed scales and flattens the large channels; XLA makes one kernel of it.

    With ``c = round(x * multiplier)`` (half to even), channel j < k of the result is ``clip(c[j], -qmax, qmax)``,
    channel k + e is ``sign(c) * clip(|c| - part[e] * qmax, 0, qmax)`` for ``c = c[source[e]]``.  A ``part`` beyond any
    code makes a channel of padding.

    Args:
      x: real activations, (..., k).
      multiplier: factor of each input channel before rounding, (k,): 1 / (smoothing * scale).
      source: for each extra channel, the channel it continues, (e,).
      part: for each extra channel, how many times ``qmax`` is held by the channels before it, (e,).
      qmax: largest code, 127 or 7.

    Returns:
      int8 codes, (..., k + e).

    Raises:
      ValueError: if shapes do not fit together.
    """
    _check("quantize_activations", x.shape, x.shape[-1], multiplier, source, part)
    quantize = functools.partial(reference.quantize_activations, qmax=qmax)
    return without_gradient("quantize_activations", quantize)(x, multiplier, source, part)


def quantize_per_token(
    x: Float[Array, "*rows k"],
    multiplier: Float32[Array, " k"],
    *,
    qmax: int,
    width: int,
    implementation: Implementation | None = None,
) -> tuple[Int8[Array, "*rows width"], Float32[Array, "*rows"]]:
    """Quantizes every row with a scale of its own: the row's largest ``|x * multiplier|`` becomes ``qmax``.

    Returns:
      The codes, padded with zeros to ``width`` channels, and the scales, one a row.
    """
    if multiplier.shape != x.shape[-1:] or width < x.shape[-1]:
        raise ValueError(
            f"quantize_per_token: x {x.shape} needs multiplier ({x.shape[-1]},) and width >= {x.shape[-1]}, "
            f"got {multiplier.shape} and {width}"
        )
    padding = jnp.zeros(width - x.shape[-1], jnp.int32)
    kind = Quantization(name="quantize_per_token", qmax=qmax, per_token=True)
    return _quantize(kind, implementation, x, multiplier, padding, padding)  # pyright: ignore[reportReturnType]


def quantize_normalized(
    x: Float[Array, "*rows k"],
    multiplier: Float32[Array, " k"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    *,
    epsilon: float,
    qmax: int,
    weight: Float[Array, " k"] | None = None,
    bias: Float[Array, " k"] | None = None,
    center: bool = False,
    residual: Float[Array, "*rows k"] | None = None,
    per_token: bool = False,
    implementation: Implementation | None = None,
) -> Quantized:
    """:func:`quantize_activations` or :func:`quantize_per_token` of normalised rows, in one pass over ``x``.

    Every row is divided by its root mean square (RMS norm), or, with ``center``, loses its mean and is divided by its
    standard deviation (layer norm); then ``(y * weight + bias) * multiplier`` is quantized.  All is float32 up to the
    rounding, nothing is rounded to the dtype of ``x`` in between.

    Args:
      x: real activations before the norm, (..., k).
      multiplier: 1 / (smoothing * scale), (k,); with ``per_token``, 1 / smoothing.
      source, part: as in :func:`quantize_activations`; a code beyond 32767 counts as that.  With ``per_token`` nothing is
        flattened, and extra channels are padding.
      epsilon: added to the mean square, or to the variance.
      qmax: largest code, 127 or 7.
      weight, bias: of the norm, (k,).
      center: whether the mean is subtracted.
      residual: added to x first, in float32; the sum that is returned is rounded to the dtype of x.
      per_token: whether every row gets a scale of its own.
      implementation: None, "triton" or "xla".

    Raises:
      ValueError: if shapes do not fit together.
      NotImplementedError: if the named implementation cannot take the call.
    """
    _check("quantize_normalized", x.shape, x.shape[-1], multiplier, source, part)
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.shape != multiplier.shape:
            raise ValueError(f"quantize_normalized: {name} must be {multiplier.shape}, got {operand.shape}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"quantize_normalized: residual must be {x.dtype}{x.shape}, got {residual.dtype}{residual.shape}"
        )
    kind = Quantization(
        name="quantize_normalized",
        qmax=qmax,
        per_token=per_token,
        residual=residual is not None,
        epsilon=epsilon,
        center=center,
        weight=weight is not None,
        bias=bias is not None,
    )
    codes, *rest = _quantize(kind, implementation, x, residual, weight, bias, multiplier, source, part)
    return Quantized(codes, rest.pop(0) if per_token else None, *rest)


def quantize_activated(
    x: Float[Array, "*rows channels"],
    multiplier: Float32[Array, " k"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    *,
    activation: str,
    qmax: int,
    gated: bool = False,
    per_token: bool = False,
    implementation: Implementation | None = None,
) -> Quantized:
    """:func:`quantize_activations` or :func:`quantize_per_token` after an activation function, in one pass over ``x``.

    All is float32 up to the rounding, as in :func:`quantize_normalized`, whose arguments these are too.

    Args:
      x: (..., k), or, ``gated``, (..., 2 k): the first half goes through the function, and is multiplied with the second.
      activation: "silu", "relu" or "gelu".

    Raises:
      ValueError: if there is no such activation, or shapes do not fit together.
      NotImplementedError: if the named implementation cannot take the call.
    """
    name = "quantize_activated"
    check_activation(name, x.shape, multiplier, source, part, activation, gated=gated)
    kind = Quantization(name=name, qmax=qmax, per_token=per_token, activation=activation, gated=gated)
    return Quantized(*_quantize(kind, implementation, x, multiplier, source, part))


def check_activation(
    name: str, shape: tuple[int, ...], multiplier: Array, source: Array, part: Array, activation: str, *, gated: bool
) -> None:
    """Checks the arguments of an activation function and a recipe for x of that shape.

    Raises:
      ValueError: if there is no such activation, or shapes do not fit together.
    """
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"{name}: activation {activation!r} is not one of: {', '.join(reference.ACTIVATIONS)}")
    if gated and shape[-1] % 2:
        raise ValueError(f"{name}: {shape[-1]} channels are no two halves, one of which could gate the other")
    _check(name, shape, shape[-1] // (1 + gated), multiplier, source, part)


def _quantize(kind: Quantization, implementation: Implementation | None, *operands: Array | None) -> tuple[Array, ...]:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(f"implementation {implementation!r} is not one of: {', '.join(IMPLEMENTATIONS)}")
    return dispatch.quantize(kind, implementation)(*(operand for operand in operands if operand is not None))


def _check(name: str, shape: tuple[int, ...], k: int, multiplier: Array, source: Array, part: Array) -> None:
    extra = source.shape[0]
    if multiplier.shape != (k,) or part.shape != (extra,):
        raise ValueError(
            f"{name}: x {shape} needs multiplier ({k},) and part ({extra},), got {multiplier.shape} and {part.shape}"
        )
