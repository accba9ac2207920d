"""Importing fqjax, or asking the command line for help, imports nothing heavy."""

import subprocess
import sys

import pytest

import fqjax

HEAVY = ("jax", "jaxlib", "numpy", "flax", "orbax", "transformers", "scipy")


def loaded_after(code):
    """The names of the modules that a fresh process has imported after some code."""
    report = "import sys; print('\\n' + ' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["schemes"], ["convert", "--help"], ["convert", "a", "b", "--bits"]])
def test_the_command_line_imports_nothing_heavy_for(arguments):
    modules = loaded_after(f"from fqjax.cli.main import main; main({arguments})")
    assert "fqjax.cli.app" in modules and modules.isdisjoint(HEAVY)


@pytest.mark.parametrize("code", ["import fqjax; dir(fqjax)", "import fqjax; fqjax.PRESETS['w4a8']; fqjax.Scheme"])
def test_schemes_need_no_jax(code):
    assert loaded_after(code).isdisjoint(HEAVY)


def test_every_public_name_is_there():
    for name in fqjax.__all__:
        assert getattr(fqjax, name) is not None and name in dir(fqjax)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        fqjax.quantise  # noqa: B018


@pytest.mark.parametrize("first", ["import fqjax.quantize", "from fqjax.quantize import quantize", "fqjax.quantize"])
def test_the_function_wins_over_the_module_of_its_name(first):
    assert "jax" in loaded_after(f"import fqjax\n{first}\nassert fqjax.quantize.__name__ == 'quantize'")


@pytest.mark.parametrize("code", ["", "fqjax.quantize, fqjax.generate", "import fqjax.inference.serve, fqjax.cli.main"])
def test_a_person_who_lists_the_names_sees_the_public_ones_alone(code):
    shown = "[name for name in dir(fqjax) if not name.startswith('__')]"
    assert "jax" not in fqjax.__all__ and "__version__" in dir(fqjax)
    loaded_after(f"import fqjax\n{code}\nassert {shown} == sorted(set(fqjax.__all__) - {{'__version__'}}), {shown}")
