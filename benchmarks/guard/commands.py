"""Commands that should start quickly, and a process timed from its start to its end."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import children_processor_seconds, environment_alone

OUTPUT = "{output}"
"""In a command: a folder that it may write to."""
IMPORT_TORCH = ("-c", "import torch")
RUN = "recipes/bissl/run.py"
COMMANDS: dict[str, tuple[str, ...]] = {
    "import bilevel": ("-c", "import bilevel"),
    "bilevel.compare --help": ("-m", "bilevel.compare", "--help"),
    "run.py --help": (RUN, "--help"),
    "run.py --dry-run": (RUN, "--dry-run", f"--output-dir={OUTPUT}"),
}
"""Arguments of Python, in the folder of a checkout."""
TIMEOUT = 600.0
"""Seconds after which a child process is taken to hang."""


class ChildError(RuntimeError):
    """A child process could not do what it was asked for; the message is its own last words."""


@dataclass(frozen=True)
class Seconds:
    """What something took: seconds of the processor, and of the clock."""

    processor: float
    clock: float


def last_words(said: str, code: int | None) -> str:
    """The last line that a child has printed to its standard error; for a traceback, the exception."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with exit code {code} and no word"


def run_timed(arguments: Sequence[str], tree: Path, threads: int) -> Seconds:
    """One run of this interpreter with `arguments` in the folder `tree`, from which it imports.

    Raises:
        ChildError: it did not end with exit code 0, or not in time.
    """
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        command = [sys.executable, *(argument.replace(OUTPUT, output) for argument in arguments)]
        used, began = children_processor_seconds(), time.perf_counter()
        try:
            code = subprocess.run(
                command,
                cwd=tree,
                env={**environment_alone(threads), "PYTHONPATH": str(tree)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=TIMEOUT,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise ChildError(f"it did not end within {TIMEOUT:.0f} seconds") from error
        taken = Seconds(children_processor_seconds() - used, time.perf_counter() - began)
        if code != 0:
            said.seek(0)
            raise ChildError(last_words(said.read(), code))
    return taken
