"""Which implementation runs, and what JAX's transformations make of functions of integers."""

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike

from pallas_kernels.matmul import reference

Implementation = Literal["mosaic", "xla"]
NO_HOPPER = "it needs an NVIDIA GPU of compute capability 9.0"
NO_GPU = "it needs an NVIDIA GPU of compute capability 8.0 or more"
log = logging.getLogger("pallas_kernels")


@functools.cache
def capability() -> tuple[int, int]:
    """Compute capability of this process's NVIDIA GPU; (0, 0) if it has none."""
    try:
        major, minor = jax.devices("cuda")[0].compute_capability.split(".")
    except (RuntimeError, AttributeError):
        return 0, 0
    return int(major), int(minor)


@functools.cache
def hopper_device() -> str | None:
    """The name of this process's Hopper GPU; None if it has none."""
    return jax.devices("cuda")[0].device_kind if capability() == (9, 0) else None


@functools.cache
def has_triton() -> bool:
    """Whether this version of JAX has the Triton backend of Pallas."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


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
    group_dtype: DTypeLike | None = None,
    folded: bool = False,
    weight_only: bool = False,
    experts: int = 0,
    gate: Any = None,
) -> Any:
    """A :class:`pallas_kernels.matmul.hopper.problem.Problem`; Mosaic GPU is imported only where it may be used."""
    from pallas_kernels.matmul.hopper.problem import Problem

    kinds = {
        "per_token": per_token,
        "per_channel": per_channel,
        "bias": bias,
        "folded": folded,
        "weight_only": weight_only,
        "experts": experts,
        "gate": gate,
    }
    groups = None if group_dtype is None else jnp.dtype(group_dtype)
    return Problem(m=m, n=n, k=k, bits=bits, out_dtype=jnp.dtype(out_dtype), group_dtype=groups, **kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmul:
    """Which of the integer matmuls is meant.

    Attributes:
      bits: of the weight codes.
      grouped: whether groups of input channels have scales.
      folded: whether those are integers from 1 to 15, and codes of 4 bits times them fit into int8.
      weight_only: whether activations are real numbers.
      out_dtype: of the result.
    """

    bits: Literal[4, 8]
    grouped: bool = False
    folded: bool = False
    weight_only: bool = False
    out_dtype: Any

    @property
    def name(self) -> str:
        """Of the entry point."""
        if self.weight_only:
            return f"weight_only_int{self.bits}_matmul"
        return f"grouped_int{self.bits}_matmul" if self.grouped else f"int{self.bits}_matmul"

    def split(self, rest: Sequence[Array]) -> tuple[Array | None, Array | None]:
        """Scales of groups and bias, each None if not there, of what stands behind the four operands of every matmul."""
        groups, bias = rest[: self.grouped], rest[self.grouped :]
        return groups[0] if groups else None, bias[0] if bias else None

    def xla(self, x: Array, weight: Array, x_scale: Array, weight_scale: Array, *rest: Array) -> Array:
        """The reference."""
        groups, bias = self.split(rest)
        f = getattr(reference, self.name)
        if self.weight_only:
            return f(x, weight, groups, weight_scale, bias, self.out_dtype)
        if groups is None:
            return f(x, weight, x_scale, weight_scale, bias, self.out_dtype)
        return f(x, weight, x_scale, groups, weight_scale, bias, self.out_dtype, self.folded)


@functools.cache
def matmul(kind: Matmul, implementation: Implementation | None) -> Callable[..., Array]:
    """The matmul as a function of (x, weight, x_scale, weight_scale, scales of groups if any, bias if any).

    It has its rules for transformations.
    """

    def rows(x: Array, weight: Array, x_scale: Array, weight_scale: Array, *rest: Array) -> Array:
        """Any leading axes of x are rows."""
        if not x.size or not weight.size:
            return kind.xla(x, weight, x_scale, weight_scale, *rest)
        flat, scale = x.reshape(-1, x.shape[-1]), x_scale.reshape(-1) if x_scale.ndim else x_scale
        y = _run(kind, implementation, flat, weight, scale, weight_scale, *rest)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    batched = jax.custom_batching.custom_vmap(rows)

    @batched.def_vmap
    def _(size: int, in_batched: list[bool], *operands: Array) -> tuple[Array, bool]:
        x, weight, x_scale, weight_scale, *rest = operands
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
        return batched(x, weight, x_scale, weight_scale, *rest), True

    return without_gradient(kind.name, batched)


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


def _run(kind: Matmul, implementation: Implementation | None, *operands: Array) -> Array:
    """One matmul with x of shape (m, k), by the implementation asked for or the fastest there is."""
    device = hopper_device()
    if implementation == "xla" or (implementation is None and device is None):
        return kind.xla(*operands)
    from pallas_kernels.matmul.hopper import launch as matmul

    x, weight, x_scale, weight_scale, *rest = operands
    (m, k), n = x.shape, weight.shape[0]
    if m == 1:  # A scale for every row is one for all, which kernels need not pad.
        x_scale = x_scale.reshape(())
        operands = (x, weight, x_scale, weight_scale, *rest)
    groups, bias = kind.split(rest)
    kinds = {"per_token": bool(x_scale.ndim), "per_channel": bool(weight_scale.ndim), "bias": bias is not None}
    kinds |= {"folded": kind.folded, "weight_only": kind.weight_only}
    p = problem(kind.bits, m, n, k, kind.out_dtype, group_dtype=None if groups is None else groups.dtype, **kinds)
    config = configuration(kind.name, p, x, None if groups is None else len(groups), implementation)
    if config is None:
        return kind.xla(*operands)

    def mosaic(x: Array, weight: Array, x_scale: Array, weight_scale: Array, *rest: Array) -> Array:
        return matmul.matmul(p, config, x, weight, x_scale, weight_scale, *kind.split(rest))

    if implementation == "mosaic":
        return mosaic(*operands)
    return lax.platform_dependent(*operands, cuda=mosaic, default=kind.xla)


def configuration(
    name: str, p: Any, x: Array, groups: int | None, implementation: Implementation | None, reason: str | None = None
) -> Any:
    """The configuration of the kernel that computes a problem; None where XLA does.

    Args:
      name: of the entry point.
      p: the problem.
      x: its activations.
      groups: of input channels that have scales; None without.
      implementation: what was asked for.
      reason: why the kernels cannot take it, if that is known already.

    Raises:
      NotImplementedError: if "mosaic" was asked for, and cannot take it.
    """
    from pallas_kernels.matmul.hopper import tuning

    device = hopper_device()
    reason = NO_HOPPER if device is None else reason or _cannot_use(p, x, groups)
    if reason and implementation == "mosaic":
        raise NotImplementedError(f"{name}: implementation 'mosaic' cannot take x {x.shape} {x.dtype}: {reason}")
    config = None if reason or device is None else tuning.choose(p, device)
    if config is None and implementation == "mosaic":
        config = tuning.rule(p)
    say(name, (p.m, p.n, p.k), "xla" if config is None else f"mosaic, {config}", reason or "")
    return config


def _cannot_use(p: Any, x: Array, groups: int | None) -> str | None:
    """Why the kernels cannot take a problem with these activations and so many groups; None if they can."""
    from pallas_kernels.matmul.hopper import launch as matmul

    if x.dtype != p.x_dtype:
        return f"x is {x.dtype}, not {p.x_dtype}"
    if groups is not None and p.k != 128 * groups:
        return f"groups have {p.k // groups} input channels, not 128"
    return matmul.cannot_use(p)


@functools.cache
def say(name: str, shape: tuple[int, ...], choice: str, why: str) -> None:
    """Logs once what runs for operands of a shape, and why not the kernel where it does not."""
    log.info("%s %s: %s%s", name, " x ".join(map(str, shape)), choice, f" ({why})" if why else "")
