"""Times of quantizing and flattening activations, alone and with the operations that a model has before a linear layer.

copy                           reads and writes as many bfloat16 values, for scale
quantize                       static INT8 quantization
quantize_flatten               the same with a tenth more channels, for what the large ones have left
quantize_per_token             a scale for every row instead
rms_norm_..., silu_gate_...    each after the RMS norm of a sum, which is returned too, and after a SiLU gate
..._by_xla                     the same by XLA; all others by the implementation that is taken by itself
"""

import functools
from collections.abc import Callable
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp

from fqjax.bench.spread import Spread, spread_of
from pallas_kernels import quantize_activated, quantize_activations, quantize_normalized, quantize_per_token
from pallas_kernels.quantize.api import Implementation
from pallas_kernels.timing import copies_beyond_cache, rounds

ROWS, CHANNELS = 8192, 4096
PRECEDING = ("rms_norm", "silu_gate")
"""Operations that a kernel does in the same pass before it quantizes."""

Recipe = tuple[jax.Array, jax.Array, jax.Array]
"""Multiplier, source and part."""


class ActivationRow(TypedDict):
    """One entry of the benchmark."""

    kernel: str
    M: int
    K: int
    extra: int
    microseconds: float
    spread: NotRequired[Spread]
    tb_per_s: float


def measure(rows: int = ROWS, channels: int = CHANNELS) -> list[ActivationRow]:
    """One entry a function: ``kernel``, ``M``, ``K``, ``extra`` channels, ``microseconds``, ``tb_per_s`` read and written.

    A tenth of the channels is flattened, padded to a multiple of 128.
    """
    used = channels // 10
    extra = -(-used // 128) * 128
    multiplier = jax.random.uniform(jax.random.key(0), (channels,), minval=1.0, maxval=40.0)
    source = jnp.arange(extra) % used * 10
    part = jnp.where(jnp.arange(extra) < used, 1, 1 << 20)
    none = jnp.zeros(0, jnp.int32)
    recipes = {
        "": (multiplier, none, none),
        "_flatten": (multiplier, source, part),
        "_per_token": (multiplier, none, none),
    }
    functions: dict[str, Callable[..., object]] = {"copy": lambda x: x + 1}
    for how, recipe in recipes.items():
        functions[f"quantize{how}"] = functools.partial(_plain, per_token="token" in how, recipe=recipe)
        for front in PRECEDING:
            fused = functools.partial(_fused, front, per_token="token" in how, recipe=recipe)
            functions[f"{front}_quantize{how}"] = fused
            functions[f"{front}_quantize{how}_by_xla"] = functools.partial(fused, implementation="xla")
    copies = copies_beyond_cache(4 * rows * channels, most=8)
    values = [jax.random.normal(jax.random.key(i), (rows, 2 * channels), jnp.bfloat16) * 4 for i in range(copies)]
    results: list[ActivationRow] = []
    for name, function in functions.items():
        gated = name.startswith("silu_gate")
        inputs = [(x if gated else x[:, :channels],) for x in values]
        if name.startswith("rms_norm"):
            inputs = [(x[:, :channels], x[:, channels:]) for x in values]
        jitted = jax.jit(function)
        spread = spread_of(rounds(jitted, inputs))
        us = spread["median"]
        moved = sum(a.nbytes for a in inputs[0]) + sum(a.nbytes for a in jax.tree.leaves(jitted(*inputs[0])))
        results.append(
            {
                "kernel": name,
                "M": rows,
                "K": channels,
                "extra": extra if "flatten" in name else 0,
                "microseconds": us,
                "spread": spread,
                "tb_per_s": moved / 1e6 / us,
            }
        )
    return results


def _plain(x: jax.Array, *, per_token: bool, recipe: Recipe) -> object:
    if per_token:
        return quantize_per_token(x, recipe[0], qmax=127, width=x.shape[1])
    return quantize_activations(x, *recipe, qmax=127)


def _fused(
    front: str,
    x: jax.Array,
    residual: jax.Array | None = None,
    *,
    recipe: Recipe,
    per_token: bool,
    implementation: Implementation | None = None,
) -> object:
    if front == "rms_norm":
        return quantize_normalized(
            x,
            *recipe,
            epsilon=1e-5,
            residual=residual,
            qmax=127,
            per_token=per_token,
            implementation=implementation,
        )
    return quantize_activated(
        x, *recipe, activation="silu", gated=True, qmax=127, per_token=per_token, implementation=implementation
    )


def markdown(rows: list[ActivationRow]) -> list[str]:
    """The entries as lines of a table."""
    first = rows[0]
    lines = [f"## Activations: {first['M']} x {first['K']}", "", "| | microseconds | TB/s |", "|---|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['kernel']} | {row['microseconds']:.1f} | {row['tb_per_s']:.3g} |")
    by_name = {row["kernel"]: row["microseconds"] for row in rows}
    for name in ("quantize", *(f"{front}_quantize" for front in PRECEDING)):
        ratio = by_name[f"{name}_flatten"] / by_name[name]
        lines += ["", f"`{name}_flatten` takes {ratio:.2f} times as long as `{name}`."]
    return lines
