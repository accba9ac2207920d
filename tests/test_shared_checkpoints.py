"""Perplexity of real checkpoints, through the command line, where such checkpoints are at hand."""

import json

import pytest

from fqjax.cli import main as cli

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def ratio(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    references = {}

    def evaluate(model):
        result = folder / "result.json"
        text = shared / "text" / "novels-eval.txt"
        assert cli.main(["eval", str(model), "--text", str(text), "--windows", "24", "--json", str(result)]) == 0
        return json.loads(result.read_text())["perplexity"]

    def measure(name, scheme):
        source, out, report = shared / "models" / name, folder / f"{name}-{scheme}", folder / "report.json"
        if name not in references:
            references[name] = evaluate(source)
        text = shared / "text" / "novels-calibration.txt"
        assert cli.main(["convert", str(source), str(out), "--scheme", scheme, "--calibration", str(text)]) == 0
        assert cli.main(["inspect", str(out), "--json", str(report)]) == 0
        return evaluate(out) / references[name], json.loads(report.read_text())

    return measure


@pytest.mark.parametrize(
    ("name", "scheme", "most"),
    [
        ("novels-llama", "flattenquant", 1.020),
        ("novels-llama", "flattenquant-w8a8", 1.003),
        ("novels-mixtral", "w4a8-integer-scale", 1.010),
        ("stories260k", "flattenquant-w8a8", 1.01),
    ],
)
def test_the_loss_is_small(ratio, name, scheme, most):
    value, report = ratio(name, scheme)
    assert value <= most and report["expansion"] <= 1.15
    if scheme == "flattenquant":
        assert report["int4_mac_share"] >= 0.4829 and report["bytes_bf16"] >= 2.4 * report["bytes"]
