"""The parts of ``make gpu``: commands in processes of their own, each with its seconds, its figures and its end.

A process that breaks its GPU's context, runs out of memory or hangs takes nothing from the others.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000
"""Characters that are kept of what a failing part has written."""


@dataclass(frozen=True)
class Part:
    """A command that leaves figures in a file.

    Attributes:
        name: in the record.
        title: on the page.
        share: of the seconds for all parts that it may take.
        command: arguments of python, given the file to write.
        read: the figures from that file.
        fault: what is wrong with the figures of a command that ended well, None where nothing is.
    """

    name: str
    title: str
    share: float
    command: Callable[[Path], Sequence[str]]
    read: Callable[[Path], Any]
    fault: Callable[[Any], str | None] = lambda figures: None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def run_part(part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    """The part's record: ``outcome`` (ok, failed or out of time), ``seconds``, ``message`` and ``figures``.

    Args:
        folder: for its files.
        seconds: it may take.
    """
    file, log, began = folder / f"{part.name}.out", folder / f"{part.name}.log", time.monotonic()
    with log.open("wb") as output:
        code = _run([sys.executable, *part.command(file)], output, seconds)
    figures, message = None, None
    try:
        figures = part.read(file)
        message = part.fault(figures)
    except (OSError, ValueError) as error:
        message = f"it left no figures ({error.strerror if isinstance(error, OSError) else error})"
    if code is None:
        message = f"not finished within {seconds:.0f} s"
    elif code != 0 and message is None:
        message = f"it ended with exit code {code}"
    elif code != 0:
        message = f"{message}; it ended with exit code {code}"
    outcome = "ok" if message is None else "out of time" if code is None else "failed"
    record = {"title": part.title, "outcome": outcome, "seconds": time.monotonic() - began, "message": message}
    written = log.read_text(encoding="utf-8", errors="replace")[-TAIL:] if outcome != "ok" else ""
    return {**record, "figures": figures, "written": _without_paths(written)}


def _run(command: Sequence[str], output: Any, seconds: float) -> int | None:
    """The exit code of a command, None where its time was over; then all its processes are ended."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(":"),
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Its session: workers of a killed test or of a benchmark that failed would go on computing.
        _end_session(process)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _without_paths(text: str) -> str:
    """The text without the folder of this checkout, and without that of the interpreter."""
    for folder, name in ((str(ROOT) + os.sep, ""), (sys.prefix + os.sep, "")):
        text = text.replace(folder, name)
    return text


def read_outcomes(path: Path) -> dict[str, Any]:
    """Lines of `outcomes.py`, counted by outcome."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds = ("passed", "failed", "skipped")
    return {**{kind: sum(line["outcome"] == kind for line in lines) for kind in kinds}, "tests": lines}


def failed_tests(figures: Mapping[str, Any]) -> str | None:
    """What is wrong with tests: one has failed, or none has passed."""
    if figures["failed"]:
        return f"{figures['failed']} of {len(figures['tests'])} tests failed"
    return None if figures["passed"] else "no test has passed"
