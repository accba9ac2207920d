import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from flax import nnx

import fqjax
from fqjax.bench.environment import environment
from fqjax.checkpoint.manifest import describe


@pytest.fixture
def not_installed(monkeypatch):
    """As where the package is found by PYTHONPATH alone."""
    whole = importlib.metadata.Distribution.from_name.__func__

    def from_name(cls, name):
        if name == "fqjax":
            raise importlib.metadata.PackageNotFoundError(name)
        return whole(cls, name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", classmethod(from_name))


def test_checkpoints_and_benchmarks_name_the_version_without_an_installed_package(not_installed):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("fqjax")
    assert describe(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))["written_by"] == f"fqjax {fqjax.__version__}"
    assert environment()["versions"]["fqjax"] == fqjax.__version__


def test_the_build_takes_the_version_from_the_package():
    root = Path(fqjax.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    found = {}
    exec((root / project["tool"]["hatch"]["version"]["path"]).read_text(), found)
    assert found["__version__"] == fqjax.__version__
