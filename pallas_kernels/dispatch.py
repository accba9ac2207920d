"""Which implementation runs, and what JAX's transformations make of functions of integers."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike

from pallas_kernels import reference

Implementation = Literal["mosaic", "xla"]
NO_HOPPER = "it needs an NVIDIA GPU of compute capability 9.0"
log = logging.getLogger("pallas_kernels")


@functools.cache
def hopper_device() -> str | None:
    """The name of this process's Hopper GPU; None if it has none."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    return device.device_kind if getattr(device, "compute_capability", "") == "9.0" else None


def problem(
    bits: Literal[4, 8],
    m: int,
    n: int,
    k: int,
    out_dtype: DTypeLike,
    *,
    per_token: bool = False,
    per_channel: bool = False,
    bias: bool = False,
) -> Any:
    """A :class:`pallas_kernels.hopper.gemm.Problem`; Mosaic GPU is imported only where it may be used."""
    from pallas_kernels.hopper.gemm import Problem

    kinds = {"per_token": per_token, "per_channel": per_channel, "bias": bias}
    return Problem(m=m, n=n, k=k, bits=bits, out_dtype=jnp.dtype(out_dtype), **kinds)


@functools.cache
def matmul(bits: Literal[4, 8], out_dtype: Any, implementation: Implementation | None) -> Callable[..., Array]:
    """The matmul as a function of (x, weight, x_scale, weight_scale, bias if any), with its rules for transformations."""
    name = f"int{bits}_matmul"

    def rows(x: Array, weight: Array, x_scale: Array, weight_scale: Array, *bias: Array) -> Array:
        """Any leading axes of x are rows."""
        if not x.size or not weight.size:
            return _xla(name, out_dtype, x, weight, x_scale, weight_scale, *bias)
        flat, scale = x.reshape(-1, x.shape[-1]), x_scale.reshape(-1) if x_scale.ndim else x_scale
        y = _run(name, bits, out_dtype, implementation, flat, weight, scale, weight_scale, *bias)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    batched = jax.custom_batching.custom_vmap(rows)

    @batched.def_vmap
    def _(size: int, in_batched: list[bool], *operands: Array) -> tuple[Array, bool]:
        x, weight, x_scale, weight_scale, *bias = operands
        x_batched, weight_batched, scale_batched, *others_batched = in_batched
        if weight_batched or any(others_batched):  # Several weights: one after the other.
            axes = [0 if b else None for b in in_batched]
            each = lambda i: rows(*(o if a is None else o[i] for o, a in zip(operands, axes, strict=True)))  # noqa: E731
            return lax.map(each, jnp.arange(size)), True
        if not x_batched:
            x = jnp.broadcast_to(x, (size, *x.shape))
        if scale_batched or x_scale.ndim:  # One scale a row, for every row.
            x_scale = x_scale if scale_batched else x_scale[None]
            x_scale = x_scale.reshape(*x_scale.shape, *(1,) * (x.ndim - 1 - x_scale.ndim))
            x_scale = jnp.broadcast_to(x_scale, x.shape[:-1])
        return batched(x, weight, x_scale, weight_scale, *bias), True

    return without_gradient(name, batched)


@functools.cache
def quantize_normalized(
    epsilon: float, qmax: int, center: bool, implementation: Implementation | None
) -> Callable[..., Array]:
    """The function of (x, multiplier, source, part, offset if any), with its rules for transformations."""

    def rows(x: Array, *recipe: Array) -> Array:
        flat = _normalized(epsilon, qmax, center, implementation, x.reshape(-1, x.shape[-1]), *recipe)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])

    batched = jax.custom_batching.custom_vmap(rows)

    @batched.def_vmap
    def _(size: int, in_batched: list[bool], x: Array, *recipe: Array) -> tuple[Array, bool]:
        if in_batched == [True] + [False] * len(recipe):
            return batched(x, *recipe), True
        operands = list(zip((x, *recipe), in_batched, strict=True))
        return lax.map(lambda i: rows(*(o[i] if b else o for o, b in operands)), jnp.arange(size)), True

    return without_gradient("quantize_normalized", batched)


def _normalized(
    epsilon: float, qmax: int, center: bool, implementation: Implementation | None, *operands: Array
) -> Array:
    """The same for x of shape (rows, k), by the implementation asked for or the fastest there is."""

    def xla(x: Array, multiplier: Array, source: Array, part: Array, *offset: Array) -> Array:
        (shift,) = offset or (None,)
        return reference.quantize_normalized(x, multiplier, shift, source, part, epsilon, qmax, center)

    x, _, source, _, *offset = operands
    device = hopper_device()
    if implementation == "xla" or (implementation is None and device is None) or not x.size:
        return xla(*operands)
    from pallas_kernels.hopper import norm

    kinds = {"center": center, "offset": bool(offset), "epsilon": epsilon, "qmax": qmax, "dtype": x.dtype}
    p = norm.Problem(rows=x.shape[0], k=x.shape[1], extra=source.shape[0], **kinds)
    reason = NO_HOPPER if device is None else norm.cannot_use(p)
    if reason and implementation == "mosaic":
        raise NotImplementedError(f"quantize_normalized: implementation 'mosaic' cannot take x {x.shape}: {reason}")
    _say("quantize_normalized", x.shape, "xla" if reason else "mosaic", reason or "")
    if reason:
        return xla(*operands)

    def mosaic(x: Array, multiplier: Array, source: Array, part: Array, *offset: Array) -> Array:
        return norm.build(p)(x, multiplier, *offset, *((source, part) if p.extra else ()))

    return (
        mosaic(*operands) if implementation == "mosaic" else lax.platform_dependent(*operands, cuda=mosaic, default=xla)
    )


def without_gradient(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
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


def _xla(
    name: str, out_dtype: Any, x: Array, weight: Array, x_scale: Array, weight_scale: Array, *bias: Array
) -> Array:
    return getattr(reference, name)(x, weight, x_scale, weight_scale, *(bias or (None,)), out_dtype)


def _run(
    name: str, bits: Literal[4, 8], out_dtype: Any, implementation: Implementation | None, *operands: Array
) -> Array:
    """One matmul with x of shape (m, k), by the implementation asked for or the fastest there is."""
    xla = functools.partial(_xla, name, out_dtype)
    device = hopper_device()
    if implementation == "xla" or (implementation is None and device is None):
        return xla(*operands)
    from pallas_kernels import tuning
    from pallas_kernels.hopper import matmul

    x, weight, x_scale, weight_scale, *bias = operands
    (m, k), n = x.shape, weight.shape[0]
    kinds = {"per_token": bool(x_scale.ndim), "per_channel": bool(weight_scale.ndim), "bias": bool(bias)}
    p = problem(bits, m, n, k, out_dtype, **kinds)
    reason = NO_HOPPER if device is None else matmul.cannot_use(p)
    if reason and implementation == "mosaic":
        raise NotImplementedError(f"{name}: implementation 'mosaic' cannot take x {x.shape} {x.dtype}: {reason}")
    config = None if reason or device is None else tuning.choose(p, device)
    if config is None and implementation == "mosaic":
        config = tuning.rule(p)
    _say(name, (m, n, k), "xla" if config is None else f"mosaic, {config}", reason or "")
    if config is None:
        return xla(*operands)

    def mosaic(x: Array, weight: Array, x_scale: Array, weight_scale: Array, *bias: Array) -> Array:
        return matmul.matmul(p, config, x, weight, x_scale, weight_scale, *(bias or (None,)))

    if implementation == "mosaic":
        return mosaic(*operands)
    return lax.platform_dependent(*operands, cuda=mosaic, default=xla)


@functools.cache
def _say(name: str, shape: tuple[int, ...], choice: str, why: str) -> None:
    log.info("%s %s: %s%s", name, " x ".join(map(str, shape)), choice, f" ({why})" if why else "")
