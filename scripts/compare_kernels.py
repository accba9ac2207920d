"""Compares the machine code of the kernels with that of another checkout: what a change that should change nothing must keep.

Examples:
    python scripts/compare_kernels.py ../before                                  # all measured configurations
    python scripts/compare_kernels.py ../before --only "matmul.*x4096x" --stride 4     # every fourth of some
    python scripts/compare_kernels.py ../before --keep before.json               # and keeps what the other one gave, to be
    python scripts/compare_kernels.py before.json                                # compared with again

Every case is compiled for an H200, by the configuration that the table measured on one has for it.  That needs JAX's CUDA
plugin, but no GPU.  PTX is compared without positions in source files and without the names of functions.  Exits with 1 if
any case differs.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax

ROWS = (1, 16, 64, 256, 1024, 4096)
MATMULS: dict[str, dict[str, str | bool]] = {
    "int8": {},
    "int4": {},
    "integer": {"scales": "int16"},
    "integer32": {"scales": "int32"},
    "float": {"scales": "float32"},
    "folded": {"scales": "int16", "folded": True},
    "weight_only": {"scales": "float32", "weight_only": True},
}
"""Kind of weight to the dtype of its groups' scales, and what else is said of them."""
EXPERTS = 8
"""Experts of a product whose rows belong to several."""


class Case(NamedTuple):
    """Something to compile: a function, and the shapes and dtypes of its arguments."""

    name: str
    function: Callable[..., object]
    arguments: tuple[object, ...]


def compile_cases(pattern: str, stride: int) -> None:
    """Compiles this checkout's kernels, and prints a name and a digest of the PTX for each case."""
    dump = Path(tempfile.mkdtemp())
    os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTX": "1"}
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_emitter_re=.* --xla_gpu_dump_llvmir"
    from tests.kernels import ahead_of_time

    if not ahead_of_time.HAS_PLUGIN:
        sys.exit("compare_kernels: needs the package jax-cuda13-plugin")
    pretend_to_have_an_h200()
    chosen = [case for case in cases() if re.search(pattern, case.name)][::stride]
    out = os.dup(1)
    for case in chosen:
        with tempfile.TemporaryFile() as caught:
            os.dup2(caught.fileno(), 1)  # Mosaic GPU's PTX is printed by C++.
            try:
                ahead_of_time.compile_for_h200(case.function, *case.arguments)
            finally:
                os.dup2(out, 1)
            caught.seek(0)
            ptx = caught.read().decode()
        for file in sorted(dump.iterdir()):
            if file.suffix == ".ptx":  # Triton's.
                ptx += file.read_text()
            file.unlink()
        compiled = [normal(module) for module in ptx.split(".version ")[1:]]
        kernels = sorted(module for module in compiled if ".entry" in module)  # XLA compiles its own in any order.
        digest = hashlib.sha256("".join(kernels).encode()).hexdigest()
        os.write(out, f"{json.dumps([case.name, len(kernels), digest])}\n".encode())


def pretend_to_have_an_h200() -> None:
    """Replaces what asks for the GPU in every module of the package that has a name for it."""
    import pallas_kernels  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith("pallas_kernels"):
            if hasattr(module, "hopper_device"):
                setattr(module, "hopper_device", lambda: "NVIDIA H200")  # noqa: B010
            if hasattr(module, "capability"):
                setattr(module, "capability", lambda: (9, 0))  # noqa: B010


def normal(ptx: str) -> str:
    """PTX without comments, positions in source files, debug sections, and names of functions."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"\.section\s+\.debug\w*\s*\{.*?\n\s*\}", "", ptx, flags=re.DOTALL)
    lines = [line.strip() for line in ptx.split("\n")]
    lines = [line for line in lines if line and not re.match(r"\.loc\b|\.file\b|\$L__tmp\d+:", line)]
    ptx = "\n".join(lines)
    for i, name in enumerate(dict.fromkeys(re.findall(r"\.entry\s+([\w$]+)", ptx))):
        ptx = re.sub(rf"\b{re.escape(name)}(?=\b|_param)", f"kernel{i}", ptx)
    return ptx


def cases() -> Iterator[Case]:
    """Cases that are compiled: the layers of Llama-3-8B by every kernel, and smaller numbers of other kinds of calls."""
    from pallas_kernels.shapes import SHAPES

    layers = SHAPES["Llama-3-8B"]
    for kind in MATMULS:
        for n, k in layers.values():
            for m in ROWS:
                yield matmul(kind, m, n, k)
        for m in (1, 13, 64, 300):
            yield matmul(kind, m, 1472, 2560, per_token=True, bias=True)
            yield matmul(kind, m, 1472, 2560, out_dtype="float32")
            if MATMULS[kind].get("scales") != "float32":
                yield matmul(kind, m, 1472, 2560, out_dtype="int32")
        for m in (64, 512, 4096):
            yield experts(kind, m, 3072, 4096)
    for kind in MATMULS:
        for m in (1, 16, 64):
            for per_token in (False, True):
                if kind != "weight_only":
                    yield gated(kind, m, *layers["gate_up"], per_token)
    for batch in (1, 16, 64):
        for codes in (False, True):
            for extra in (None, 0, 256):
                yield attention(batch, codes, extra)
    for rows in (1, 16, 64, 4096):
        for per_token in (False, True):
            yield from quantizations(rows, per_token)


def array(shape: tuple[int, ...], dtype: str) -> "jax.ShapeDtypeStruct":
    """Shape and dtype of an argument."""
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def _weight(
    kind: str, n: int, k: int, leading: tuple[int, ...] = ()
) -> "tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None]":
    """Codes, scale and scales of groups of a weight, by shape and dtype."""
    scales = MATMULS[kind].get("scales")
    codes = array((*leading, n, k if kind == "int8" else k // 2), "int8")
    groups = None if scales is None else array((*leading, k // 128, n), str(scales))
    return codes, array((*leading, n), "float32"), groups


def matmul(
    kind: str, m: int, n: int, k: int, *, per_token: bool = False, bias: bool = False, out_dtype: str = "bfloat16"
) -> Case:
    """A product, by the entry point of its kind."""
    import pallas_kernels

    codes, scale, groups = _weight(kind, n, k)
    weight_only, folded = kind == "weight_only", bool(MATMULS[kind].get("folded"))

    def f(x, codes, x_scale, scale, groups, bias):
        if weight_only:
            return pallas_kernels.weight_only_int4_matmul(
                x, codes, groups, scale, bias, out_dtype=out_dtype, implementation="mosaic"
            )
        if groups is not None:
            return pallas_kernels.grouped_int4_matmul(
                x, codes, x_scale, groups, scale, bias, folded=folded, out_dtype=out_dtype, implementation="mosaic"
            )
        plain = pallas_kernels.int8_matmul if kind == "int8" else pallas_kernels.int4_matmul
        return plain(x, codes, x_scale, scale, bias, out_dtype=out_dtype, implementation="mosaic")

    x = array((m, k), "bfloat16" if weight_only else "int8")
    x_scale = array((m,) if per_token else (), "float32")
    name = f"matmul {kind} {m}x{n}x{k} {out_dtype}" + " per_token" * per_token + " bias" * bias
    return Case(name, f, (x, codes, x_scale, scale, groups, array((n,), "float32") if bias else None))


def experts(kind: str, m: int, n: int, k: int) -> Case:
    """A product whose rows belong to several experts."""
    import pallas_kernels

    codes, scale, groups = _weight(kind, n, k, (EXPERTS,))
    bits, folded = 8 if kind == "int8" else 4, bool(MATMULS[kind].get("folded"))

    def f(x, codes, sizes, x_scale, scale, groups):
        if hasattr(pallas_kernels, "Weight"):
            decoder = pallas_kernels.decoder_for(
                bits, group_dtype=None if groups is None else groups.dtype, folded=folded, weight_only=x.dtype != "int8"
            )
            weight = pallas_kernels.Weight(decoder, codes, scale, groups)
            return pallas_kernels.expert_matmul(x, weight, sizes, x_scale, alignment=8, implementation="mosaic")
        before: Any = importlib.import_module("pallas_kernels.experts")  # A checkout without Weight.
        return before.expert_matmul(
            x,
            codes,
            sizes,
            x_scale,
            scale,
            groups,
            bits=bits,
            folded=folded,
            alignment=8,
            implementation="mosaic",
        )

    x = array((m, k), "bfloat16" if kind == "weight_only" else "int8")
    x_scale = array(() if kind == "weight_only" else (m,), "float32")
    return Case(f"experts {kind} {m}x{n}x{k}", f, (x, codes, array((EXPERTS,), "int32"), x_scale, scale, groups))


def gated(kind: str, m: int, n: int, k: int, per_token: bool) -> Case:
    """A product whose first half gates its second, and what quantizes the result."""
    import pallas_kernels

    codes, scale, groups = _weight(kind, n, k)
    extra = 256
    bits, folded = 8 if kind == "int8" else 4, bool(MATMULS[kind].get("folded"))

    def f(x, codes, x_scale, scale, groups, multiplier, source, part):
        if hasattr(pallas_kernels, "Weight"):
            decoder = pallas_kernels.decoder_for(
                bits, group_dtype=None if groups is None else groups.dtype, folded=folded
            )
            weight = pallas_kernels.Weight(decoder, codes, scale, groups)
            return pallas_kernels.gated_matmul(
                x,
                weight,
                x_scale,
                multiplier,
                source,
                part,
                activation="silu",
                qmax=127,
                per_token=per_token,
                implementation="mosaic",
            )
        before: Any = pallas_kernels.gated_matmul  # Of a checkout without Weight.
        return before(
            x,
            codes,
            x_scale,
            scale,
            multiplier,
            source,
            part,
            bits=bits,
            group_scale=groups,
            folded=folded,
            activation="silu",
            qmax=127,
            per_token=per_token,
            implementation="mosaic",
        )

    recipe = array((n // 2,), "float32"), array((extra,), "int32"), array((extra,), "int32")
    x, x_scale = array((m, k), "int8"), array((m,) if per_token else (), "float32")
    name = f"gated {kind} {m}x{n}x{k}" + " per_token" * per_token
    return Case(name, f, (x, codes, x_scale, scale, groups, *recipe))


def attention(batch: int, codes: bool, extra: int | None) -> Case:
    """Attention of one new token over 512 positions, quantized with fixed scales where ``extra`` is a number."""
    import pallas_kernels

    heads, kv_heads, dim, capacity = 32, 8, 128, 576
    cache = [array((batch, capacity, kv_heads, dim), "int8" if codes else "bfloat16")] * 2
    scales = [array((batch, capacity, kv_heads), "float32") if codes else None] * 2
    implementation = "mosaic" if codes else "triton"

    def f(qkv, keys, values, lengths, key_scales, value_scales, rotation, recipe):
        held = keys, values, lengths, key_scales, value_scales
        if recipe is None:
            return pallas_kernels.decode_attention(qkv, *held, rotation=rotation, implementation=implementation)
        return pallas_kernels.quantized_decode_attention(
            qkv, *held, *recipe, qmax=127, rotation=rotation, implementation=implementation
        )

    recipe = None
    if extra is not None:
        recipe = array((heads * dim,), "float32"), array((extra,), "int32"), array((extra,), "int32")
    rotation = (array((batch, dim // 2), "float32"),) * 2
    qkv, lengths = array((batch, heads + 2 * kv_heads, dim), "bfloat16"), array((batch,), "int32")
    name = f"attention {'int8' if codes else 'bfloat16'} {batch}" + (f" extra {extra}" if recipe else "")
    return Case(name, f, (qkv, *cache, lengths, *scales, rotation, recipe))


def quantizations(rows: int, per_token: bool) -> Iterator[Case]:
    """Operations before a product, by the kernels in Triton."""
    import pallas_kernels

    k, extra = 4096, 0 if per_token else 256
    recipe = array((k,), "float32"), array((extra,), "int32"), array((extra,), "int32")
    x, twice, norm = array((rows, k), "bfloat16"), array((rows, 2 * k), "bfloat16"), array((k,), "bfloat16")

    def normalized(x, residual, norm, *recipe):
        return pallas_kernels.quantize_normalized(
            x,
            *recipe,
            epsilon=1e-5,
            weight=norm,
            residual=residual,
            qmax=127,
            per_token=per_token,
            implementation="triton",
        )

    def activated(x, *recipe):
        return pallas_kernels.quantize_activated(
            x, *recipe, activation="silu", gated=True, qmax=127, per_token=per_token, implementation="triton"
        )

    name = f"{rows}x{k}" + " per_token" * per_token
    yield Case(f"normalized {name}", normalized, (x, x, norm, *recipe))
    yield Case(f"activated {name}", activated, (twice, *recipe))


def digests(checkout: Path, arguments: list[str]) -> dict[str, list[Any]]:
    """Name of a case to the number of its kernels and their digest, as a checkout compiles them."""
    if checkout.suffix == ".json":
        return json.loads(checkout.read_text())
    others = [path for path in sys.path[1:] if path and Path(path) != Path(__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), *others]), "WORKER": "1"}
    worker = subprocess.Popen(
        [sys.executable, __file__, *arguments], env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True
    )
    found = {}
    for line in worker.stdout or ():
        name, *rest = json.loads(line)
        found[name] = rest
    if worker.wait():
        sys.exit(f"compare_kernels: {checkout} could not be compiled")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="a checkout, or what --keep has written")
    parser.add_argument("--only", default="", help="a regular expression that names of cases must match")
    parser.add_argument("--stride", type=int, default=1, help="take every so many-th of them")
    parser.add_argument("--keep", type=Path, help="file for the other checkout's digests")
    a = parser.parse_args()
    if os.environ.get("WORKER"):
        compile_cases(a.only, a.stride)
        return
    arguments = [a.other, "--only", a.only, "--stride", str(a.stride)]
    theirs = digests(Path(a.other).resolve(), arguments)
    if a.keep:
        a.keep.write_text(json.dumps(theirs, indent=1) + "\n")
    ours = digests(Path(__file__).resolve().parents[1], arguments)
    different = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    empty = [name for name, (kernels, _) in ours.items() if not kernels]
    missing = [name for name in ours if name not in theirs]
    for label, names in (("DIFFERENT", different), ("WITHOUT A KERNEL", empty), ("NOT IN THE OTHER", missing)):
        print(*(f"{label}: {name}" for name in names), sep="\n", end="\n" if names else "")
    print(f"{len(ours)} cases, {sum(n for n, _ in ours.values())} kernels: {len(different)} cases differ")
    sys.exit(bool(different or empty or missing or not ours))


if __name__ == "__main__":
    main()
