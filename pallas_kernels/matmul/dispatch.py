"""The choice of an implementation, and the rules of JAX's transformations for functions of integers."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import device
from pallas_kernels.device import NO_HOPPER
from pallas_kernels.gradient import with_gradient_of, without_gradient
from pallas_kernels.matmul.hopper.decoder import STEP_CODES
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.matmul.kind import Implementation, Matmul, Operands

if TYPE_CHECKING:  # Mosaic GPU is imported only where it may be used.
    from pallas_kernels.matmul.hopper.kernels import Config


@device.cached
def matmul(kind: Matmul, implementation: Implementation | None) -> Callable[[Operands], Array]:
    """The matmul as a function of its operands, with its rules for transformations."""

    def rows(operands: Operands) -> Array:
        """Any leading axes of x are rows."""
        x, codes, x_scale, *_ = operands
        if not x.size or not codes.size:
            return kind.xla(operands)
        scale = x_scale.reshape(-1) if x_scale.ndim else x_scale
        y = _run(kind, implementation, operands._replace(x=x.reshape(-1, x.shape[-1]), x_scale=scale))
        return y.reshape(*x.shape[:-1], codes.shape[0])

    batched = jax.custom_batching.custom_vmap(rows)

    @batched.def_vmap
    def _(size: int, in_batched: list[Operands], operands: Operands) -> tuple[Array, bool]:
        (are_batched,) = in_batched
        x, x_scale = operands.x, operands.x_scale
        of_weight = are_batched._replace(x=False, x_scale=False)
        if any(jax.tree.leaves(of_weight)):  # Several weights: one after the other.

            def each(i: Array) -> Array:
                return rows(jax.tree.map(lambda operand, b: operand[i] if b else operand, operands, are_batched))

            return lax.map(each, jnp.arange(size)), True
        if not are_batched.x:
            x = jnp.broadcast_to(x, (size, *x.shape))
        if are_batched.x_scale or x_scale.ndim:  # One scale a row, for every row.
            x_scale = x_scale if are_batched.x_scale else x_scale[None]
            x_scale = x_scale.reshape(*x_scale.shape, *(1,) * (x.ndim - 1 - x_scale.ndim))
            x_scale = jnp.broadcast_to(x_scale, x.shape[:-1])
        return batched(operands._replace(x=x, x_scale=x_scale)), True

    if jnp.issubdtype(kind.decoder.x_dtype, jnp.floating):
        return with_gradient_of(kind.xla, batched)
    return without_gradient(kind.name, batched)


def _run(kind: Matmul, implementation: Implementation | None, operands: Operands) -> Array:
    """One matmul with x of shape (m, k), by the implementation asked for or the fastest there is."""
    if implementation == "xla" or (implementation is None and device.hopper_device() is None):
        return kind.xla(operands)
    from pallas_kernels.matmul.hopper import launch

    x, codes, x_scale, *_ = operands
    if len(x) == 1:  # A scale for every row is one for all, which kernels need not pad.
        x_scale = x_scale.reshape(())
        operands = operands._replace(x_scale=x_scale)
    p = Problem(
        m=len(x),
        n=codes.shape[0],
        k=x.shape[1],
        decoder=kind.decoder,
        out_dtype=kind.out_dtype,
        per_token=bool(x_scale.ndim),
        per_channel=bool(operands.scale.ndim),
        bias=operands.bias is not None,
    )
    config = configuration(kind.name, p, x, group_count(operands.group_scale), implementation)
    if config is None:
        return kind.xla(operands)

    def mosaic(operands: Operands) -> Array:
        return launch.matmul(p, config, *operands)

    if implementation == "mosaic":
        return mosaic(operands)
    return lax.platform_dependent(operands, cuda=mosaic, default=kind.xla)


def group_count(group_scale: Array | None) -> int | None:
    """Groups of input channels that have scales; None without."""
    return None if group_scale is None else group_scale.shape[-2]


def configuration(
    name: str,
    p: Problem,
    x: Array,
    groups: int | None,
    implementation: Implementation | None,
    reason: str | None = None,
) -> "Config | None":
    """The configuration of the kernel that computes a problem; None where XLA does.

    Args:
      name: of the entry point.
      p: the problem.
      x: its activations.
      groups: of input channels that have scales; None without.
      implementation: the one asked for.
      reason: why the kernels cannot take it, if that is known already.

    Raises:
      NotImplementedError: if "mosaic" was asked for, and cannot take it.
    """
    from pallas_kernels.matmul.hopper import tuning

    gpu = device.hopper_device()
    reason = NO_HOPPER if gpu is None else reason or _cannot_use(p, x, groups)
    if reason and implementation == "mosaic":
        raise NotImplementedError(f"{name}: implementation 'mosaic' cannot take x {x.shape} {x.dtype}: {reason}")
    config = None if reason or gpu is None else tuning.choose(p, gpu)
    if config is None and implementation == "mosaic":
        config = tuning.rule(p)
    device.say(name, (p.m, p.n, p.k), "xla" if config is None else f"mosaic, {config}", reason or "")
    return config


def _cannot_use(p: Problem, x: Array, groups: int | None) -> str | None:
    """Why the kernels cannot take a problem with these activations and so many groups; None if they can."""
    from pallas_kernels.matmul.hopper import launch

    if x.dtype != p.decoder.x_dtype:
        return f"x is {x.dtype}, not {p.decoder.x_dtype}"
    if groups is not None and p.k != STEP_CODES * groups:
        return f"groups have {p.k // groups} input channels, not {STEP_CODES}"
    return launch.cannot_use(p)
