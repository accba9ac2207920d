"""The command line: what it prints, what it writes, and one clear line for every kind of bad input."""

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fqjax.cli import main as cli
from fqjax.presets import PRESETS
from fqjax.version import __version__
from tests.conftest import edit_tensor, make_checkpoint


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    source = make_checkpoint(folder / "source")
    (folder / "text.txt").write_text("return the list of values that the class holds " * 300)
    arguments = [
        "convert",
        source,
        folder / "out",
        "--calibration",
        folder / "text.txt",
        "--samples",
        4,
        "--window",
        64,
    ]
    assert cli.main([str(a) for a in arguments]) == 0
    return folder


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_convert_prints_the_report(capsys, checkpoint, text, tmp_path):
    code, out, _ = run(
        capsys, "convert", checkpoint, tmp_path / "out", "--scheme", "w8a8", "--calibration", text,
        "--samples", 2, "--window", 64, "--ignore", "down_proj", "--set", "sample_rows=32",
    )  # fmt: skip
    assert code == 0 and "scheme: w8a8" in out and "layers.1.self_attn.qkv_proj" in out
    layers = json.loads((tmp_path / "out" / "fqjax.json").read_text())["layers"]
    assert len(layers) == 6 and not any("down" in name for name in layers)


def test_a_dry_run_changes_nothing(capsys, checkpoint, text, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(
        capsys, "convert", checkpoint, tmp_path / "out", "--calibration", text, "--window", 64, "--dry-run"
    )
    assert code == 0 and "layers.0.mlp.down_proj" in out and "INT4 or INT8" in out and "lm_head" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_eval_writes_what_it_prints(capsys, converted, tmp_path):
    for model in ("source", "out"):
        code, out, _ = run(
            capsys, "eval", converted / model, "--text", converted / "text.txt",
            "--window", 64, "--windows", 3, "--json", tmp_path / f"{model}.json",
        )  # fmt: skip
        result = json.loads((tmp_path / f"{model}.json").read_text())
        assert code == 0 and set(result) == {"perplexity", "tokens", "seconds"}
        assert result["tokens"] == 3 * 63 and f"{result['perplexity']:.4f}" in out


@pytest.mark.smoke
def test_generate_continues_the_prompt(capsys, converted):
    arguments = ["generate", converted / "out", "--prompt", "return the [bold]", "--max-new-tokens", 5]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith("return the [bold]")
    draws = [run(capsys, *arguments, "--temperature", 2.0, "--top-p", 0.9, "--seed", s)[1] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    code, out, _ = run(capsys, *arguments, "--kv-cache", "int8")
    assert code == 0 and out.startswith("return the [bold]")


def test_generate_continues_several_prompts_and_what_comes_in(capsys, converted, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nelsewhere"))
    options = ["--prompt", "return", "--prompt", "-", "--max-new-tokens", 5, "--json", tmp_path / "found.json"]
    code, out, err = run(capsys, "generate", converted / "out", *options)
    first, second = json.loads((tmp_path / "found.json").read_text())["continuations"]
    assert code == 0 and out == f"return{first['text']}\nfrom\nelsewhere{second['text']}\n"
    assert err.count("tokens, the first after") == 2
    assert (
        first["prompt"] == "return" and 0 < first["tokens"] <= 5 and first["seconds"] >= first["seconds_to_first_token"]
    )
    stop = first["text"][1:3]
    code, out, _ = run(capsys, "generate", converted / "out", *options[:2], *options[4:6], "--stop", stop)
    assert code == 0 and out == f"return{first['text'][: first['text'].index(stop)]}\n"


def test_a_chat_needs_a_template_and_prompts_a_text(capsys, converted):
    out = converted / "out"
    complains(capsys, "no chat template", "generate", out, "--chat", "--prompt", "x")
    complains(capsys, "--prompt: expected text to continue, or --chat", "generate", out)
    complains(capsys, "--system: an option of --chat", "generate", out, "--prompt", "x", "--system", "y")
    complains(capsys, "--stop: empty", "generate", out, "--prompt", "x", "--stop", "")
    complains(capsys, "min_p 2.0", "generate", out, "--prompt", "x", "--min-p", 2)


def test_turns_of_a_chat_see_those_before(capsys, converted, monkeypatch):
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    seen = []

    def chat_prompt(tokenizer, messages):
        seen.append([dict(message) for message in messages])
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return original(tokenizer, messages)

    from fqjax.data import chat

    original = chat.chat_prompt
    monkeypatch.setattr(chat, "chat_prompt", chat_prompt)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    code, out, _ = run(capsys, "generate", converted / "out", "--chat", "--system", "brief", "--max-new-tokens", 3)
    assert code == 0 and [len(messages) for messages in seen] == [2, 4]
    assert [m["role"] for m in seen[1]] == ["system", "user", "assistant", "user"] and seen[1][3]["content"] == "two"
    assert out.startswith(f"{seen[1][2]['content']}\n")


def test_eval_measures_an_int8_cache(capsys, converted, tmp_path):
    found = []
    for options in ([], ["--kv-cache", "int8"]):
        common = ("--window", 64, "--windows", 2, "--json", tmp_path / "found.json")
        assert run(capsys, "eval", converted / "out", "--text", converted / "text.txt", *common, *options)[0] == 0
        found.append(json.loads((tmp_path / "found.json").read_text())["perplexity"])
    assert found[0] != found[1] == pytest.approx(found[0], rel=0.05)


def test_inspect_reports_every_layer(capsys, converted, tmp_path):
    code, out, _ = run(capsys, "inspect", converted / "out", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and all(row["name"] in out for row in report["layers"])
    assert {"layers", "int4_mac_share", "expansion", "bytes", "bytes_bf16"} <= set(report)
    assert {"name", "bits", "expansion", "relative_error", "bytes", "macs"} <= set(report["layers"][0])
    assert report["int4_mac_share"] >= 0.4829 and len(report["layers"]) == 8
    assert report["bytes"] == sum(row["bytes"] for row in report["layers"])


def test_a_dry_run_says_which_layers_stay_in_int8(capsys, checkpoint, text, tmp_path):
    common = ("convert", checkpoint, tmp_path / "out", "--scheme", "w4a8", "--calibration", text, "--window", 64)
    code, out, _ = run(capsys, *common, "--dry-run", "--set", "int8_layers=down_proj")
    kinds = {line.split()[0]: line.split()[4] for line in out.splitlines() if line.startswith(" layers")}
    assert code == 0 and len(kinds) == 8
    assert all(kind == ("INT8" if "down_proj" in name else "INT4") for name, kind in kinds.items())
    complains(capsys, "int8_layers=nowhere", *common, "--set", "int8_layers=nowhere")
    beyond = ("--set", "int4_share=0.9", "--set", "int8_layers=down_proj")
    complains(capsys, "int4_share=0.9: out of reach", *common, "--dry-run", *beyond)
    assert not list(tmp_path.glob("out*"))


def test_inspect_makes_no_json_that_nobody_asked_for(capsys, converted, monkeypatch):
    def never(report):
        raise AssertionError("asked for JSON")

    monkeypatch.setattr("fqjax.report.report.Report.to_json", never)
    assert run(capsys, "inspect", converted / "out")[0] == 0


def test_inspect_takes_a_float_model(capsys, converted):
    code, out, _ = run(capsys, "inspect", converted / "source")
    assert code == 0 and "not quantized" in out and "16" in out and "as in bf16" in out


def test_inspect_draws_pictures(capsys, converted, tmp_path):
    code, _, _ = run(capsys, "inspect", converted / "out", "--plot", tmp_path / "plots")
    written = {path.name: path for path in (tmp_path / "plots").iterdir()}
    pictures = {"channels.png", "bits.png", "layers.png", "int4_share.png"}
    assert code == 0 and set(written) == pictures | {"layers.csv", "int4_share.csv", "report.json"}
    assert all(written[name].read_bytes()[:4] == b"\x89PNG" for name in pictures)
    report = json.loads(written["report.json"].read_text())
    with open(written["layers.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row["name"] for row in report["layers"]]
    assert [int(row["bits"]) for row in rows] == [row["bits"] for row in report["layers"]]
    shares, costs = zip(*report["trade_off"], strict=True)
    assert shares[0] == 0 and shares[-1] == 1 and len(shares) == 9 and costs[0] < costs[-1]


def test_inspect_draws_without_what_calibration_found(capsys, converted, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(converted / "out", bare)
    (bare / "calibration.safetensors").unlink()
    code, _, _ = run(capsys, "inspect", bare, "--plot", tmp_path / "plots")
    assert code == 0 and (tmp_path / "plots" / "channels.png").is_file()
    assert not (tmp_path / "plots" / "int4_share.png").exists()
    (bare / "calibration.safetensors").write_bytes(b"nothing of the kind")
    complains(capsys, "calibration.safetensors: cannot be read", "inspect", bare)


def test_schemes_that_need_calibration_cannot_be_asked_to_do_without(capsys, converted, tmp_path):
    command = ("convert", converted / "source", tmp_path / "out", "--calibration", "none")
    complains(capsys, "--calibration none: scheme 'flattenquant' needs calibration data", *command)
    code, out, _ = run(capsys, *command, "--scheme", "w4a16", "--dry-run")
    assert code == 0 and "Calibration: none." in out


def test_schemes_lists_every_preset(capsys):
    code, out, _ = run(capsys, "schemes")
    assert code == 0 and all(name in out for name in PRESETS)


@pytest.mark.parametrize("command", [[], ["convert"], ["eval"], ["generate"], ["inspect"], ["demo"], ["schemes"]])
def test_help_is_printed(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0 and "Usage" in out


def complains(capsys, message, *arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("fqjax: error: ") and err.count("\n") == 1
    for part in message if isinstance(message, list) else [message]:
        assert part in err


CONVERT_ERRORS = {
    "unknown scheme": (["--scheme", "w2a2"], "unknown scheme 'w2a2'"),
    "unknown field": (
        ["--set", "bits=3"],
        "--set bits=3: scheme 'flattenquant' has no setting 'bits'; its settings are: int4_share",
    ),
    "bad value": (["--set", "int4_share=2"], "int4_share=2: expected a number from 0 to 1"),
    "unmatched pattern": (["--ignore", "lm_tail"], "'lm_tail' matches no linear layer"),
    "bad pattern": (["--ignore", "("], "not a regular expression"),
    "no samples": (["--samples", "0"], "--samples 0"),
    "window too long for the text": (["--window", "100000"], "calibration.txt: the text has"),
    "window of one": (["--window", "1"], "window 1"),
    "unknown option": (["--bits", "3"], "--bits"),
    "not a number": (["--samples", "many"], "--samples"),
}


@pytest.mark.parametrize("case", CONVERT_ERRORS)
def test_bad_options_of_convert(capsys, checkpoint, text, tmp_path, case):
    options, message = CONVERT_ERRORS[case]
    before = sorted(tmp_path.rglob("*"))
    complains(capsys, message, "convert", checkpoint, tmp_path / "out", "--calibration", text, *options)
    assert sorted(tmp_path.rglob("*")) == before


def _truncate(source):
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-50])


SOURCE_ERRORS = {
    "not a model": (lambda s: (s / "config.json").unlink(), "no config.json"),
    "architecture": (
        lambda s: (s / "config.json").write_text('{"architectures": ["T5Model"]}'),
        ["T5Model is not supported", "LlamaForCausalLM", "OPTForCausalLM"],
    ),
    "missing shard": (lambda s: (s / "model-00001-of-00002.safetensors").unlink(), "missing shard"),
    "truncated shard": (_truncate, "model-00002-of-00002.safetensors: truncated"),
    "missing tensor": (lambda s: edit_tensor(s, "model.norm.weight", lambda _: None), "'model.norm.weight' is missing"),
    "wrong shape": (
        lambda s: edit_tensor(s, "model.norm.weight", lambda t: t[:-1].copy()),
        "'model.norm.weight' has shape (47,), config.json implies (48,)",
    ),
    "not finite": (lambda s: edit_tensor(s, "model.norm.weight", lambda t: t * np.nan), "not finite"),
}


@pytest.mark.parametrize("case", SOURCE_ERRORS)
def test_bad_sources_of_convert(capsys, checkpoint, text, tmp_path, case):
    spoil, message = SOURCE_ERRORS[case]
    spoil(checkpoint)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["convert", checkpoint, tmp_path / "out", "--calibration", text, "--samples", 2, "--window", 64]
    complains(capsys, message, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b" \n", "empty"),
        (b"short", "for one window"),
        (b"\xff\xfe\xfa", "UTF-8"),
    ],
)
def test_bad_calibration_files(capsys, checkpoint, tmp_path, content, message):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    complains(capsys, ["words.txt", message], "convert", checkpoint, tmp_path / "out", "--calibration", path)
    assert not (tmp_path / "out").exists()


def test_no_such_directory(capsys, tmp_path):
    complains(capsys, "absent: no such directory", "convert", tmp_path / "absent", tmp_path / "out")
    complains(capsys, "absent: no such directory", "inspect", tmp_path / "absent")


def test_an_output_directory_that_exists(capsys, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    complains(capsys, "out: exists already", "convert", checkpoint, tmp_path / "out")


def test_a_checkpoint_of_a_newer_format(capsys, converted, tmp_path):
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "fqjax.json").write_text('{"format": "fqjax", "format_version": 99}')
    complains(capsys, "format version 99", "inspect", newer)
    complains(capsys, "format version 99", "generate", newer, "--prompt", "x")


def test_neither_kind_of_model(capsys, tmp_path, converted):
    complains(capsys, ["neither fqjax.json", "config.json"], "inspect", tmp_path)


def test_bad_requests_of_the_other_commands(capsys, converted, tmp_path):
    out = converted / "out"
    complains(capsys, "no such file", "eval", out, "--text", tmp_path / "none.txt")
    complains(capsys, "--text", "eval", out)
    complains(capsys, "--kv-cache int2: expected int8", "generate", out, "--prompt", "x", "--kv-cache", "int2")
    complains(capsys, "--kv-cache fp8: expected int8", "eval", out, "--text", tmp_path / "x", "--kv-cache", "fp8")
    complains(capsys, "top_p 2.0", "generate", out, "--prompt", "x", "--top-p", 2)
    complains(capsys, "max_new_tokens 0", "generate", out, "--prompt", "x", "--max-new-tokens", 0)
    complains(capsys, "max_new_tokens 9999999999", "generate", out, "--prompt", "x", "--max-new-tokens", 9999999999)
    complains(capsys, "temperature inf", "generate", out, "--prompt", "x", "--temperature", "inf")
    complains(capsys, "directory does not exist", "inspect", out, "--json", tmp_path / "no" / "where.json")
    complains(capsys, "a directory; expected a file", "inspect", out, "--json", tmp_path)
    complains(capsys, "no quantized layer", "inspect", converted / "source", "--plot", tmp_path / "plots")
    (tmp_path / "file").write_text("mine")
    complains(capsys, "file: no directory; expected one", "inspect", out, "--plot", tmp_path / "file")
    complains(capsys, r"holds '\udcff', which is no character", "generate", out, "--prompt", "a\udcff")
    complains(capsys, "No such command", "explain")


def test_the_installed_command_runs_and_exits_with_2():
    result = subprocess.run(
        [sys.executable, "-m", "fqjax", "inspect", "/no/such/place"], capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not result.stdout


def test_an_interruption_says_so(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fqjax.presets.resolve_scheme", interrupt)
    code, _, err = run(capsys, "convert", "a", "b")
    assert code == 130 and err == "fqjax: interrupted\n"


def test_an_interrupted_conversion_says_how_to_go_on(capsys, checkpoint, text, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fqjax.convert.run.convert", interrupt)
    options = ("--scheme", "w8a8", "--calibration", text, "--window", 64, "--samples", 2)
    code, _, err = run(capsys, "convert", checkpoint, tmp_path / "out", *options)
    assert code == 130 and err.count("\n") == 1 and "out.partial: go on with --resume" in err


def test_the_version_is_printed(capsys):
    assert run(capsys, "--version") == (0, f"fqjax {__version__}\n", "")
