"""Reports as text and as HTML."""

import dataclasses
import re

import pytest

from fqjax.report.report import LayerReport, Report

ROW = LayerReport(
    name="layers.0.mlp.down_proj",
    bits=4,
    expansion=1.25,
    relative_error=0.0123,
    bytes=1 << 20,
    bytes_bf16=1 << 22,
    macs=1 << 21,
    accumulator_bound=1 << 20,
    scales="tensor",
)
LONG = "layers.10.mlp.experts.11." + "a_layer_of_a_very_long_name" * 4


@pytest.fixture(scope="module")
def report():
    rows = (ROW, dataclasses.replace(ROW, name=LONG), dataclasses.replace(ROW, name="a<b>&", bits=8))
    return Report(
        scheme="flattenquant", layers=rows, skipped={"lm_head": "an output head or router"}, model_bytes=1 << 23
    )


def test_printing_a_report_prints_its_table_uncut(report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = str(report)
    lines = text.split("\n")
    assert [line.strip() for line in lines[:1]] == ["scheme: flattenquant"]
    for row in report.layers:
        found = next(line for line in lines if line.lstrip().startswith(row.name)).split()
        assert found[1:] == [str(row.bits), "1.250", "1.23%", "1.05", "MB", "25%", "11.0"]
    assert any(line.split()[:2] == ["lm_head", "float"] for line in lines)
    assert text.endswith(report.totals()) and "\x1b" not in text and lines == [line.rstrip() for line in lines]


def test_a_notebook_shows_a_table_of_the_same_cells(report):
    shown = report._repr_html_()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown)
    assert cells[:7] == [ROW.name, "4", "1.250", "1.23%", "1.05 MB", "25%", "11.0"]
    assert "a&lt;b&gt;&amp;" in cells and LONG in cells
    assert len(re.findall("<tr>", shown)) == 1 + len(report.layers) + len(report.skipped)
    assert all(line in shown for line in report.totals().replace("'", "&#x27;").split("\n"))


def test_a_report_of_nothing_can_be_printed():
    assert "not quantized" in str(Report(scheme="none", layers=(), skipped={}, model_bytes=0))
