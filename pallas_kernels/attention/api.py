"""Entry points for attention of one new token a sequence over a cache of keys and values.

The kernel, and the layout of the cache: :mod:`pallas_kernels.attention.triton`; Hopper GPUs have another for INT8 caches,
:mod:`pallas_kernels.attention.hopper`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int8, Int32

from pallas_kernels import device
from pallas_kernels.attention import reference, triton
from pallas_kernels.attention.codes import Recipe
from pallas_kernels.attention.parts import Parts
from pallas_kernels.attention.problem import capacity_of
from pallas_kernels.attention.triton import Finish, Result
from pallas_kernels.device import NO_GPU
from pallas_kernels.quantize.dispatch import CHANNEL_MULTIPLE, quantize
from pallas_kernels.quantize.kind import Implementation as QuantizeImplementation
from pallas_kernels.quantize.kind import Quantization

Implementation = Literal["mosaic", "triton", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("mosaic", "triton", "xla")
FASTER: dict[str, Implementation] = {"triton": "mosaic", "xla": "triton"}
"""The implementation that would have been faster than one."""


class Inputs(NamedTuple):
    """The arrays of a call: lengths (batch,), cosines and sines or nothing, the cache's two or four arrays, and its pages."""

    qkv: Array
    lengths: Array
    rotation: tuple[Array, ...]
    cache: tuple[Array, ...]
    pages: Array | None


def decode_attention(
    qkv: Float[Array, "batch all_heads dim"],
    keys: Float[Array, "batch capacity kv_heads dim"] | Int8[Array, "batch capacity kv_heads dim"],
    values: Float[Array, "batch capacity kv_heads dim"] | Int8[Array, "batch capacity kv_heads dim"],
    lengths: Int32[Array, " batch"],
    key_scales: Float32[Array, "batch capacity kv_heads"] | None = None,
    value_scales: Float32[Array, "batch capacity kv_heads"] | None = None,
    *,
    rotation: tuple[Float32[Array, "batch half"], Float32[Array, "batch half"]] | None = None,
    scale: float | None = None,
    window: int | None = None,
    pages: Int32[Array, "batch n"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch heads dim"], tuple[Array, ...]]:
    """Appends a token to every sequence, and gives ``softmax(q @ keys.T * scale) @ values`` over its filled positions.

    Args:
      qkv: the new tokens' queries, then keys, then values; neighbouring query heads share a key-value head where there are
        fewer of those.
      keys, values: of the cache, in the dtype of ``qkv``, or another floating one, or int8.
      lengths: positions filled before; the new token goes to the next, or, in a full cache, to the last.
      key_scales, value_scales: of int8 codes.
      rotation: cosines and sines that queries and keys are turned by first, pairs taken from the two halves of a head
        (arXiv 2104.09864).
      scale: 1 / sqrt(dim) by default.
      window: only so many of the last positions; None for all.
      pages: for a cache of pages, whose keys and values are (pool, page_size, kv_heads, dim) and scales (pool, page_size,
        kv_heads): the pages of each sequence, so that its position t is at ``t % page_size`` of page
        ``pages[b, t // page_size]``, and the capacity is ``n * page_size``.  The numbers are not checked: all must be from 0
        to pool - 1, and those that no position up to the new token's needs may be any of these.  Sequences may share pages
        but for the one that a new token goes to.  Results are, bit for bit, those of the same implementation over a cache of
        rows of that capacity.  "mosaic" takes pages of a multiple of 16 positions, the others of any number.
      implementation: None takes a kernel where there is one: "mosaic", which is for Hopper GPUs, or "triton", for NVIDIA GPUs
        of compute capability 8.0 or more; and elsewhere "xla", which looks at the whole capacity.

    Returns:
      The output of every head, and the arrays of the cache in the order in which they are given.  Queries see the new key
      and value as the cache holds them.

    Raises:
      ValueError: if shapes do not fit together, or codes and scales do not come together.
      NotImplementedError: if the named implementation cannot take the call, its size of a page among it.
    """
    inputs = _checked(qkv, keys, values, lengths, key_scales, value_scales, rotation, pages, implementation)
    return _attend(functools.partial(_whole, qkv.dtype), implementation, inputs, scale, window)


def quantized_decode_attention(
    qkv: Float[Array, "batch all_heads dim"],
    keys: Float[Array, "batch capacity kv_heads dim"] | Int8[Array, "batch capacity kv_heads dim"],
    values: Float[Array, "batch capacity kv_heads dim"] | Int8[Array, "batch capacity kv_heads dim"],
    lengths: Int32[Array, " batch"],
    key_scales: Float32[Array, "batch capacity kv_heads"] | None,
    value_scales: Float32[Array, "batch capacity kv_heads"] | None,
    multiplier: Float32[Array, " channels"],
    source: Int32[Array, " e"],
    part: Int32[Array, " e"],
    *,
    qmax: int,
    per_token: bool = False,
    rotation: tuple[Float32[Array, "batch half"], Float32[Array, "batch half"]] | None = None,
    scale: float | None = None,
    window: int | None = None,
    pages: Int32[Array, "batch n"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Int8[Array, "batch width"], Float32[Array, " batch"] | None, tuple[Array, ...]]:
    """:func:`decode_attention`, and its output quantized for the next layer, in the pass that puts the parts together.

    With fixed scales there need not be such a pass: a program that has computed a whole output quantizes it itself.

    Args:
      multiplier, source, part, qmax, per_token: as :func:`pallas_kernels.quantize_normalized` takes them; channels are those
        of all heads, one after the other.

    Returns:
      Codes, scales of the rows if each has its own, and the arrays of the cache.

    Raises:
      ValueError: if shapes do not fit together, or codes and scales do not come together.
      NotImplementedError: if the named implementation cannot take the call.
    """
    channels = (qkv.shape[1] - 2 * keys.shape[2]) * qkv.shape[2]
    if multiplier.shape != (channels,) or part.shape != source.shape:
        raise ValueError(
            f"quantized_decode_attention: {channels} channels need multiplier ({channels},) and part {source.shape}, got "
            f"{multiplier.shape} and {part.shape}"
        )
    kind = Quantization(name="quantize_attended", qmax=qmax, per_token=per_token)
    recipe = Recipe(qmax, multiplier, source, part)
    finish = functools.partial(_quantized, kind, recipe, implementation)
    inputs = _checked(qkv, keys, values, lengths, key_scales, value_scales, rotation, pages, implementation)
    by_kernel = None if per_token or len(source) % CHANNEL_MULTIPLE else recipe
    (codes, *scales), written = _attend(finish, implementation, inputs, scale, window, by_kernel)
    return codes, scales[0] if scales else None, written


def _attend(
    finish: Finish[Result],
    implementation: Implementation | None,
    inputs: Inputs,
    scale: float | None,
    window: int | None,
    recipe: Recipe | None = None,
) -> tuple[Result, tuple[Array, ...]]:
    """The result that ``finish`` makes of the parts and their sums, and the cache, by an implementation or the fastest."""
    qkv, _, _, (keys, values, *_), pages = inputs
    factor = 1 / math.sqrt(qkv.shape[-1]) if scale is None else float(scale)

    def xla(inputs: Inputs) -> tuple[Result, tuple[Array, ...]]:
        out, cache = reference.decode_attention(*inputs[:4], scale=factor, window=window, pages=inputs.pages)
        return finish(out, None), cache

    if implementation == "xla":
        return xla(inputs)
    reasons = {
        "mosaic": _not_on_hopper(qkv, keys, values, pages is not None),
        "triton": NO_GPU if device.capability() < (8, 0) else triton.cannot_use(qkv, keys, values),
    }
    used = implementation or next((name for name, why in reasons.items() if why is None), "xla")
    if why := reasons[used] if implementation else None:
        raise NotImplementedError(
            f"decode_attention: implementation {used!r} cannot take qkv {qkv.shape} {qkv.dtype}: {why}"
        )
    missed = (reasons[FASTER[used]] or "") if used in FASTER else ""
    device.say("decode_attention", (*qkv.shape, capacity_of(inputs.cache, pages)), used, missed)
    if used == "xla":
        return xla(inputs)

    def kernel(inputs: Inputs) -> tuple[Result, tuple[Array, ...]]:
        run = _hopper_run() if used == "mosaic" else triton.run
        kinds = {"scale": factor, "window": window, "finish": finish, "recipe": recipe}
        return run(*inputs[:4], pages=inputs.pages, **kinds)

    return kernel(inputs) if implementation else lax.platform_dependent(inputs, cuda=kernel, default=xla)


def _not_on_hopper(qkv: Array, keys: Array, values: Array, paged: bool) -> str | None:
    """Why the kernel for Hopper GPUs cannot run here."""
    if device.hopper_device() is None:
        return "this is no Hopper GPU"
    from pallas_kernels.attention import hopper

    return hopper.cannot_use(qkv, keys, values, paged)


def _hopper_run() -> Callable[..., tuple[Result, tuple[Array, ...]]]:
    from pallas_kernels.attention import hopper

    return hopper.run


def _whole(dtype: DTypeLike, out: Array, sums: Array | None) -> Array:
    """(batch, heads, dim) of the outputs of the kernel's programs: (batch, kv_heads, parts, group, dim)."""
    out = out if sums is None else reference.together(out, sums)
    return out.reshape(len(out), -1, out.shape[-1]).astype(dtype)


def _quantized(
    kind: Quantization, recipe: Recipe, implementation: Implementation | None, out: Array, sums: Array | None
) -> tuple[Array, ...]:
    """Codes of that, (batch, channels), and their scales."""
    by: QuantizeImplementation | None = None if implementation == "mosaic" else implementation  # Another kernel's.
    if sums is None:
        return quantize(kind, by)(out.reshape(len(out), -1), *recipe[1:])
    kind = dataclasses.replace(kind, parts=Parts(*out.shape[2:]))
    return quantize(kind, by)(out.reshape(len(out), -1), sums.reshape(len(out), -1), *recipe[1:])


def _checked(
    qkv: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    key_scales: Array | None,
    value_scales: Array | None,
    rotation: tuple[Array, Array] | None,
    pages: Array | None,
    implementation: Implementation | None,
) -> Inputs:
    full = qkv.ndim == 3 and keys.ndim == 4 and 0 not in (*qkv.shape, *keys.shape)
    heads = qkv.shape[1] - 2 * keys.shape[2] if full else 0
    alike = keys.shape[-1] == qkv.shape[-1] and (pages is not None or keys.shape[0] == qkv.shape[0])
    if heads < 1 or not alike or heads % keys.shape[2]:
        held = "batch, capacity" if pages is None else "pages, page_size"
        raise ValueError(
            f"decode_attention: qkv (batch, heads + 2 kv_heads, dim) and keys ({held}, kv_heads, dim) do not fit "
            f"together: {qkv.shape} and {keys.shape}"
        )
    if pages is not None and (pages.ndim != 2 or len(pages) != len(qkv) or not pages.size or pages.dtype != jnp.int32):
        raise ValueError(
            f"decode_attention: pages must be int32 ({len(qkv)}, n) with n of 1 or more, got {pages.dtype} of shape "
            f"{pages.shape}"
        )
    if values.shape != keys.shape or lengths.shape != qkv.shape[:1]:
        raise ValueError(
            f"decode_attention: keys {keys.shape} need values of that shape and lengths {qkv.shape[:1]}, got {values.shape} "
            f"and {lengths.shape}"
        )
    for part in rotation or ():
        if part.shape != (wanted := (qkv.shape[0], qkv.shape[2] // 2)):
            raise ValueError(f"decode_attention: rotation must be two arrays {wanted}, got one of {part.shape}")
    for name, operand, scales in (("key", keys, key_scales), ("value", values, value_scales)):
        if (operand.dtype == jnp.int8) != (scales is not None):
            raise ValueError(f"decode_attention: {name}s are {operand.dtype}; int8 codes and scales come together")
        if scales is not None and scales.shape != keys.shape[:3]:
            raise ValueError(f"decode_attention: {name}_scales must be {keys.shape[:3]}, got {scales.shape}")
    if keys.dtype != values.dtype:
        raise ValueError(f"decode_attention: keys are {keys.dtype} and values {values.dtype}; expected one dtype")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(f"implementation {implementation!r} is not one of: {', '.join(IMPLEMENTATIONS)}")
    cache = tuple(x for x in (keys, values, key_scales, value_scales) if x is not None)
    return Inputs(qkv, lengths, rotation or (), cache, pages)
