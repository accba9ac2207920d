"""The import graph: no circles, and nothing names anything above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

KERNEL_FLOORS = [
    ["packing", "shapes", "ragged", "device", "gradient", "mosaic.types", "mosaic.math"],
    ["mosaic", "timing"],
    ["quantize"],
    ["attention", "matmul.reference"],
    ["matmul.hopper.grouped", "matmul.hopper.unpack", "matmul.hopper.tiles", "matmul.hopper.ceiling"],
    ["matmul.hopper.decoder"],
    ["matmul.hopper.decoders"],
    ["matmul.kind", "matmul.hopper.problem"],
    ["matmul.hopper.ragged", "matmul.hopper.exchange", "matmul.hopper.flatten"],
    ["matmul.hopper.gate"],
    ["matmul.hopper.epilogue"],
    ["matmul.hopper.decode", "matmul.hopper.gemm"],
    ["matmul.hopper.kernels"],
    ["matmul.hopper.launch", "matmul.hopper.tuning"],
    ["matmul.operands", "matmul.dispatch"],
    ["matmul", "matmul.api", "matmul.gated", "matmul.experts"],
]
"""Bottom up; a module belongs to the longest prefix of its name.  Within a floor modules may name each other."""

FQJAX_FLOORS = [
    ["runtime", "registry", "version"],
    ["core"],
    ["layers"],
    ["models"],
    ["rewrites", "checkpoint"],
    ["drivers"],
    ["methods"],
    ["scheme", "presets"],
    ["quantize", "convert", "evaluation", "inference", "data", "report", "interop"],
    ["server"],
    ["bench", "demo"],
    ["cli", "__main__"],
]

FLOORS = {
    "pallas_kernels": [[f"pallas_kernels.{name}" for name in floor] for floor in KERNEL_FLOORS],
    "fqjax": [[f"fqjax.{name}" for name in floor] for floor in FQJAX_FLOORS],
}


def modules(package):
    """Name of a module to its file."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file, known):
    """The modules that a file names anywhere: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {child for child in children if child in known} or {node.module}
    return {name for name in found if name in known}


def graph():
    """Module to the modules that it names, of both packages; their own faces, which export, are left out."""
    known = modules("pallas_kernels") | modules("fqjax")
    faces = {"fqjax", "pallas_kernels"}
    arrows = {name: imports(file, known) for name, file in known.items()}
    return {name: {to for to in arrows[name] if to != name and to not in faces} for name in known if name not in faces}


def circles(arrows):
    """Sets of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    found, number, low, stack = [], {}, {}, []

    def visit(name):
        number[name] = low[name] = len(number)
        stack.append(name)
        for to in sorted(arrows[name]):
            if to not in number:
                visit(to)
            if to in stack:
                low[name] = min(low[name], low[to])
        if low[name] == number[name]:
            members = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            found.extend([members] if len(members) > 1 else [])

    for name in sorted(arrows):
        if name not in number:
            visit(name)
    return found


def floor_of(name, floors):
    """Number of a module's floor, by the longest prefix."""
    matches = [
        (len(prefix), i)
        for i, floor in enumerate(floors)
        for prefix in floor
        if name == prefix or name.startswith(prefix + ".")
    ]
    assert matches, f"{name} is on no floor"
    return max(matches)[1]


@pytest.mark.parametrize("package", FLOORS)
def test_no_circle(package):
    arrows = graph()
    inside = {
        name: {to for to in arrows[name] if to.startswith(package)} for name in arrows if name.startswith(package)
    }
    assert circles(inside) == []


@pytest.mark.parametrize("package", FLOORS)
def test_nothing_names_what_is_above_it(package):
    floors, arrows = FLOORS[package], graph()
    level = {name: floor_of(name, floors) for name in arrows if name.startswith(package + ".")}
    upward = [(name, to) for name in level for to in arrows[name] if to in level and level[to] > level[name]]
    assert upward == []


def test_the_kernels_know_nothing_of_fqjax():
    arrows = graph()
    assert not [
        name for name in arrows if name.startswith("pallas_kernels") and any("fqjax" in to for to in arrows[name])
    ]


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
