"""Every module can be imported with every supported set of versions."""

import importlib
import pkgutil

import pytest

import fqjax
import pallas_kernels

MODULES = [
    module.name
    for package in (fqjax, pallas_kernels)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith(".__main__")  # Runs the program.
]


@pytest.mark.smoke
def test_every_module_can_be_imported():
    assert len(MODULES) > 50
    for name in MODULES:
        importlib.import_module(name)
