"""Checks of a matmul's operands, which the entry points make before they begin."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.matmul.hopper.decoder import Decoder
from pallas_kernels.matmul.kind import IMPLEMENTATIONS, Implementation, Matmul, Operands, Weight
from pallas_kernels.packing import BLOCK_CODES


def checked_operands(
    kind: Matmul,
    x: Array,
    weight: Weight,
    x_scale: Array | float,
    bias: Array | None,
    implementation: Implementation | None,
) -> Operands:
    """The operands of :func:`pallas_kernels.matmul.dispatch.matmul`.

    Raises:
      ValueError: if shapes do not fit together.
      NotImplementedError: if there is no such implementation.
    """
    x_scale, scale = (jnp.asarray(scale, jnp.float32) for scale in (x_scale, weight.scale))
    operands = Operands(x, weight.codes, x_scale, scale, weight.group_scale, bias)
    check_format(kind.name, weight.decoder, weight.codes, weight.group_scale)
    weight.decoder.check(kind.name, x, weight.codes, weight.group_scale)
    k = weight.codes.shape[-1] * (8 // weight.decoder.bits)
    _check_shapes(kind, operands, k)
    if weight.group_scale is not None:
        _check_groups(kind, weight.codes.shape[0], k, weight.group_scale)
    check_implementation(implementation)
    return operands


def check_format(name: str, decoder: Decoder, codes: Array, group_scale: Array | None) -> None:
    """Checks that a weight's arrays are those of its format.

    Raises:
      ValueError: if they are not.
    """
    stored_block = BLOCK_CODES // 2
    if decoder.bits == 4 and codes.shape[-1] % stored_block:
        raise ValueError(f"{name}: packed weights come in blocks of {stored_block} bytes, got shape {codes.shape}")
    found = None if group_scale is None else group_scale.dtype
    if found is not None and found not in (jnp.int16, jnp.int32, jnp.float32):
        raise ValueError(f"{name}: group_scale must be int16, int32 or float32, got {found}")
    if found != decoder.scale_dtype:
        raise ValueError(f"{name}: group_scale must be {decoder.scale_dtype}, got {found}")


def check_implementation(implementation: Implementation | None) -> None:
    """Checks that there is such an implementation.

    Raises:
      NotImplementedError: if there is not.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(f"implementation {implementation!r} is not one of: {', '.join(IMPLEMENTATIONS)}")


def _check_groups(kind: Matmul, n: int, k: int, scales: Array) -> None:
    if scales.ndim != 2 or scales.shape[1] != n or k % max(len(scales), 1):
        raise ValueError(
            f"{kind.name}: group_scale must be (groups, {n}) with groups a divisor of {k}, got {scales.shape}"
        )


def _check_shapes(kind: Matmul, operands: Operands, k: int) -> None:
    x, codes, x_scale, scale, _, bias = operands
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(kind.out_dtype, jnp.integer):
        raise ValueError(f"{kind.name}: out_dtype must be a floating dtype, got {kind.out_dtype}")
    if x.shape[-1] != k:
        raise ValueError(f"{kind.name}: x {x.shape} has {x.shape[-1]} input channels, the weight has {k}")
    if x_scale.shape not in ((), x.shape[:-1]):
        raise ValueError(f"{kind.name}: x_scale must be a scalar or {x.shape[:-1]}, got {x_scale.shape}")
    if scale.shape not in ((), codes.shape[:1]):
        raise ValueError(f"{kind.name}: weight_scale must be a scalar or {codes.shape[:1]}, got {scale.shape}")
    if bias is not None and bias.shape != codes.shape[:1]:
        raise ValueError(f"{kind.name}: bias must be {codes.shape[:1]}, got {bias.shape}")
