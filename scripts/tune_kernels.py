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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import pack_int4, reference, tuning
from pallas_kernels.hopper import gemm
from pallas_kernels.timing import copies_beyond_cache, microseconds

SHAPES = {
    "Llama-3-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Llama-3-70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "OPT-30B": ((21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672)),
}
SLOWER = 1.5  # Configurations that the rule thinks this much slower than the best are not tried.
HANG = 60  # Seconds after which a kernel is taken to hang.
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)


def problem(m: int, n: int, k: int, bits: Any) -> gemm.Problem:
    return gemm.Problem(
        m=m, n=n, k=k, bits=bits, per_token=False, per_channel=True, bias=False, out_dtype=jnp.dtype("bfloat16")
    )


def weights(n: int, k: int, bits: int, seed: int) -> jax.Array:
    low, high = (-127, 128) if bits == 8 else (-8, 8)
    codes = jax.random.randint(jax.random.key(seed), (n, k), low, high, jnp.int8)
    return codes if bits == 8 else jax.jit(pack_int4)(codes)


def brief(config: tuning.Config) -> str:
    return ",".join(str(value) for value in dataclasses.astuple(config))


def tune(m: int, n: int, k: int, bits: int, repeats: int) -> dict[str, Any]:
    """The fastest configuration of one shape, and the times of all."""
    p = problem(m, n, k, bits)
    several = [weights(n, k, bits, seed) for seed in range(copies_beyond_cache(n * k * bits // 8))]
    x = jax.random.randint(jax.random.key(99), (m, k), -127, 128, jnp.int8)
    w_scale = jax.random.uniform(jax.random.key(98), (n,), minval=0.5, maxval=1.5) / 4096
    x_scale = jnp.full((1,), 0.37, jnp.float32)
    expected = getattr(reference, f"int{bits}_matmul")
    wanted = jax.jit(expected)(x, several[0], x_scale[0], w_scale)
    times = []
    candidates = sorted(tuning.candidates(p), key=lambda config: tuning.estimate(p, config))
    for config in candidates:
        if tuning.estimate(p, config) > SLOWER * tuning.estimate(p, candidates[0]):
            break
        faulthandler.dump_traceback_later(HANG, exit=True)
        f = jax.jit(tuning.build(p, config))
        if not jnp.array_equal(f(several[0], x, w_scale, x_scale), wanted):
            print(f"  WRONG {p} {config}", flush=True)
            continue
        us = microseconds(f, [(w, x, w_scale, x_scale) for w in several], repeats=repeats)
        times.append((us, "decode" if isinstance(config, tuning.DecodeConfig) else "gemm", config))
    faulthandler.cancel_dump_traceback_later()
    times.sort(key=lambda row: row[0])
    us, kernel, config = times[0]
    default = next(us for us, _, c in times if c == tuning.rule(p))
    print(
        f"{bits} bits {m}x{n}x{k}: {us:.2f} us, {2e-6 * m * n * k / us:.0f} TOPS, {n * k * bits / 8e6 / us:.2f} TB/s "
        f"{config}; rule {default / us:.2f} x; " + " ".join(f"[{t:.2f} {brief(c)}]" for t, _, c in times),
        flush=True,
    )
    return {
        "bits": bits,
        "m": m,
        "n": n,
        "k": k,
        "kernel": kernel,
        "config": dataclasses.asdict(config),
        "microseconds": round(us, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", metavar="NxK")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--bits", nargs="*", type=int, default=(4, 8))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further shape after so many seconds")
    parser.add_argument("--out", type=Path, help="the table; that of the package by default")
    a = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("tune_kernels: needs an NVIDIA GPU")
    device = jax.devices()[0].device_kind
    out = a.out or Path(tuning.__file__).parent / "tuning" / f"{device.lower().replace(' ', '_')}.json"
    table = json.loads(out.read_text()) if out.is_file() else {"entries": []}
    entries = {(e["bits"], e["m"], e["n"], e["k"]): e for e in table["entries"]}
    named = [tuple(int(v) for v in s.split("x")) for s in a.shapes] if a.shapes else None
    begin = time.perf_counter()
    for n, k in named or [shape for model in SHAPES.values() for shape in model]:
        for bits in a.bits:
            for m in a.rows:
                if time.perf_counter() - begin > a.seconds:
                    continue
                entries[bits, m, n, k] = tune(m, n, k, bits, a.repeats)
        table = {"device": device, "jax": jax.__version__, "entries": [entries[key] for key in sorted(entries)]}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
