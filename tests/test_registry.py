"""Pieces by name: registered here, and found through the entry points of another package."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from annotated_types import Ge

import fqjax
from fqjax import registry
from fqjax.runtime.errors import InputError

MODULE = """
import dataclasses
from typing import ClassVar

import fqjax
from fqjax.methods import Absmax
from fqjax.scheme import Scheme


@fqjax.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Louder(Absmax):
    kind: ClassVar[str] = "louder"
    volume: float = 11.0


SCHEME = Scheme("loud", "Absmax, louder.", Louder(volume=12))
"""
ENTRY_POINTS = """
[fqjax.methods]
louder = loud_package
gone = absent_package:Method

[fqjax.schemes]
loud = loud_package:SCHEME
broken = loud_package:NOTHING
"""


@pytest.fixture
def plugin(tmp_path):
    """Runs code in a process that has a package with entry points."""
    (tmp_path / "loud_package.py").write_text(MODULE)
    info = tmp_path / "loud_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    here = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), here])}

    def run(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    return run


def command(*arguments):
    return f"import sys; from fqjax.cli.main import main; sys.exit(main({list(arguments)}))"


def test_schemes_of_another_package_are_listed(plugin):
    result = plugin(command("schemes"))
    assert result.returncode == 0 and "Absmax, louder." in result.stdout and "flattenquant" in result.stdout
    assert result.stderr.startswith("fqjax: scheme 'broken' of loud-package cannot be loaded (AttributeError: ")
    assert result.stderr.count("\n") == 1


def test_they_resolve_with_their_methods(plugin):
    result = plugin(
        "import json, sys\n"
        "from fqjax.presets import resolve_scheme\n"
        "from fqjax.scheme import Scheme\n"
        "record = json.loads(resolve_scheme('loud').override(['volume=13']).recipe())\n"
        "assert 'jax' not in sys.modules\n"
        "print(record['method']['kind'], record['method']['volume'])\n"
        "assert Scheme.from_json(record).method.volume == 13"
    )
    assert result.stdout == "louder 13.0\n", result.stderr


def test_a_method_is_found_by_its_name_alone(plugin):
    code = "from fqjax.registry import lookup, names; print(lookup('methods', 'louder').__name__, names('methods')[-1])"
    assert plugin(code).stdout == "Louder louder\n"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("broken", "scheme 'broken' of loud-package cannot be loaded (AttributeError"),
        ("silent", "w4a16-awq, loud; scheme 'broken' of loud-package cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_named(plugin, scheme, message):
    result = plugin(command("convert", "a", "b", "--scheme", scheme))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr


def test_a_missing_module_is_named(plugin):
    result = plugin("from fqjax.registry import lookup; lookup('methods', 'gone')")
    assert "InputError: method 'gone' of loud-package cannot be loaded (ModuleNotFoundError: " in result.stderr


@pytest.fixture
def fresh(monkeypatch):
    """A registry that forgets what a test registers."""
    monkeypatch.setattr(registry, "_registered", {group: dict(some) for group, some in registry._registered.items()})


@dataclasses.dataclass(frozen=True)
class Ring:
    size: Annotated[int, Ge(1)]
    group: ClassVar[str] = "formats"


def ring(name):
    class Named(Ring):
        kind: ClassVar[str] = name

    Named.__qualname__ = f"Named.{name}"
    return Named


def test_a_class_is_registered_by_its_base_or_by_a_given_group(fresh):
    assert fqjax.register(ring("one")) is registry.lookup("formats", "one")
    other = fqjax.register("transforms")(ring("one"))
    assert registry.lookup("transforms", "one") is other is not registry.lookup("formats", "one")
    assert fqjax.register(other := ring("two")) is fqjax.register(other)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: registry.lookup("formats", "absent"), "unknown format 'absent'; the formats are: "),
        (lambda: fqjax.register(dict), "dict: expected a class attribute kind"),
        (lambda: fqjax.register("colours"), "^piece: cannot be registered in 'colours'; expected one of formats"),
        (lambda: fqjax.register("format"), "cannot be registered in 'format'; .*; did you mean 'formats'?"),
        (lambda: fqjax.register(""), "^piece: cannot be registered in ''; expected one of formats"),
        (lambda: (fqjax.register(ring("x")), fqjax.register(type("Other", (ring("x"),), {}))), "format 'x' is there"),
        (lambda: fqjax.register_scheme(dataclasses.replace(fqjax.PRESETS["w4a8"], name="w8a8")), "'w8a8' is there"),
    ],
)
def test_bad_names_are_refused(fresh, act, message):
    with pytest.raises(InputError, match=message):
        act()


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a/b", "a\\b", "a\n", "-a", ".a", "a+b", "a" * 1000 + "!", 3, None, b"a", ["a"]]
)
def test_what_is_no_name_is_refused_in_one_line(fresh, name):
    before = registry.names("formats"), registry.names("schemes")
    scheme = type("Scheme", (), {"name": name, "method": None})()
    for act in (lambda: fqjax.register(unnamed(name)), lambda: fqjax.register_scheme(scheme)):
        with pytest.raises(InputError, match="expected") as caught:
            act()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert (registry.names("formats"), registry.names("schemes")) == before


def unnamed(kind):
    return type("Ring", (Ring,), {"kind": kind})


def test_a_piece_goes_into_json_and_back(fresh):
    cls = fqjax.register(ring("one"))
    assert registry.to_json(cls(3)) == {"kind": "one", "size": 3}
    assert registry.from_json("formats", {"kind": "one", "size": 3}) == cls(3)
    for values, message in [
        ({"kind": "one", "size": 0}, "here: size=0: expected a whole number of at least 1"),
        ({"kind": "one", "size": "3"}, "here: size=3: expected a whole number"),
        ({"kind": "one"}, "here: one: no entry 'size'"),
        ({"kind": "one", "size": 3, "colour": 1}, "here: one: unknown entry 'colour'; expected some of size"),
        ({"kind": "none"}, "here: unknown format 'none'"),
        ({}, "expected an object with an entry 'kind'"),
    ]:
        with pytest.raises(InputError, match=message):
            registry.from_json("formats", values, "here")
