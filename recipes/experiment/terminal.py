"""Text on a terminal: names and files shown safely, numbers of things, and how the running command is called."""

import shlex
import sys
from pathlib import Path

from rich.console import Console


def printable(text: str) -> str:
    """`text` with control characters as their escapes: a terminal takes some of them for commands."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def say(console: Console, line: str) -> None:
    """Print a line as it is: brackets are no markup, and a path is not broken."""
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """Such as "1 picture" and "1,200 pictures"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def command_name() -> str:
    """The name of the installed command or script that runs, with which its messages begin."""
    return Path(sys.argv[0]).name


def command_line() -> str:
    """What to type to start the same command or script again."""
    return f"python {shlex.quote(sys.argv[0])}" if sys.argv[0].endswith(".py") else command_name()
