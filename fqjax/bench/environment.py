"""Where and with what something was measured."""

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias, TypedDict

import jax

from fqjax.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "torch")


Record: TypeAlias = dict[str, Any]
"""A JSON object, as benchmarks write it and read it again."""


class Environment(TypedDict):
    """Device, versions of packages by name, and date of a measurement."""

    device: str
    versions: dict[str, str]
    date: str


def environment() -> Environment:
    """``device``, ``versions`` and ``date``, as every benchmark's JSON has them."""
    versions = {"python": platform.python_version(), "fqjax": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def describe(result: Environment | Record) -> str:
    """One line of it for a table's heading."""
    versions = ", ".join(
        f"{name} {v}" for name, v in result["versions"].items() if name in ("python", "jax", "flax", "torch")
    )
    return f"{result['date']}, {result['device']}, {versions}"
