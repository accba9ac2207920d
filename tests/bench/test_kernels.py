import json

import pytest

from fqjax.bench import kernel_cases, kernels
from fqjax.cli import main as cli
from pallas_kernels import int8_matmul


@pytest.fixture(scope="module")
def result():
    return kernels.run([(128, 256)], [1, 3])


@pytest.mark.thorough
def test_every_row_has_what_is_promised(result):
    assert {"device", "versions", "date", "ceilings", "rows"} <= set(result)
    assert set(result["ceilings"]) == {"bf16_tflops", "int8_tops", "copy_tb_per_s"}
    assert all(value > 0 for value in result["ceilings"].values())
    for row in result["rows"]:
        assert {"kernel", "M", "N", "K", "microseconds", "tops", "tb_per_s", "ratio_to_bf16", "spread"} <= set(row)
        assert row["spread"]["min"] <= row["spread"]["median"] == row["microseconds"] <= row["spread"]["max"]
        assert row["tops"] == pytest.approx(2e-6 * row["M"] * 128 * 256 / row["microseconds"])


def test_quantizing_activations_is_timed_with_and_without_flattening(result):
    rows = {row["kernel"]: row for row in result["activations"]}
    assert rows["quantize_flatten"]["extra"] == 128 and rows["quantize"]["extra"] == 0
    assert all(row["microseconds"] > 0 for row in rows.values())
    assert "`rms_norm_quantize_flatten` takes" in kernels.markdown(result)


def test_our_results_are_compared_with_xla(result):
    ours = [row for row in result["rows"] if row["kernel"] in kernel_cases.OURS]
    assert len(ours) == 12 and all(row.get("exact", row.get("close")) for row in ours)
    assert {row["kernel"] for row in ours if "exact" not in row} == {"grouped_float", "weight_only_int4"}


@pytest.mark.thorough
def test_a_wrong_result_is_noticed(monkeypatch):
    def doubled(x, w, s, t, implementation=None):
        """XLA's product, which is twice what it should be unless XLA is asked for."""
        return int8_matmul(x, w, s if implementation == "xla" else 2 * s, t, implementation="xla")

    monkeypatch.setattr(kernel_cases, "int8_matmul", doubled)
    rows = kernels.run([(128, 256)], [2])["rows"]
    assert [row["exact"] for row in rows if "exact" in row] == [False, True, True, True]
    assert "DIFFERS" in kernels.line(rows[2]) and "DIFFERS" not in kernels.line(rows[3])


def test_the_table_has_a_line_for_every_number_of_rows(result):
    text = kernels.markdown(result)
    assert "N = 128, K = 256" in text and "| 1 |" in text and "| 3 |" in text
    assert "by more than rounding: 0." in text


@pytest.mark.thorough
def test_the_command_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "bench.json"
    code = cli.main(["bench", "kernels", "--shape", "64x256", "--rows", "1", "--json", str(out)])
    assert code == 0
    printed = capsys.readouterr().out
    for row in json.loads(out.read_text())["rows"]:
        assert f"{row['microseconds']:.2f} us" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models"], "No such command 'models'"),
        (["kernels", "--shape", "4096"], "--shape 4096: must be"),
        (["kernels", "--shape", "64x100"], "multiple of 256"),
        (["kernels", "--rows", "0"], "--rows must be positive"),
        (["kernels", "--json", "/nowhere/at/all.json"], "directory does not exist"),
    ],
)
def test_bad_requests_take_one_line(capsys, arguments, message):
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
