"""What messages call the running command, and what they advise to type."""

import io
import sys

import pytest
from rich.console import Console

from recipes.experiment.terminal import command_line, command_name, counted, printable, say


@pytest.mark.parametrize(
    ("started", "name", "again"),
    [
        ("recipes/bissl/run.py", "run.py", "python recipes/bissl/run.py"),
        ("/a b/run.py", "run.py", "python '/a b/run.py'"),
        ("/environment/bin/bissl", "bissl", "bissl"),
    ],
)
def test_the_command_in_use(started: str, name: str, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [started, "data"])
    assert command_name() == name
    assert command_line() == again


def test_control_characters_are_shown_not_sent() -> None:
    assert printable("a\x1b[2J\tb\n") == "a\\x1b[2J\tb\n"


def test_a_line_is_said_as_it_is() -> None:
    shown = io.StringIO()
    say(Console(file=shown, width=20), "[bold]a path/of/more/than/twenty/columns\x1b[2J")
    assert shown.getvalue() == "[bold]a path/of/more/than/twenty/columns\\x1b[2J\n"


def test_one_thing_and_several() -> None:
    assert [counted(count, "picture") for count in (0, 1, 1200)] == ["0 pictures", "1 picture", "1,200 pictures"]
