"""What quantizing and flattening activations costs, alone and behind what a model has in front of a linear layer.

copy                 reads and writes as many bfloat16 values, for scale
quantize             static INT8 quantization
quantize_flatten     the same with a tenth more channels, for what the large ones have left
rms_norm_...         both behind an RMS norm: quantize_normalized, by the fastest implementation
xla_rms_norm_...     the same by XLA
gate                 silu(gate) * up, in bfloat16
gate_quantize...     the gate and quantization, which XLA makes one kernel of
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import quantize_activations, quantize_normalized
from pallas_kernels.timing import copies_beyond_cache, microseconds

ROWS, CHANNELS = 8192, 4096


def measure(rows: int = ROWS, channels: int = CHANNELS) -> list[dict[str, Any]]:
    """One entry a function: ``kernel``, ``M``, ``K``, ``extra`` channels, ``microseconds``, ``tb_per_s`` read and written.

    A tenth of the channels is flattened, padded to a multiple of 128.
    """
    used = channels // 10
    extra = -(-used // 128) * 128
    key = jax.random.key(0)
    multiplier = jax.random.uniform(key, (channels,), minval=1.0, maxval=40.0)
    source = jnp.arange(extra) % used * 10
    part = jnp.where(jnp.arange(extra) < used, 1, 1 << 20)
    none = jnp.zeros(0, jnp.int32)
    plain, flat = (multiplier, none, none), (multiplier, source, part)
    quantize = functools.partial(quantize_activations, qmax=127)
    normalize = functools.partial(quantize_normalized, qmax=127, epsilon=1e-5)
    functions: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "copy": lambda x, _: x + 1,
        "quantize": lambda x, _: quantize(x, *plain),
        "quantize_flatten": lambda x, _: quantize(x, *flat),
        "rms_norm_quantize": lambda x, _: normalize(x, *plain),
        "rms_norm_quantize_flatten": lambda x, _: normalize(x, *flat),
        "xla_rms_norm_quantize": lambda x, _: normalize(x, *plain, implementation="xla"),
        "xla_rms_norm_quantize_flatten": lambda x, _: normalize(x, *flat, implementation="xla"),
        "gate": lambda x, up: jax.nn.silu(x) * up,
        "gate_quantize": lambda x, up: quantize(jax.nn.silu(x) * up, *plain),
        "gate_quantize_flatten": lambda x, up: quantize(jax.nn.silu(x) * up, *flat),
    }
    copies = copies_beyond_cache(4 * rows * channels, most=8)
    values = [jax.random.normal(jax.random.key(i), (rows, channels), jnp.bfloat16) * 4 for i in range(2 * copies)]
    inputs = list(zip(values[::2], values[1::2], strict=True))
    results = []
    for name, function in functions.items():
        jitted = jax.jit(function)
        us = microseconds(jitted, inputs)
        read = values[0].nbytes * (2 if name.startswith("gate") else 1)
        moved = read + jitted(*inputs[0]).nbytes
        row = {"kernel": name, "M": rows, "K": channels, "extra": extra if "flatten" in name else 0}
        results.append(row | {"microseconds": us, "tb_per_s": moved / 1e6 / us})
    return results


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The entries as lines of a table."""
    first = rows[0]
    lines = [f"## Activations: {first['M']} x {first['K']}", "", "| | microseconds | TB/s |", "|---|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['kernel']} | {row['microseconds']:.1f} | {row['tb_per_s']:.3g} |")
    by_name = {row["kernel"]: row["microseconds"] for row in rows}
    for name in ("quantize", "rms_norm_quantize", "gate_quantize"):
        lines += [
            "",
            f"`{name}_flatten` takes {by_name[name + '_flatten'] / by_name[name]:.2f} times as long as `{name}`.",
        ]
    return lines
