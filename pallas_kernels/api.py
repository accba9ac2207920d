"""The entry points: integer matmuls and activation quantization on plain arrays.

Every function takes ``implementation``: None picks the fastest one that supports the call on this device, a name asks for
that one and raises ``NotImplementedError`` if it cannot take the case.  All implementations give the same bits as
:mod:`pallas_kernels.reference`, and work under ``jit``, ``vmap`` and ``shard_map``.

  "mosaic"  kernels written in Pallas Mosaic GPU, for NVIDIA Hopper (:mod:`pallas_kernels.hopper`)
  "xla"     the reference, compiled by XLA, for any device

Codes are integers, so no function here has a gradient; differentiating raises ``NotImplementedError``.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int8, Int32

from pallas_kernels import reference
from pallas_kernels.packing import BLOCK

Implementation = Literal["mosaic", "xla"]
log = logging.getLogger("pallas_kernels")


def int8_matmul(
    x: Int8[Array, "*rows k"],
    weight: Int8[Array, "n k"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Array:
    """Multiplies int8 codes, accumulates in int32, scales once at the end.

    Args:
      x: activation codes, (..., k).
      weight: weight codes, (n, k): output channels first, input channels contiguous.
      x_scale: float32 scalar, or one per row, shape ``x.shape[:-1]``.
      weight_scale: float32 scalar, or one per output channel, shape (n,).
      bias: optional, (n,), added in float32 before the cast.
      out_dtype: a floating dtype, or int32 for the bare accumulator (scales and bias are then ignored).
      implementation: None, "mosaic" or "xla".

    Returns:
      ``cast(int32(x @ weight.T) * (x_scale * weight_scale) + bias)``, shape (..., n).

    Raises:
      ValueError: if shapes do not fit together.
      NotImplementedError: if the named implementation cannot take the call.
    """
    return _matmul(8, x, weight, x_scale, weight_scale, bias, out_dtype, implementation)


def int4_matmul(
    x: Int8[Array, "*rows k"],
    packed: Int8[Array, "n half"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Array:
    """:func:`int8_matmul` with 4-bit weight codes, two to a byte as :func:`pallas_kernels.pack_int4` packs them.

    ``packed`` has shape (n, k / 2) with k a multiple of 256; everything else is as in :func:`int8_matmul`.
    """
    if packed.shape[-1] % (BLOCK // 2):
        raise ValueError(f"int4_matmul: packed weights come in blocks of {BLOCK // 2} bytes, got shape {packed.shape}")
    return _matmul(4, x, packed, x_scale, weight_scale, bias, out_dtype, implementation)


def quantize_activations(
    x: Float[Array, "*rows k"],
    multiplier: Float32[Array, " k"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    *,
    qmax: int,
    implementation: Implementation | None = None,
) -> Int8[Array, "*rows width"]:
    """Quantizes with static scales and flattens the large channels, in one pass.

    With ``c = round(x * multiplier)`` (half to even), channel j < k of the result is ``clip(c[j], -qmax, qmax)``,
    channel k + e is ``sign(c) * clip(|c| - part[e] * qmax, 0, qmax)`` for ``c = c[source[e]]``.  A ``part`` beyond any
    code makes a channel of padding.

    Args:
      x: real activations, (..., k).
      multiplier: what each input channel is multiplied with before rounding, (k,): 1 / (smoothing * scale).
      source: for each extra channel, the channel it continues, (e,).
      part: for each extra channel, how many times ``qmax`` is held by the channels before it, (e,).
      qmax: largest code, 127 or 7.
      implementation: None or "xla", which makes one kernel of it.

    Returns:
      int8 codes, (..., k + e).

    Raises:
      ValueError: if shapes do not fit together.
    """
    k, extra = x.shape[-1], source.shape[0]
    if multiplier.shape != (k,) or part.shape != (extra,):
        raise ValueError(
            f"quantize_activations: x {x.shape} needs multiplier ({k},) and part ({extra},), "
            f"got {multiplier.shape} and {part.shape}"
        )
    _check_implementation(implementation)
    quantize = functools.partial(reference.quantize_activations, qmax=qmax)
    return _without_gradient("quantize_activations", quantize)(x, multiplier, source, part)


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
    _check_implementation(implementation)
    quantize = functools.partial(reference.quantize_per_token, qmax=qmax, width=width)
    return _without_gradient("quantize_per_token", quantize)(x, multiplier)


def can_use_mosaic(
    bits: Literal[4, 8], rows: int, n: int, k: int, *, out_dtype: DTypeLike = jnp.bfloat16, device: str | None = None
) -> bool:
    """Whether the Hopper kernels can multiply (rows, k) activation codes with (n, k) weight codes of so many bits.

    ``device`` is the name of a GPU ("NVIDIA H200"), that of this process by default.
    """
    return (device or hopper_device()) is not None and _problem_fits(bits, rows, n, k, out_dtype) is None


@functools.cache
def hopper_device() -> str | None:
    """The name of this process's Hopper GPU; None if it has none."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    return device.device_kind if getattr(device, "compute_capability", "") == "9.0" else None


def _problem_fits(bits: Literal[4, 8], rows: int, n: int, k: int, out_dtype: DTypeLike) -> str | None:
    from pallas_kernels.hopper import matmul

    return matmul.cannot_use(_problem(bits, rows, n, k, False, False, False, out_dtype))


def _problem(
    bits: Literal[4, 8], m: int, n: int, k: int, per_token: bool, per_channel: bool, bias: bool, out_dtype: DTypeLike
) -> Any:
    from pallas_kernels.hopper.gemm import Problem

    return Problem(
        m=m,
        n=n,
        k=k,
        bits=bits,
        per_token=per_token,
        per_channel=per_channel,
        bias=bias,
        out_dtype=jnp.dtype(out_dtype),
    )


def _matmul(
    bits: Literal[4, 8],
    x: Array,
    weight: Array,
    x_scale: Array,
    weight_scale: Array,
    bias: Array | None,
    out_dtype: DTypeLike,
    implementation: Implementation | None,
) -> Array:
    x_scale, weight_scale = (jnp.asarray(scale, jnp.float32) for scale in (x_scale, weight_scale))
    _check(x, weight, weight.shape[-1] * (8 // bits), x_scale, weight_scale, bias, implementation)
    name = f"int{bits}_matmul"
    if bias is None:
        call = _entry(name, bits, jnp.dtype(out_dtype), implementation, False)
        return call(x, weight, x_scale, weight_scale)
    return _entry(name, bits, jnp.dtype(out_dtype), implementation, True)(x, weight, x_scale, weight_scale, bias)


@functools.cache
def _entry(
    name: str, bits: Literal[4, 8], out_dtype: Any, implementation: Implementation | None, bias: bool
) -> Callable[..., Array]:
    """The matmul as a function of arrays alone, with its rules for differentiation and batching."""

    def rows(x: Array, weight: Array, x_scale: Array, weight_scale: Array, b: Array | None = None) -> Array:
        """Any leading axes are rows."""
        if not x.size or not weight.size:
            return getattr(reference, name)(x, weight, x_scale, weight_scale, b, out_dtype)
        flat = x.reshape(-1, x.shape[-1])
        scale = x_scale.reshape(-1) if x_scale.ndim else x_scale
        y = _run(name, bits, flat, weight, scale, weight_scale, b, out_dtype, implementation)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    batched = jax.custom_batching.custom_vmap(rows)

    @batched.def_vmap
    def _(size: int, in_batched: list[bool], *operands: Array) -> tuple[Array, bool]:
        x, weight, x_scale, weight_scale, *rest = operands
        x_batched, *others_batched = in_batched
        if any((others_batched[0], *others_batched[2:])):  # Several weights: one after the other.
            axes = [0 if b else None for b in in_batched]
            each = lambda i: rows(*(o if a is None else o[i] for o, a in zip(operands, axes, strict=True)))  # noqa: E731
            return lax.map(each, jnp.arange(size)), True
        if not x_batched:
            x = jnp.broadcast_to(x, (size, *x.shape))
        if others_batched[1] or x_scale.ndim:  # One scale a row, for every row.
            missing = x.ndim - 1 - (x_scale.ndim if others_batched[1] else x_scale.ndim + 1)
            if not others_batched[1]:
                x_scale = x_scale[None]
            x_scale = jnp.broadcast_to(x_scale.reshape(*x_scale.shape, *(1,) * missing), x.shape[:-1])
        return batched(x, weight, x_scale, weight_scale, *rest), True

    return _without_gradient(name, batched)


def _without_gradient(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, which says so clearly when it is differentiated."""
    closed = jax.custom_jvp(f)

    @closed.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise NotImplementedError(
            f"{name} cannot be differentiated: it works on integer codes; differentiate the unquantized model, or stop the "
            "gradient in front of it with jax.lax.stop_gradient"
        )

    return closed


def _run(
    name: str,
    bits: Literal[4, 8],
    x: Array,
    weight: Array,
    x_scale: Array,
    weight_scale: Array,
    bias: Array | None,
    out_dtype: Any,
    implementation: Implementation | None,
) -> Array:
    """One matmul with x of shape (m, k), by the implementation asked for or the fastest there is."""

    def xla(x: Array, weight: Array, x_scale: Array, weight_scale: Array, *bias: Array) -> Array:
        return getattr(reference, name)(x, weight, x_scale, weight_scale, *(bias or (None,)), out_dtype)

    operands = (x, weight, x_scale, weight_scale) if bias is None else (x, weight, x_scale, weight_scale, bias)
    device = hopper_device()
    if implementation == "xla" or (implementation is None and device is None):
        return xla(*operands)
    from pallas_kernels import tuning
    from pallas_kernels.hopper import matmul

    (m, k), n = x.shape, weight.shape[0]
    p = _problem(bits, m, n, k, bool(x_scale.ndim), bool(weight_scale.ndim), bias is not None, out_dtype)
    reason = "it needs an NVIDIA GPU of compute capability 9.0" if device is None else matmul.cannot_use(p)
    if reason and implementation == "mosaic":
        raise NotImplementedError(f"{name}: implementation 'mosaic' cannot take x {x.shape} {x.dtype}: {reason}")
    config = None if reason or device is None else tuning.choose(p, device)
    if config is None and implementation == "mosaic":
        config = tuning.rule(p)
    _say(name, m, n, k, "xla" if config is None else f"mosaic, {config}", reason or "")
    if config is None:
        return xla(*operands)

    def mosaic(x: Array, weight: Array, x_scale: Array, weight_scale: Array, *bias: Array) -> Array:
        return matmul.matmul(p, config, x, weight, x_scale, weight_scale, *(bias or (None,)))

    if implementation == "mosaic":
        return mosaic(*operands)
    return lax.platform_dependent(*operands, cuda=mosaic, default=xla)


@functools.cache
def _say(name: str, m: int, n: int, k: int, choice: str, why: str) -> None:
    log.info("%s %d x %d x %d: %s%s", name, m, n, k, choice, f" ({why})" if why else "")


def _check(
    x: Array,
    weight: Array,
    k: int,
    x_scale: Array,
    weight_scale: Array,
    bias: Array | None,
    implementation: Implementation | None,
) -> None:
    for operand, array in (("x", x), ("the weight", weight)):
        if array.dtype != jnp.int8:
            raise ValueError(f"integer matmul: {operand} must be int8, got {array.dtype}{array.shape}")
    if x.shape[-1] != k:
        raise ValueError(f"integer matmul: x {x.shape} has {x.shape[-1]} input channels, the weight has {k}")
    if x_scale.shape not in ((), x.shape[:-1]):
        raise ValueError(f"integer matmul: x_scale must be a scalar or {x.shape[:-1]}, got {x_scale.shape}")
    if weight_scale.shape not in ((), weight.shape[:1]):
        raise ValueError(
            f"integer matmul: weight_scale must be a scalar or {weight.shape[:1]}, got {weight_scale.shape}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"integer matmul: bias must be {weight.shape[:1]}, got {bias.shape}")
    if implementation not in (None, "mosaic", "xla"):
        raise NotImplementedError(f"implementation {implementation!r} is not one of: mosaic, xla")


def _check_implementation(implementation: Implementation | None) -> None:
    if implementation not in (None, "xla"):
        raise NotImplementedError(f"implementation {implementation!r} is not one of: xla")
