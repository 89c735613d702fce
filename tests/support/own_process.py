"""A function in a process of its own: for signals, limits and forks, none of which may reach the one that tests."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.support.paths import ROOT


def in_own_process(function: Callable[..., Any], *words: str, seconds: float = 240.0) -> tuple[int, str, str]:
    """The exit code, output and errors of a new Python that calls `function`, of a module's top level, with `words`."""
    program = f"import sys; from {function.__module__} import {function.__name__} as call; call(*sys.argv[1:])"
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    return done.returncode, done.stdout, done.stderr
