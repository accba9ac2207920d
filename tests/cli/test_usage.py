"""How options are shown by --help, and the nearest name for a misspelt one."""

import pytest

from fqjax.cli import main as cli

COMMANDS = ["", "convert", "export", "eval", "generate", "serve", "inspect", "demo", "schemes", "bench", "bench model"]


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_shown_without_a_value(capsys, command):
    assert cli.main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--help" in shown and "bool" not in shown.lower()
    flags = {"convert": ["--dry-run", "--resume"], "generate": ["--chat"], "": ["--version"]}.get(command, [])
    for flag in flags:
        (line,) = [line for line in shown.splitlines() if f" {flag} " in line]
        assert line.split(flag)[1].startswith("    ")  # Then its help, in the column after that of the values.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert a b --calibraton x", "No such option: --calibraton; did you mean '--calibration'?"),
        ("convert a b --dryrun", "No such option: --dryrun; did you mean '--dry-run'?"),
        ("--versoin", "No such option: --versoin; did you mean '--version'?"),
        ("bench kernels --shaep 1x1", "No such option: --shaep; did you mean '--shape'?"),
        ("convert a b --unheard-of", "No such option: --unheard-of"),
        ("convert a b -z", "No such option: -z"),
        ("convert a b --dry-run=true", "Option '--dry-run' does not take a value."),
    ],
)
def test_a_misspelt_option_is_told_the_nearest_name(capsys, arguments, message):
    assert cli.main(arguments.split()) == 2
    assert capsys.readouterr().err == f"fqjax: error: {message}\n"


@pytest.mark.parametrize(
    ("setting", "end"),
    [
        ("int4_shar=0.5", "int8_head, int8_layers; did you mean 'int4_share'?"),
        ("int8_layer=x", "; did you mean 'int8_layers'?"),
        ("bits=3", "int8_head, int8_layers"),
        ("rounding=gtpq", "rounding=gtpq: expected nearest or gptq; did you mean 'gptq'?"),
        ("selection=sensitivty", "expected 'sensitivity' or 'kl' or 'budget'; did you mean 'sensitivity'?"),
        ("head=itn8", "head=itn8: expected 'int8' or none; did you mean 'int8'?"),
        ("head=float", "head=float: expected 'int8' or none"),
        ("alpha=much", "alpha=much: expected a number from 0 to 1 or none"),
    ],
)
def test_a_misspelt_setting_is_told_the_nearest_name(capsys, setting, end):
    assert cli.main(["convert", "a", "b", "--set", setting]) == 2
    assert capsys.readouterr().err.endswith(f"{end}\n")
