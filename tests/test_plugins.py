"""The package of docs/extending.md, installed as it stands there: quantized with in one process, loaded in another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_checkpoint
from tests.documented_package import install

ROOT = Path(__file__).parents[1]

QUANTIZE = """
from pathlib import Path
import fqjax, numpy as np
from fqjax.core.layer import LayerInputs
from fqjax.drivers.codec import write_value
from fqjax.presets import resolve_scheme
weight = np.ones((4, 16), np.float32)
plans = resolve_scheme("spread-powers").method.plans(LayerInputs(weight, weight[0], weight), 8)
write_value(Path({plans!r}), plans)
plain, _ = fqjax.load_hf({source!r}, dtype="float32")
batches = [np.random.default_rng(0).integers(0, 2048, (2, 32), np.int32)]
model, report = fqjax.quantize(plain, "spread-powers", calibration=batches)
fqjax.save({out!r}, model)
np.save({logits!r}, np.asarray(model(batches[0]), np.float32))
exact, found = plain.layers[0].mlp.down_proj, model.layers[0].mlp.down_proj
x = np.random.default_rng(1).standard_normal((64, exact.in_features)).astype(np.float32)
print(float(((exact(x) - found(x)) ** 2).sum() / (exact(x) ** 2).sum()))
print(max(row.relative_error for row in report.layers))
"""
LOAD = """
from pathlib import Path
import fqjax, numpy as np
from fqjax.drivers.codec import read_value
plan, = read_value(Path({plans!r}))
print(plan.transform.kind, plan.grid.kind, plan.grid.format)
tokens = np.random.default_rng(0).integers(0, 2048, (2, 32), np.int32)
model = fqjax.load({out!r})
logits = np.asarray(model(tokens), np.float32)
np.testing.assert_array_equal(logits, np.load({logits!r}))
generated = np.asarray(fqjax.generate(model, tokens, max_new_tokens=3))
assert generated.shape[0] == 2 and (generated[:, -3] == logits[:, -1].argmax(-1)).all(), generated
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package's modules, and what an installer would write beside them."""
    return install("extending", "powers", tmp_path_factory.mktemp("package"))


def run(code, *paths):
    """Runs code in a process that finds these directories and this repository."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def command(*arguments):
    return f"import sys; from fqjax.cli.main import main; sys.exit(main({[str(one) for one in arguments]}))"


@pytest.fixture(scope="module")
def quantized(package, tmp_path_factory):
    """A directory with a quantized checkpoint, and the errors that the process which made it printed."""
    directory = tmp_path_factory.mktemp("quantized")
    done = run(QUANTIZE.format(source=str(make_checkpoint(directory / "source")), **paths(directory)), package)
    assert done.returncode == 0, done.stderr
    return directory, [float(line) for line in done.stdout.split()]


def paths(directory):
    names = {"out": "out", "logits": "logits.npy", "plans": "plans.safetensors"}
    return {key: str(directory / name) for key, name in names.items()}


def test_its_scheme_is_listed_without_jax(package):
    code = "import sys; from fqjax.cli.main import main; main(['schemes']); assert 'jax' not in sys.modules"
    listed = run(code, package)
    assert listed.returncode == 0 and "Powers of two after a rotation" in listed.stdout, listed.stderr
    assert listed.stderr == ""


def test_layers_are_as_near_the_exact_ones_as_powers_of_two_are(quantized):
    one, all_of_them = quantized[1]
    assert 0.01 < one < 0.06 and 0.01 < all_of_them < 0.06


def test_another_process_reads_plans_and_loads_what_was_saved(quantized, package):
    """Plans are read before any module of the package is imported, as where a conversion goes on."""
    done = run(LOAD.format(**paths(quantized[0])), package)
    assert done.stdout == "spread power-of-two-grid PowerOfTwo(levels=7)\n" and done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_the_command_line_converts_with_it(package, text, tmp_path):
    source, out = make_checkpoint(tmp_path / "source"), tmp_path / "out"
    options = ("--calibration", text, "--samples", 2, "--window", 32, "--set", "levels=5")
    made = run(command("convert", source, out, "--scheme", "spread-powers", *options), package)
    assert made.returncode == 0, made.stderr
    done = run(command("generate", out, "--prompt", "return", "--max-new-tokens", 2), package)
    assert done.returncode == 0, done.stderr
    assert '"levels": 5' in (out / "fqjax.json").read_text()


def test_without_the_package_loading_names_the_kind(quantized):
    done = run(command("inspect", quantized[0] / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "fqjax.json: layer 'layers.0." in done.stderr
        and "unknown format 'power-of-two'; the formats are" in done.stderr
    )
