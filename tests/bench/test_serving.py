import json
import runpy
import sys

import pytest

from fqjax.bench import serving
from fqjax.bench.random_models import architecture
from fqjax.cli.main import main
from fqjax.runtime.errors import InputError

LOAD = serving.Load(slots=2, prompt=(5, 9), new=(2, 4), requests=5, chunk=16)


@pytest.fixture(scope="module")
def result():
    load = serving.Load(slots=2, prompt=(8, 8), new=(3, 3), requests=4, rate=200.0, chunk=16, burst=2)
    return serving.run("tiny", architecture("tiny"), ("w8a8", "bf16"), [load])


def check(rows):
    for row in rows:
        assert row["seconds"] > 0 and row["milliseconds_per_step"] > 0 and row["allowed_tokens_per_second"] > 0
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"] <= 1e3 * row["seconds"]
        assert 0 < row["tpot_ms_p50"] <= row["tpot_ms_p99"] and row["busy_ttft_ms_p50"] > 0


def test_every_scheme_is_measured(result):
    rows = result["rows"]
    check(rows)
    assert [row["scheme"] for row in rows] == [row["scheme"] for row in result["generate"]] == ["bf16", "w8a8"]
    assert rows[0]["output_tokens_per_second"] * rows[0]["seconds"] == pytest.approx(12)
    assert rows[0]["ratio_to_bf16"] == 1 and rows[1]["ratio_to_bf16"] > 0


@pytest.mark.thorough
def test_lengths_may_be_drawn():
    result = serving.run("tiny", architecture("tiny"), ("bf16",), [LOAD])
    check(result["rows"])
    assert "5 to 9 + 2 to 4 | 5, at once" in serving.markdown([result])


def test_a_page_shows_every_row(result):
    page = serving.markdown([result])
    assert page.count("| `w8a8` |") == 2 and "| 8 + 3 | 4, 200/s |" in page and "| slots | chunk |" in page
    assert all("tokens/s" in serving.line(row) for row in result["rows"])
    assert "generate 8 + 8" in serving.line(result["generate"][0])


def test_requests_longer_than_the_model_are_refused_first():
    with pytest.raises(InputError, match="--prompt and --new: 4000 tokens; expected at most"):
        serving.run("tiny", architecture("tiny"), ("w8a8",), [serving.Load(prompt=(1, 3000), new=(1, 1000))])
    with pytest.raises(InputError, match="--new 3-2: expected two numbers above 0"):
        serving.run("tiny", architecture("tiny"), ("w8a8",), [serving.Load(prompt=(1, 3), new=(3, 2))])


@pytest.mark.thorough
def test_the_script_keeps_what_it_measured_before(tmp_path, monkeypatch):
    out = tmp_path / "serving"
    (tmp_path / "serving.json").write_text(json.dumps({"another": {"rows": []}}))
    arguments = [
        "--slots",
        "2",
        "--prompt",
        "4-8",
        "--new",
        "3",
        "--requests",
        "3",
        "--chunk",
        "16",
        "--schemes",
        "w8a8",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark_serving.py", *arguments, "--out", str(out)])
    monkeypatch.setattr(serving, "markdown", lambda results: f"{len(list(results))} pages")
    runpy.run_path("scripts/benchmark_serving.py", run_name="__main__")
    assert set(json.loads(out.with_suffix(".json").read_text())) == {"another", "tiny on cpu"}
    assert out.with_suffix(".md").read_text() == "2 pages"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "--rate 0: expected requests a second, above 0"),
        (["--prompt", "a-b"], "--prompt a-b: expected tokens, or two numbers"),
        (["--new", "-5"], "--new -5: expected tokens"),
        (["--slots", "0"], "--slots 0: expected at least 1"),
        (["--requests", "0"], "--requests 0: expected at least 1"),
        (["--model", "gpt-9"], "--model gpt-9: expected a config.json"),
        (["--scheme", "w2a2"], "unknown scheme 'w2a2'"),
    ],
)
def test_bad_options_take_one_line(capsys, arguments, message):
    assert main(["bench", "serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.thorough
def test_the_command_prints_and_writes_what_it_measured(capsys, tmp_path):
    sizes = ["--slots", "2", "--prompt", "8", "--new", "3", "--requests", "4", "--chunk", "16"]
    assert main(["bench", "serve", "--scheme", "bf16", *sizes, "--json", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["slots"] == 2 and "2 slots" in capsys.readouterr().out
