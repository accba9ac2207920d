"""Which kernel and which tiles for which shape: a measured table, and a rule for shapes not in it.

``tables/<device>.json`` is written by ``scripts/tune_kernels.py`` on the device it is named after.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path

from pallas_kernels.device import cached
from pallas_kernels.matmul.hopper import decode, ragged
from pallas_kernels.matmul.hopper.decode import DecodeConfig
from pallas_kernels.matmul.hopper.decoder import STEP_CODES
from pallas_kernels.matmul.hopper.gemm import GemmConfig
from pallas_kernels.matmul.hopper.kernels import Config, fits
from pallas_kernels.matmul.hopper.problem import DECODE_ROWS, Problem

MULTIPROCESSORS = 132
NEIGHBOUR_SHARE = 1 / 8
"""How much more or fewer input channels a shape may have that takes the configuration of another."""
GATED_CONFIG = DecodeConfig(splits=1, warpgroups=2)
"""The fastest with a gate of those tried on an H200 in November 2026, with as many slots as :func:`_with_gate` says;
``scripts/tune_decoding.py`` tries them again."""
GATE_MICROSECONDS = 1.5
"""About what it saved there, in a model, to have a kernel less."""
RING_SLOTS = (12, 8, 5)
"""Of the kernel for few rows, that are tried: on an H100, 12 were often slower than 8."""

Table = dict[tuple[int, str | None, int, int], dict[int, Config | None]]
"""(bits of a code, kind of the groups' scales, n, k) to rows to configuration; None where XLA is faster."""


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
        if not isinstance(config, DecodeConfig) or p.m <= DECODE_ROWS:
            return config
    limit = p.decoder.rows_for_xla
    return None if limit is not None and p.m >= limit and not p.experts else rule(p)


def _with_gate(p: Problem, device: str) -> DecodeConfig | None:
    plain = dataclasses.replace(p, gate=None)
    without = choose(plain, device)
    if not isinstance(without, DecodeConfig):
        return None
    stages = 12 if decode.token_tile(p.m) > 16 else 5 if p.decoder.in_registers else 8
    config = dataclasses.replace(GATED_CONFIG, stages=stages, fold=without.fold)
    if not fits(p, config):
        return None
    fills = p.n // (64 * config.warpgroups) >= MULTIPROCESSORS
    return config if fills or estimate(p, config) <= estimate(plain, without) + GATE_MICROSECONDS else None


def _measured(p: Problem, device: str) -> dict[int, Config | None]:
    """Rows to configuration of the problem's shape, by the device's own table and, for rows that it lacks, by the others."""
    found: dict[int, Config | None] = {}
    for name in (device, *_devices()):
        found = _in_table(p, _table(name)) | found
    return found


def _in_table(p: Problem, table: Table) -> dict[int, Config | None]:
    """Rows to configuration of the measured shape that is the problem's, and, kernels alone, of those near it."""
    layer = p.decoder.bits, p.decoder.kind, p.n
    found = dict(table.get((*layer, p.k), {}))
    near = [k for *other, k in table if tuple(other) == layer and abs(k - p.k) <= NEIGHBOUR_SHARE * k]
    for k in sorted(near, key=lambda k: abs(k - p.k)):
        rows = table[*layer, k]
        found = {m: config for m, config in rows.items() if config is not None and fits(p, config)} | found
    return found


def table_file(device: str) -> Path:
    """Where the measured configurations of a device are, whether or not there are any."""
    return Path(__file__).parents[2] / "tables" / (device.lower().replace(" ", "_") + ".json")


@cached
def _devices() -> list[str]:
    """Those that have a table, as their files are named."""
    return sorted(file.stem for file in table_file("").parent.glob("*.json"))


@cached
def _table(name: str) -> Table:
    """The table of a device."""
    file = table_file(name)
    table: Table = {}
    if file.is_file():
        for entry in json.loads(file.read_text())["entries"]:
            shape = (entry["bits"], entry.get("groups"), entry["n"], entry["k"])
            table.setdefault(shape, {})[entry["m"]] = _config(entry["kernel"], entry["config"])
    return table


def _config(kernel: str, fields: dict[str, int | bool]) -> Config | None:
    """A configuration from its entry in a table; None for XLA's."""
    made = {"gemm": GemmConfig, "decode": DecodeConfig}.get(kernel)
    return made(**fields) if made else None  # pyright: ignore[reportArgumentType]


@cached
def rule(p: Problem) -> Config:
    """The configuration that a simple model of the time calls fastest."""
    return min(candidates(p), key=lambda config: (estimate(p, config), crowding(p, config)))


def candidates(p: Problem) -> list[Config]:
    """Configurations worth considering."""
    found: list[Config] = []
    if p.rows_at_once <= DECODE_ROWS:
        for warpgroups, splits, groups in itertools.product(range(1, 6), (1, 2, 3, 4, 5, 8), (1, 2)):
            if splits == groups == 1 or (splits * groups <= p.steps // 2 and warpgroups * groups <= 5):
                for fold, stages in itertools.product((False, True)[: 1 + p.decoder.folds], RING_SLOTS):
                    found.append(
                        DecodeConfig(splits=splits, warpgroups=warpgroups, groups=groups, stages=stages, fold=fold)
                    )
    else:
        for warpgroups, tokens in RATES:
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


RATES = {
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
"""Share of the best tile's rate that a tile of (warpgroups, tokens) has with 4-bit and with 8-bit weights, as
``scripts/tune_kernels.py`` printed for 4096 rows on an H200, in November 2026, rounded."""
ONE_WAVE_RATES = {(1, 128): (0.83, 0.88), (2, 64): (0.56, 0.83)}
"""The same where every multiprocessor has one tile at most, and it is another: from what was printed for 256 rows."""


FLUSHED_SHARE = 0.68
"""Of a tile's rate that remains where every group is flushed, so far for all tiles alike."""


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
        blocks *= ragged.tiles_expected(p, tokens)
        ctas = blocks * config.splits
        room = MULTIPROCESSORS if config.splits <= 2 else 112  # Large clusters do not fit everywhere.
        at_once = min(ctas, room)
        code_bytes = p.decoder.bits / 8 + p.decoder.slot_bytes(1) / (STEP_CODES * p.decoder.halves)
        weights = 64 * config.warpgroups * p.k * code_bytes / config.splits  # bytes that one CTA reads
        from_memory = weights * at_once / 4.46e6
        from_cache = (weights + tokens * p.k / config.splits) / min(7.6e6 / at_once, 7.5e4)
        sent = 256 * config.warpgroups * config.groups * tokens * (1 - 1 / units)
        exchange = 0.15 + sent / 1.35e4 - 0.35 * (config.groups > 1) if config.splits > 1 else 0.0
        folding = 1.05 if config.fold and tokens <= 16 else 1
        return 2.85 + -(-ctas // at_once) * (folding * max(from_memory, from_cache) + exchange)
    tiles = -(-blocks // config.cluster) * ragged.tiles_expected(p, config.tokens)  # a CTA of each cluster
    waves = -(-tiles // (MULTIPROCESSORS // config.cluster))
    macs = 64 * config.warpgroups * config.tokens * p.k
    tile = config.warpgroups, config.tokens
    share = (ONE_WAVE_RATES if waves == 1 and tile in ONE_WAVE_RATES else RATES)[tile][not p.decoder.in_registers]
    if p.decoder.flushed:
        share *= FLUSHED_SHARE
    if config.cluster > 1:  # Sharing pays where a tile is large; a small one waits for the other CTA.
        share *= 1.01 if config.tokens == 256 else 0.98 if p.decoder.in_registers else 0.9
    return 3 + waves * (macs / (4096 * 1650 * share) + 0.3)
