"""Which kernel and which tiles for which shape: a measured table, and a rule for shapes not in it.

``tables/<device>.json`` is written by ``scripts/tune_kernels.py`` on the device it is named after.
"""

import functools
import json
from pathlib import Path
from typing import Any

from pallas_kernels.hopper import decode, gemm
from pallas_kernels.hopper.decode import DecodeConfig
from pallas_kernels.hopper.gemm import GemmConfig, Problem

Config = GemmConfig | DecodeConfig
MULTIPROCESSORS = 132


def choose(p: Problem, device: str) -> Config | None:
    """How to compute a problem; None where XLA is faster.

    Measured shapes take what was fastest for the nearest number of rows from ``p.m`` on, others what the rule says.
    """
    measured = _table(device).get((p.bits, p.n, p.k))
    if measured:
        config = measured[min((m for m in measured if m >= p.m), default=max(measured))]
        if not isinstance(config, DecodeConfig) or p.m <= decode.MOST_TOKENS:
            return config
    return rule(p)


def table_file(device: str) -> Path:
    """Where the measured configurations of a device are, whether or not there are any."""
    return Path(__file__).parent / "tables" / (device.lower().replace(" ", "_") + ".json")


@functools.cache
def _table(device: str) -> dict[tuple[int, int, int], dict[int, Config | None]]:
    """(bits, n, k) to rows to configuration."""
    file = table_file(device)
    table: dict[tuple[int, int, int], dict[int, Config | None]] = {}
    if file.is_file():
        for entry in json.loads(file.read_text())["entries"]:
            kind = {"gemm": GemmConfig, "decode": DecodeConfig}.get(entry["kernel"])
            shape = (entry["bits"], entry["n"], entry["k"])
            table.setdefault(shape, {})[entry["m"]] = kind(**entry["config"]) if kind else None
    return table


def rule(p: Problem) -> Config:
    """The configuration that a simple model of the time calls fastest."""
    return min(candidates(p), key=lambda config: estimate(p, config))


def candidates(p: Problem) -> list[Config]:
    """Configurations worth considering."""
    found: list[Config] = []
    if p.m <= decode.MOST_TOKENS:
        for warpgroups in range(1, 6):
            for splits in (1, 2, 3, 4, 5, 8):
                if splits == 1 or splits <= p.steps // 2:
                    found.append(DecodeConfig(splits=splits, warpgroups=warpgroups))
    else:
        for warpgroups, tokens in EFFICIENCY:
            found.append(GemmConfig(tokens=tokens, warpgroups=warpgroups))
    return [config for config in found if fits(p, config)]


def build(p: Problem, config: Config) -> Any:
    """The kernel that a configuration is for, a function of (w, x, w_scale, x_scale, bias if any)."""
    return decode.build(p, config) if isinstance(config, DecodeConfig) else gemm.build(p, config)


def fits(p: Problem, config: Config) -> bool:
    """Whether a kernel can be built with this configuration."""
    try:
        build(p, config)
    except (NotImplementedError, ValueError):
        return False
    return True


EFFICIENCY = {
    (2, 256): (1.00, 1.00),
    (2, 192): (0.95, 0.99),
    (2, 128): (0.98, 0.85),
    (3, 128): (0.92, 1.00),
    (3, 96): (0.96, 0.92),
    (4, 64): (0.87, 0.83),
    (3, 64): (0.78, 0.81),
    (2, 64): (0.56, 0.60),
    (1, 128): (0.58, 0.51),
    (1, 64): (0.41, 0.38),
}
"""What share of the best tile's rate a tile of (warpgroups, tokens) has with 4-bit and with 8-bit weights: what
``scripts/tune_kernels.py`` printed for 4096 rows on an H200, in November 2026, rounded."""


def estimate(p: Problem, config: Config) -> float:
    """Microseconds, roughly, on an H200."""
    blocks = -(-p.n // (64 * config.warpgroups))
    if isinstance(config, DecodeConfig):
        ctas = blocks * config.splits
        room = MULTIPROCESSORS if config.splits <= 2 else 112  # Larger clusters do not find room everywhere.
        at_once = min(ctas, room)
        weights = 64 * config.warpgroups * p.k * p.bits / 8 / config.splits
        activations = decode.token_tile(p.m) * p.k / config.splits
        from_memory = weights / min(3.8e6 / at_once, 4.5e4)
        from_cache = (weights + activations) / min(6e6 / at_once, 8e4)
        sent = 256 * config.warpgroups * decode.token_tile(p.m) * (1 - 1 / config.splits)
        exchange = 0.3 + sent / 2e4 if config.splits > 1 else 0.0
        return 2.1 + -(-ctas // at_once) * max(from_memory, from_cache) + exchange
    tiles = blocks * -(-p.m // config.tokens)
    macs = 64 * config.warpgroups * config.tokens * p.k
    rate = 4096 * 1650 * EFFICIENCY[config.warpgroups, config.tokens][p.bits == 8]
    return 3 + -(-tiles // MULTIPROCESSORS) * (macs / rate + 0.3)
