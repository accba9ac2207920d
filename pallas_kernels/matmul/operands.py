"""What the entry points of the matmuls check before they begin."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.matmul.dispatch import Implementation, Matmul
from pallas_kernels.packing import BLOCK


def checked_operands(
    kind: Matmul,
    x: Array,
    weight: Array,
    x_scale: Array,
    weight_scale: Array | float,
    group_scale: Array | None,
    bias: Array | None,
    implementation: Implementation | None,
) -> list[Array]:
    """What :func:`pallas_kernels.matmul.dispatch.matmul` takes.

    Raises:
      ValueError: if shapes do not fit together.
      NotImplementedError: if there is no such implementation.
    """
    x_scale, weight_scale = (jnp.asarray(scale, jnp.float32) for scale in (x_scale, weight_scale))
    if kind.bits == 4:
        _check_packed(kind.name, weight)
    k = weight.shape[-1] * (8 // kind.bits)
    _check(kind, x, weight, k, x_scale, weight_scale, bias)
    if group_scale is not None:
        _check_groups(kind, weight.shape[0], k, group_scale)
    _check_implementation(implementation, "mosaic", "xla")
    rest = [operand for operand in (group_scale, bias) if operand is not None]
    return [x, weight, x_scale, weight_scale, *rest]


def _check_groups(kind: Matmul, n: int, k: int, scales: Array) -> None:
    if scales.dtype not in (jnp.int16, jnp.int32, jnp.float32):
        raise ValueError(f"{kind.name}: group_scale must be int16, int32 or float32, got {scales.dtype}")
    if kind.weight_only and scales.dtype != jnp.float32:
        raise ValueError(f"{kind.name}: group_scale must be float32, got {scales.dtype}")
    if kind.folded and scales.dtype == jnp.float32:
        raise ValueError(f"{kind.name}: only integer scales can be folded, got {scales.dtype}")
    if scales.ndim != 2 or scales.shape[1] != n or k % max(len(scales), 1):
        raise ValueError(
            f"{kind.name}: group_scale must be (groups, {n}) with groups a divisor of {k}, got {scales.shape}"
        )


def _check_packed(name: str, packed: Array) -> None:
    if packed.shape[-1] % (BLOCK // 2):
        raise ValueError(f"{name}: packed weights come in blocks of {BLOCK // 2} bytes, got shape {packed.shape}")


def _check(
    kind: Matmul,
    x: Array,
    weight: Array,
    k: int,
    x_scale: Array,
    weight_scale: Array,
    bias: Array | None,
) -> None:
    if kind.weight_only and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{kind.name}: x must have a floating dtype, got {x.dtype}{x.shape}")
    for operand, array in (("x", x), ("the weight", weight))[kind.weight_only :]:
        if array.dtype != jnp.int8:
            raise ValueError(f"{kind.name}: {operand} must be int8, got {array.dtype}{array.shape}")
    if kind.weight_only and jnp.issubdtype(kind.out_dtype, jnp.integer):
        raise ValueError(f"{kind.name}: out_dtype must be a floating dtype, got {kind.out_dtype}")
    if x.shape[-1] != k:
        raise ValueError(f"{kind.name}: x {x.shape} has {x.shape[-1]} input channels, the weight has {k}")
    if x_scale.shape not in ((), x.shape[:-1]):
        raise ValueError(f"{kind.name}: x_scale must be a scalar or {x.shape[:-1]}, got {x_scale.shape}")
    if weight_scale.shape not in ((), weight.shape[:1]):
        raise ValueError(f"{kind.name}: weight_scale must be a scalar or {weight.shape[:1]}, got {weight_scale.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{kind.name}: bias must be {weight.shape[:1]}, got {bias.shape}")


def _check_implementation(implementation: Implementation | None, *known: Implementation) -> None:
    if implementation not in (None, *known):
        raise NotImplementedError(f"implementation {implementation!r} is not one of: {', '.join(known)}")
