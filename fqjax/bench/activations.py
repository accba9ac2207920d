"""What quantizing and flattening activations costs, alone and with what a model has in front of a linear layer.

copy                           reads and writes as many bfloat16 values, for scale
quantize                       static INT8 quantization
quantize_flatten               the same with a tenth more channels, for what the large ones have left
quantize_per_token             a scale for every row instead
rms_norm_..., silu_gate_...    each behind the RMS norm of a sum, which is returned too, and behind a SiLU gate
..._by_xla                     the same by XLA; all others by the implementation that is taken by itself
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import quantize_activated, quantize_activations, quantize_normalized, quantize_per_token
from pallas_kernels.timing import copies_beyond_cache, microseconds

ROWS, CHANNELS = 8192, 4096
IN_FRONT = ("rms_norm", "silu_gate")


def measure(rows: int = ROWS, channels: int = CHANNELS) -> list[dict[str, Any]]:
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
    functions: dict[str, Callable[[jax.Array], Any]] = {"copy": lambda x: x + 1}
    for how, recipe in recipes.items():
        plain: Any = functools.partial(_plain, per_token="token" in how, recipe=recipe)
        functions[f"quantize{how}"] = plain
        for front in IN_FRONT:
            in_front: Any = functools.partial(_in_front, front, per_token="token" in how, recipe=recipe)
            functions[f"{front}_quantize{how}"] = in_front
            functions[f"{front}_quantize{how}_by_xla"] = functools.partial(in_front, implementation="xla")
    copies = copies_beyond_cache(4 * rows * channels, most=8)
    values = [jax.random.normal(jax.random.key(i), (rows, 2 * channels), jnp.bfloat16) * 4 for i in range(copies)]
    results = []
    for name, function in functions.items():
        gated = name.startswith("silu_gate")
        inputs = [(x if gated else x[:, :channels],) for x in values]
        if name.startswith("rms_norm"):
            inputs = [(x[:, :channels], x[:, channels:]) for x in values]
        jitted = jax.jit(function)
        us = microseconds(jitted, inputs)
        moved = sum(a.nbytes for a in inputs[0]) + sum(a.nbytes for a in jax.tree.leaves(jitted(*inputs[0])))
        row = {"kernel": name, "M": rows, "K": channels, "extra": extra if "flatten" in name else 0}
        results.append(row | {"microseconds": us, "tb_per_s": moved / 1e6 / us})
    return results


def _plain(x: jax.Array, *, per_token: bool, recipe: Any) -> Any:
    if per_token:
        return quantize_per_token(x, recipe[0], qmax=127, width=x.shape[1])
    return quantize_activations(x, *recipe, qmax=127)


def _in_front(front: str, x: jax.Array, residual: jax.Array | None = None, *, recipe: Any, **kinds: Any) -> Any:
    if front == "rms_norm":
        return quantize_normalized(x, *recipe, epsilon=1e-5, residual=residual, qmax=127, **kinds)
    return quantize_activated(x, *recipe, activation="silu", gated=True, qmax=127, **kinds)


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The entries as lines of a table."""
    first = rows[0]
    lines = [f"## Activations: {first['M']} x {first['K']}", "", "| | microseconds | TB/s |", "|---|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['kernel']} | {row['microseconds']:.1f} | {row['tb_per_s']:.3g} |")
    by_name = {row["kernel"]: row["microseconds"] for row in rows}
    for name in ("quantize", *(f"{front}_quantize" for front in IN_FRONT)):
        ratio = by_name[f"{name}_flatten"] / by_name[name]
        lines += ["", f"`{name}_flatten` takes {ratio:.2f} times as long as `{name}`."]
    return lines
