"""Options of subcommands that are wrong: one message, in the words of the command line."""

import pytest

from recipes.bissl.commands.main import main

WRONG = {
    ("table",): "the following arguments are required: RUN_DIR",
    ("table", "x", "--paper-version=v3"): "argument --paper-version: invalid choice: 'v3'",
    ("figure2",): "the following arguments are required: --epochs",
    ("features", "x", "--seed=y"): "argument --seed: invalid int value: 'y'",
    ("features", "x", "--max=5"): "unrecognized arguments: --max=5",
    ("export", "x"): "the following arguments are required: --to",
    ("export", "x", "--to=y", "--stage=z"): "argument --stage: invalid choice: 'z'",
    ("data",): "the following arguments are required: list | verify | download",
    ("data", "frob"): "argument list | verify | download: invalid choice: 'frob'",
    ("data", "verify", "--sampl=3"): "unrecognized arguments: --sampl=3",
    ("data", "verify", "--all", "--sample=3"): "argument --sample: not allowed with argument --all",
    ("search", "--workers=x"): "argument --workers: invalid int value: 'x'",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_option_is_said_in_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"run.py: error: {WRONG[arguments]}")
    assert said.err.endswith("; --help lists all options\n")
    assert said.err.count("\n") == 1
