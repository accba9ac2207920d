"""An integer matmul whose result gates itself and is quantized for the next one, as one entry point.

Which is ``quantize_activated(matmul(...), gated=True)``.  Of few rows on a Hopper GPU one kernel
(:mod:`pallas_kernels.matmul.hopper.gate`) does all of it, or, with a scale for every row, all but the quantization: the
product is never written to memory, and a kernel less is waited for.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int, Int8, Int32

from pallas_kernels.matmul.dispatch import (
    Implementation,
    Matmul,
    configuration,
    hopper_device,
    matmul,
    problem,
    without_gradient,
)
from pallas_kernels.matmul.operands import checked_operands
from pallas_kernels.quantize import dispatch as rows
from pallas_kernels.quantize.api import Quantized, checked_activation
from pallas_kernels.quantize.dispatch import Quantization


def gated_matmul(
    x: Int8[Array, "*rows k"],
    weight: Int8[Array, "n stored"],
    x_scale: Float32[Array, "..."],
    weight_scale: Float32[Array, "..."],
    multiplier: Float32[Array, " half"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    *,
    bits: Literal[4, 8],
    activation: str,
    qmax: int,
    group_scale: Int[Array, "groups n"] | Float32[Array, "groups n"] | None = None,
    bias: Float[Array, " n"] | None = None,
    folded: bool = False,
    per_token: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Quantized:
    """Multiplies codes; the first half of the output channels gates the second, and what comes of it is quantized.

    With ``y`` the product, rounded to ``out_dtype``, that is :func:`pallas_kernels.quantize_activated` of ``y``, gated.
    Implementations differ as there: a value within rounding of a half can get the one code or the other.

    Args:
      x, weight, x_scale, weight_scale, bias: as for :func:`pallas_kernels.int8_matmul`, or, with 4 bits,
        :func:`pallas_kernels.int4_matmul`; n is even.
      multiplier, source, part, activation, qmax, per_token: as for :func:`pallas_kernels.quantize_activated`, of n / 2
        channels.
      bits: of a weight code.
      group_scale, folded: as for :func:`pallas_kernels.grouped_int8_matmul`; None without groups.
      out_dtype: of the product, a floating dtype.
      implementation: None for what is fastest here; "mosaic" for the one kernel; "xla" for the reference.

    Returns:
      Codes (..., n / 2 + e), and one scale a row if ``per_token``.

    Raises:
      ValueError: if shapes do not fit together, or there is no such activation.
      NotImplementedError: if the named implementation cannot take the call.
    """
    kinds = {"grouped": group_scale is not None, "folded": folded, "out_dtype": jnp.dtype(out_dtype)}
    kind = Matmul(bits=bits, **kinds)
    if jnp.issubdtype(kind.out_dtype, jnp.integer):
        raise ValueError(f"gated_matmul: out_dtype must be a floating dtype, got {kind.out_dtype}")
    operands = checked_operands(kind, x, weight, x_scale, weight_scale, group_scale, bias, implementation)
    shape = (*x.shape[:-1], weight.shape[0])
    how = checked_activation("gated_matmul", shape, multiplier, source, part, activation, gated=True)
    how = Quantization(name="quantize_activated", qmax=qmax, per_token=per_token, **how)
    return Quantized(*_gated(kind, how, implementation)(*operands, multiplier, source, part))


@functools.cache
def _gated(kind: Matmul, how: Quantization, implementation: Implementation | None) -> Callable[..., tuple[Array, ...]]:
    """The function of what the matmul takes and of multiplier, source and part, with its rules for transformations."""
    separate = "xla" if implementation == "xla" else None

    def in_two(*operands: Array) -> tuple[Array, ...]:
        y = matmul(kind, separate)(*operands[:-3])
        return rows.quantize(how, separate)(y, *operands[-3:])

    batched = jax.custom_batching.custom_vmap(functools.partial(_run, kind, how, implementation, in_two))

    @batched.def_vmap
    def _(size: int, in_batched: list[bool], *operands: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        f = jax.vmap(in_two, in_axes=tuple(0 if b else None for b in in_batched), axis_size=size)
        return f(*operands), (True,) * (1 + how.per_token)

    return without_gradient("gated_matmul", batched)


def _run(
    kind: Matmul,
    how: Quantization,
    implementation: Implementation | None,
    in_two: Callable[..., tuple[Array, ...]],
    *operands: Array,
) -> tuple[Array, ...]:
    """By one kernel where that is asked for, or possible and faster."""
    x, weight, x_scale, weight_scale, *rest, _, source, _ = operands
    (n, _), k, m = weight.shape, x.shape[-1], x.size // max(x.shape[-1], 1)
    if implementation == "xla" or (implementation is None and hopper_device() is None) or not m:
        return in_two(*operands)
    from pallas_kernels.matmul.hopper import launch as matmul
    from pallas_kernels.matmul.hopper.problem import Gate

    groups, bias = kind.split(rest)
    extra = 0 if how.per_token else len(source)
    gate = Gate(activation=str(how.activation), qmax=how.qmax, extra=extra, per_token=how.per_token)
    kinds = {"per_channel": bool(weight_scale.ndim), "bias": bias is not None, "folded": kind.folded, "gate": gate}
    kinds |= {"per_token": bool(x_scale.ndim) and m > 1, "group_dtype": None if groups is None else groups.dtype}
    p = problem(kind.bits, m, n, k, kind.out_dtype, **kinds)
    flat = x.reshape(m, k)
    config = configuration("gated_matmul", p, flat, None if groups is None else len(groups), implementation)
    if config is None:
        return in_two(*operands)

    def in_one(*operands: Array) -> tuple[Array, ...]:
        x, weight, x_scale, weight_scale, *rest, multiplier, source, part = operands
        x, x_scale = x.reshape(m, k), x_scale.reshape(-1) if p.per_token else x_scale.reshape(())
        recipe = (multiplier, source, part) if extra else (multiplier,)
        found = matmul.matmul(p, config, x, weight, x_scale, weight_scale, *kind.split(rest), recipe)
        if how.per_token:
            known = Quantization(name="quantize_gated", qmax=how.qmax, per_token=True, largest=True)
            found = rows.quantize(known, None)(*found, multiplier, source, part)
        return tuple(array.reshape(*shape, *array.shape[1:]) for array in found)

    shape = x.shape[:-1]
    return in_one(*operands) if implementation else lax.platform_dependent(*operands, cuda=in_one, default=in_two)
