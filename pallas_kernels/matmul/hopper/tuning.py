"""Which kernel and which tiles for which shape: a measured table, and a rule for shapes not in it.

``tables/<device>.json`` is written by ``scripts/tune_kernels.py`` on the device it is named after.
"""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.matmul.hopper import decode, gemm
from pallas_kernels.matmul.hopper import ragged as experts
from pallas_kernels.matmul.hopper.decode import DecodeConfig
from pallas_kernels.matmul.hopper.gemm import GemmConfig
from pallas_kernels.matmul.hopper.problem import MOST_TOKENS, Problem

Config = GemmConfig | DecodeConfig
WEIGHT_ONLY_ROWS = 2048
"""From so many rows on XLA, which dequantizes first, multiplies faster than the kernel for weights alone: between 1024, where
it does not, and 4096 rows by what ``scripts/tune_kernels.py`` printed on an H100 in November 2026."""
MULTIPROCESSORS = 132
NEAR = 1 / 8
"""How much more or fewer input channels a shape may have that takes the configuration of another."""
GATED = DecodeConfig(splits=1, warpgroups=2)
"""The fastest with a gate of those tried on an H200 in November 2026, with as many slots as :func:`_with_gate` says;
``scripts/tune_decoding.py`` tries them again."""
SAVED_BY_GATE = 1.5
"""About how many microseconds it saved there, in a model, to have a kernel less."""
STAGES = (12, 8, 5)
"""Slots of the ring of the kernel for few rows that are tried: on an H100, 12 were often slower than 8."""


def choose(p: Problem, device: str) -> Config | None:
    """How to compute a problem; None where XLA is faster.

    Measured shapes take what was fastest for the nearest number of rows from ``p.m`` on, or for half as many at least.  Where
    so many rows were not measured, the shape with as many output channels and nearly as many input channels counts, as
    flattened layers have, and where the device itself was not measured, another Hopper GPU.  Other shapes take what the rule
    says, and so do all problems with experts.

    With a gate, K cannot be split.  Where that would cost more than the kernel that a gate saves, two are faster: None.
    """
    if p.gate is not None:
        return _with_gate(p, device)
    measured = {} if p.experts else _measured(p, device)
    nearest = min((m for m in measured if m >= p.m), default=max(measured, default=0))
    if 2 * nearest >= p.m:
        config = measured[nearest]
        if not isinstance(config, DecodeConfig) or p.m <= MOST_TOKENS:
            return config
    return None if p.weight_only and p.m >= WEIGHT_ONLY_ROWS and not p.experts else rule(p)


def _with_gate(p: Problem, device: str) -> DecodeConfig | None:
    plain = dataclasses.replace(p, gate=None)
    without = choose(plain, device)
    if not isinstance(without, DecodeConfig):
        return None
    stages = 12 if decode.token_tile(p.m) > 16 else 5 if p.bits == 4 else 8
    config = dataclasses.replace(GATED, stages=stages, fold=without.fold)
    if not fits(p, config):
        return None
    fills = p.n // (64 * config.warpgroups) >= MULTIPROCESSORS
    return config if fills or estimate(p, config) <= estimate(plain, without) + SAVED_BY_GATE else None


def _measured(p: Problem, device: str) -> dict[int, Config | None]:
    """Rows to configuration of the problem's shape, by the device's own table and, for rows that it lacks, by the others."""
    found: dict[int, Config | None] = {}
    for name in (device, *_devices()):
        found = _in_table(p, _table(name)) | found
    return found


def _in_table(p: Problem, table: dict[Any, dict[int, Config | None]]) -> dict[int, Config | None]:
    """Rows to configuration of the measured shape that is the problem's, and, kernels alone, of those near it."""
    found = dict(table.get((p.bits, p.kind, p.n, p.k), {}))
    near = [k for bits, kind, n, k in table if (bits, kind, n) == (p.bits, p.kind, p.n) and abs(k - p.k) <= NEAR * k]
    for k in sorted(near, key=lambda k: abs(k - p.k)):
        rows = table[p.bits, p.kind, p.n, k]
        found = {m: config for m, config in rows.items() if config is not None and fits(p, config)} | found
    return found


def table_file(device: str) -> Path:
    """Where the measured configurations of a device are, whether or not there are any."""
    return Path(__file__).parents[2] / "tables" / (device.lower().replace(" ", "_") + ".json")


@functools.cache
def _devices() -> list[str]:
    """Those that have a table, as their files are named."""
    return sorted(file.stem for file in table_file("").parent.glob("*.json"))


@functools.cache
def _table(device: str) -> dict[tuple[int, str | None, int, int], dict[int, Config | None]]:
    """(bits, kind of groups, n, k) to rows to configuration."""
    file = table_file(device)
    table: dict[tuple[int, str | None, int, int], dict[int, Config | None]] = {}
    if file.is_file():
        for entry in json.loads(file.read_text())["entries"]:
            kind = {"gemm": GemmConfig, "decode": DecodeConfig}.get(entry["kernel"])
            shape = (entry["bits"], entry.get("groups"), entry["n"], entry["k"])
            table.setdefault(shape, {})[entry["m"]] = kind(**entry["config"]) if kind else None
    return table


@functools.cache
def rule(p: Problem) -> Config:
    """The configuration that a simple model of the time calls fastest."""
    return min(candidates(p), key=lambda config: (estimate(p, config), crowding(p, config)))


def candidates(p: Problem) -> list[Config]:
    """Configurations worth considering."""
    found: list[Config] = []
    if p.rows_at_once <= MOST_TOKENS:
        for warpgroups, splits, groups in itertools.product(range(1, 6), (1, 2, 3, 4, 5, 8), (1, 2)):
            if splits == groups == 1 or (splits * groups <= p.steps // 2 and warpgroups * groups <= 5):
                for fold, stages in itertools.product((False, True)[: 1 + p.folded], STAGES):
                    kinds = {"splits": splits, "warpgroups": warpgroups, "groups": groups, "fold": fold}
                    found.append(DecodeConfig(stages=stages, **kinds))
    else:
        for warpgroups, tokens in EFFICIENCY:
            for cluster in (1, 2):
                found.append(GemmConfig(tokens=tokens, warpgroups=warpgroups, cluster=cluster))
    unlike: dict[Config, Config] = {}
    for config in found:
        if fits(p, config):
            unlike.setdefault(_with_its_ring(p, config), config)
    return list(unlike.values())


def _with_its_ring(p: Problem, config: Config) -> Config:
    """The configuration with as many slots as its kernel has: where these are the same, the kernel is."""
    return dataclasses.replace(config, stages=decode.slots(p, config)) if isinstance(config, DecodeConfig) else config


def build(p: Problem, config: Config) -> Any:
    """The kernel that a configuration is for: a function of (w, x, w_scale, x_scale, scales of groups and bias if any)."""
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
    (2, 192): (0.95, 0.97),
    (2, 128): (0.98, 0.85),
    (3, 128): (0.92, 0.97),
    (3, 96): (0.94, 0.91),
    (4, 64): (0.87, 0.80),
    (3, 64): (0.78, 0.76),
    (2, 64): (0.56, 0.60),
    (1, 128): (0.58, 0.51),
    (1, 64): (0.41, 0.38),
}
"""What share of the best tile's rate a tile of (warpgroups, tokens) has with 4-bit and with 8-bit weights: what
``scripts/tune_kernels.py`` printed for 4096 rows on an H200, in November 2026, rounded."""
ONE_WAVE = {(1, 128): (0.83, 0.88), (2, 64): (0.56, 0.83)}
"""The same where every multiprocessor has one tile at most, and it is another: from what was printed for 256 rows."""


FLUSHED = 0.68
"""What flushing every group leaves of a tile's rate, so far for all tiles alike."""


def crowding(p: Problem, config: Config) -> float:
    """How far a ring for few rows is from the bytes in flight that were best on an H100, 64 KB a CTA; in powers of two."""
    if not isinstance(config, DecodeConfig):
        return 0.0
    return abs(math.log2(decode.slots(p, config) * config.warpgroups / 8))


def estimate(p: Problem, config: Config) -> float:
    """Microseconds, roughly, on an H200: fitted to what ``scripts/tune_kernels.py`` printed for seven shapes."""
    blocks = -(-p.n // (64 * config.warpgroups))
    if isinstance(config, DecodeConfig):
        tokens, units = decode.token_tile(p.rows_at_once), config.splits * config.groups
        blocks *= experts.tiles_expected(p, tokens)
        ctas = blocks * config.splits
        room = MULTIPROCESSORS if config.splits <= 2 else 112  # Large clusters do not fit everywhere.
        at_once = min(ctas, room)
        code_bytes = p.bits / 8 + (jnp.dtype(p.group_dtype).itemsize / 128 if p.grouped else 0)
        weights = 64 * config.warpgroups * p.k * code_bytes / config.splits  # bytes that one CTA reads
        from_memory = weights * at_once / 4.46e6
        from_cache = (weights + tokens * p.k / config.splits) / min(7.6e6 / at_once, 7.5e4)
        sent = 256 * config.warpgroups * config.groups * tokens * (1 - 1 / units)
        exchange = 0.15 + sent / 1.35e4 - 0.35 * (config.groups > 1) if config.splits > 1 else 0.0
        folding = 1.05 if config.fold and tokens <= 16 else 1
        return 2.85 + -(-ctas // at_once) * (folding * max(from_memory, from_cache) + exchange)
    tiles = -(-blocks // config.cluster) * experts.tiles_expected(p, config.tokens)  # a CTA of each cluster
    waves = -(-tiles // (MULTIPROCESSORS // config.cluster))
    macs = 64 * config.warpgroups * config.tokens * p.k
    tile = config.warpgroups, config.tokens
    share = (ONE_WAVE if waves == 1 and tile in ONE_WAVE else EFFICIENCY)[tile][p.bits == 8]
    if p.flushed:
        share *= FLUSHED
    if config.cluster > 1:  # Sharing pays where a tile is large; a small one waits for the other CTA.
        share *= 1.01 if config.tokens == 256 else 0.98 if p.bits == 4 else 0.9
    return 3 + waves * (macs / (4096 * 1650 * share) + 0.3)
