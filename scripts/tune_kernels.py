"""Times every configuration of the Hopper kernels that is worth considering, and writes the table of the fastest.

Examples:
    python scripts/tune_kernels.py                                  # all shapes; needs an H100 or H200
    python scripts/tune_kernels.py --shapes 4096x4096 --rows 1 16   # some, merged into the table that is there

Every configuration is first compared, bit for bit, with XLA's result; a wrong one ends the run.
"""

import argparse
import dataclasses
import faulthandler
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from fqjax.bench.environment import Record, environment
from fqjax.bench.kernels import close, parse_shape
from pallas_kernels import pack_int4
from pallas_kernels.matmul.hopper import kernels, tuning
from pallas_kernels.matmul.hopper.decode import DecodeConfig
from pallas_kernels.matmul.hopper.decoder import STEP_CODES
from pallas_kernels.matmul.hopper.decoders import DECODERS
from pallas_kernels.matmul.hopper.kernels import Config
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.matmul.kind import Matmul, Operands
from pallas_kernels.shapes import ROWS, SHAPES
from pallas_kernels.timing import copies_beyond_cache, microseconds

HANG_SECONDS = 90
"""After which a kernel is taken to hang."""


def weights(p: Problem, seed: int) -> tuple[jax.Array, ...]:
    """Codes, and the scales of groups if there are any."""
    decoder = p.decoder
    low, high = (-127, 128) if decoder.bits == 8 else (-8, 8)
    codes = jax.random.randint(jax.random.key(seed), (p.n, p.k), low, high, jnp.int8)
    codes = codes if decoder.bits == 8 else jax.jit(pack_int4)(codes)
    if decoder.scale_dtype is None:
        return (codes,)
    scales = jax.random.randint(jax.random.key(seed), (p.k // STEP_CODES, p.n), 1, 16)
    return codes, scales.astype(decoder.scale_dtype)


def tune(m: int, n: int, k: int, kind: str, repeats: int, margin: float) -> Record:
    """The fastest configuration of one shape, and the times of all."""
    decoder = DECODERS[kind]
    bits = decoder.bits
    p = Problem(m=m, n=n, k=k, decoder=decoder, out_dtype=jnp.dtype(jnp.bfloat16), per_channel=True)
    several = [weights(p, seed) for seed in range(copies_beyond_cache(n * k * bits // 8))]
    x = jax.random.randint(jax.random.key(99), (m, k), -127, 128, jnp.int8).astype(decoder.x_dtype)
    w_scale = jax.random.uniform(jax.random.key(98), (n,), minval=0.5, maxval=1.5) / 4096
    x_scale = jnp.full((1,), 0.37 if decoder.x_dtype == jnp.int8 else 1, jnp.float32)
    reference = Matmul(decoder=decoder, out_dtype=p.out_dtype).xla
    xla = jax.jit(lambda *arrays: reference(Operands(*arrays)))
    ordered = decoder.prepare(x)
    operands = [(w, ordered, w_scale, x_scale, *groups) for w, *groups in several]
    by_xla = [(x, w, x_scale[0], w_scale, *groups) for w, *groups in several]
    wanted = xla(*by_xla[0])
    same = jnp.array_equal if decoder.total_dtype == jnp.int32 else close
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    rule = tuning.rule(p)
    most = margin * tuning.estimate(p, rule)
    configs = [config for config in tuning.candidates(p) if tuning.estimate(p, config) <= most]
    lowered = [jax.jit(kernels.build(p, config)).lower(*operands[0]) for config in configs]
    with ThreadPoolExecutor(14) as pool:
        compiled = list(pool.map(lambda stage: stage.compile(), lowered))
    times: list[tuple[float, str, Config | None]] = []
    times.append((microseconds(xla, by_xla, repeats=repeats), "xla", None))
    for config, f in zip(configs, compiled, strict=True):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        if not same(f(*operands[0]), wanted):
            sys.exit(f"tune_kernels: wrong result for {p} with {config}")
        kernel = "decode" if isinstance(config, DecodeConfig) else "gemm"
        times.append((microseconds(f, operands, repeats=repeats), kernel, config))
    faulthandler.cancel_dump_traceback_later()
    times.sort(key=lambda row: row[0])
    us, kernel, config = times[0]
    by_rule = next(us for us, _, c in times if c == rule)
    print(
        f"{kind} {m}x{n}x{k}: {us:.2f} us, {2e-6 * m * n * k / us:.0f} TOPS, {n * k * bits / 8e6 / us:.2f} TB/s, "
        f"rule {by_rule / us:.2f} x; " + " ".join(f"[{t:.2f} {brief(c)}]" for t, _, c in times[:9]),
        flush=True,
    )
    entry = {
        "bits": bits,
        "groups": decoder.kind,
        "m": m,
        "n": n,
        "k": k,
        "kernel": kernel,
        "microseconds": round(us, 2),
    }
    return entry | {"config": dataclasses.asdict(config) if config else {}}


def key_of(entry: Record) -> tuple[object, ...]:
    """Key of an entry of the table, in the order in which the table is written."""
    return entry["bits"], entry.get("groups") or "", entry["m"], entry["n"], entry["k"]


def brief(config: Config | None) -> str:
    return ",".join(str(value) for value in dataclasses.astuple(config)) if config else "xla"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", metavar="NxK")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--kinds", nargs="*", choices=list(DECODERS), default=list(DECODERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--margin", type=float, default=1.12, help="how far above the least estimate to try")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further shape after so many seconds")
    parser.add_argument("--out", type=Path, help="the table; that of the package by default")
    a = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("tune_kernels: needs an NVIDIA GPU")
    about = environment()
    out = a.out or tuning.table_file(about["device"])
    table = json.loads(out.read_text()) if out.is_file() else {"entries": []}
    entries = {key_of(e): e for e in table["entries"]}
    shapes = [parse_shape(s) for s in a.shapes or ()] or [s for layers in SHAPES.values() for s in layers.values()]
    begin = time.perf_counter()
    for n, k in shapes:
        for kind in a.kinds:
            for m in a.rows:
                if time.perf_counter() - begin > a.seconds:
                    continue
                entry = tune(m, n, k, kind, a.repeats, a.margin)
                entries[key_of(entry)] = entry
        table = about | {"entries": [entries[key] for key in sorted(entries)]}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
