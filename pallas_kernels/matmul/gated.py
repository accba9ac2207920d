"""A matmul whose result gates itself and is quantized for the next one, as one entry point.

That is ``quantize_activated(quantized_matmul(...), gated=True)``.  Of few rows on a Hopper GPU one kernel
(:mod:`pallas_kernels.matmul.hopper.gate`) does all of it, or, with a scale for every row, all but the quantization: the
product is never written to memory, and a kernel less is waited for.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int8, Int32

from pallas_kernels import device
from pallas_kernels.gradient import without_gradient
from pallas_kernels.matmul.dispatch import configuration, group_count, matmul
from pallas_kernels.matmul.hopper.problem import Gate, Problem
from pallas_kernels.matmul.kind import Implementation, Matmul, Operands, Weight
from pallas_kernels.matmul.operands import checked_operands
from pallas_kernels.quantize.api import Quantized, check_activation
from pallas_kernels.quantize.dispatch import quantize
from pallas_kernels.quantize.kind import Quantization


class Recipe(NamedTuple):
    """How the result is quantized: (n / 2,), (e,) and (e,)."""

    multiplier: Array
    source: Array
    part: Array


Gated = Callable[[Operands, Recipe], tuple[Array, ...]]


def gated_matmul(
    x: Int8[Array, "*rows k"],
    weight: Weight,
    x_scale: Float32[Array, "..."] | float,
    multiplier: Float32[Array, " half"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    *,
    activation: str,
    qmax: int,
    bias: Float[Array, " n"] | None = None,
    per_token: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Quantized:
    """Multiplies codes; the first half of the output channels gates the second, and the result is quantized.

    With ``y`` the product, rounded to ``out_dtype``, that is :func:`pallas_kernels.quantize_activated` of ``y``, gated.
    Implementations differ as there: a value within rounding of a half can get the one code or the other.

    Args:
      x, weight, x_scale, bias: as for :func:`pallas_kernels.quantized_matmul`; n is even, and x are codes.
      multiplier, source, part, activation, qmax, per_token: as for :func:`pallas_kernels.quantize_activated`, of n / 2
        channels.
      out_dtype: of the product, a floating dtype.
      implementation: None for the fastest one here; "mosaic" for the one kernel; "xla" for the reference.

    Returns:
      Codes (..., n / 2 + e), and one scale a row if ``per_token``.

    Raises:
      ValueError: if shapes do not fit together, or there is no such activation.
      NotImplementedError: if the named implementation cannot take the call.
    """
    kind = Matmul(decoder=weight.decoder, out_dtype=jnp.dtype(out_dtype))
    if jnp.issubdtype(kind.out_dtype, jnp.integer):
        raise ValueError(f"gated_matmul: out_dtype must be a floating dtype, got {kind.out_dtype}")
    operands = checked_operands(kind, x, weight, x_scale, bias, implementation)
    shape = (*x.shape[:-1], weight.codes.shape[0])
    check_activation("gated_matmul", shape, multiplier, source, part, activation, gated=True)
    how = Quantization(name="quantize_activated", qmax=qmax, per_token=per_token, activation=activation, gated=True)
    return Quantized(*_gated(kind, how, implementation)(operands, Recipe(multiplier, source, part)))


@device.cached
def _gated(kind: Matmul, how: Quantization, implementation: Implementation | None) -> Gated:
    """The function of a matmul's operands and a recipe, with its rules for transformations."""
    separate = "xla" if implementation == "xla" else None

    def in_two(operands: Operands, recipe: Recipe) -> tuple[Array, ...]:
        return quantize(how, separate)(matmul(kind, separate)(operands), *recipe)

    batched = jax.custom_batching.custom_vmap(functools.partial(_run, kind, how, implementation, in_two))

    @batched.def_vmap
    def _(
        size: int, in_batched: list[Operands | Recipe], operands: Operands, recipe: Recipe
    ) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        axes = jax.tree.map(lambda b: 0 if b else None, tuple(in_batched))
        return jax.vmap(in_two, in_axes=axes, axis_size=size)(operands, recipe), (True,) * (1 + how.per_token)

    return without_gradient("gated_matmul", batched)


def _run(
    kind: Matmul,
    how: Quantization,
    implementation: Implementation | None,
    in_two: Gated,
    operands: Operands,
    recipe: Recipe,
) -> tuple[Array, ...]:
    """By one kernel where that is asked for, or possible and faster."""
    x, codes, x_scale, *_ = operands
    m = x.size // max(x.shape[-1], 1)
    if implementation == "xla" or (implementation is None and device.hopper_device() is None) or not m:
        return in_two(operands, recipe)
    from pallas_kernels.matmul.hopper import launch

    extra = 0 if how.per_token else len(recipe.source)
    p = Problem(
        m=m,
        n=codes.shape[0],
        k=x.shape[-1],
        decoder=kind.decoder,
        out_dtype=kind.out_dtype,
        per_token=bool(x_scale.ndim) and m > 1,
        per_channel=bool(operands.scale.ndim),
        bias=operands.bias is not None,
        gate=Gate(activation=str(how.activation), qmax=how.qmax, extra=extra, per_token=how.per_token),
    )
    groups = group_count(operands.group_scale)
    config = configuration("gated_matmul", p, x.reshape(m, p.k), groups, implementation)
    if config is None:
        return in_two(operands, recipe)

    def in_one(operands: Operands, recipe: Recipe) -> tuple[Array, ...]:
        scale = operands.x_scale.reshape(-1) if p.per_token else operands.x_scale.reshape(())
        flat = operands._replace(x=operands.x.reshape(m, p.k), x_scale=scale)
        found = launch.gated_matmul(p, config, *flat, recipe=recipe if extra else recipe[:1])
        if how.per_token:
            known = Quantization(name="quantize_gated", qmax=how.qmax, per_token=True, largest=True)
            found = quantize(known, None)(*found, *recipe)
        return tuple(array.reshape(*x.shape[:-1], *array.shape[1:]) for array in found)

    if implementation:
        return in_one(operands, recipe)
    return lax.platform_dependent(operands, recipe, cuda=in_one, default=in_two)
