"""Malformed options of the command line."""

import pytest

from fqjax.cli.main import main

OPTIONS = {
    "generate M --prompt A": {
        "--max-new-tokens": ["0", "-1", "1e3", "1.5", "nan", "", str(10**30), str(2**31)],
        "--temperature": ["nan", "inf", "-1", "x", "", "1e-40", "1e300"],
        "--top-p": ["nan", "inf", "0", "1.5", "x", "-1"],
        "--seed": ["1.5", "x", "nan", ""],
        "--kv-cache": ["int4", "", "INT8"],
    },
    "eval M --text F": {"--window": ["0", "1", "-5", "x", "1.5", "nan"], "--windows": ["0", "-1", "x", "nan"]},
    "convert M out": {
        "--samples": ["0", "-1", "x", "1.5"],
        "--window": ["0", "1", "-5", "x"],
        "--set": [
            "",
            "x",
            "x=1",
            "sample_rows=-1",
            "sample_rows=nan",
            "int4_share=nan",
            "int4_share=2",
            "alpha=inf",
            "head=3",
        ],
        "--scheme": ["", "x", "W8A8"],
    },
    "bench kernels": {"--rows": ["0", "-1", "x", "1.5"], "--shape": ["x", "0x1", "1x", "axb", "-1x128"]},
}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (command, option, value)
        for command, options in OPTIONS.items()
        for option, values in options.items()
        for value in values
    ],
)
def test_options_of_the_command_line(command, option, value, capsys, tmp_path, checkpoint_of_options):
    words = {
        "M": str(checkpoint_of_options),
        "F": str(checkpoint_of_options / "config.json"),
        "out": str(tmp_path / "out"),
    }
    code = main([*(words.get(word, word) for word in command.split()), option, value])
    shown = capsys.readouterr()
    assert code == 2 and not shown.out and shown.err.count("\n") == 1, shown
    named = {
        option,
        option.removeprefix("--"),
        option.removeprefix("--").replace("-", "_"),
        option.removeprefix("--")[:-1],
    }
    assert any(name in shown.err for name in named) or (value and value.split("=")[0] in shown.err), shown.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def checkpoint_of_options(tmp_path_factory):
    from tests.conftest import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("options") / "source")
