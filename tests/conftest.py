"""How the suite runs: a thread a process, on every core, and a file that is named in the process that was asked."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported, and for every process that a test starts. More threads than cores make each wait for others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST_WORKERS = 8


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of ``-n auto``: none where only files are named, whose tests then run here."""
    if all(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return 0
    return min(os.cpu_count() or 1, MOST_WORKERS)


@pytest.fixture(autouse=True, scope="session")
def called_as_the_script() -> Iterator[None]:
    """Messages begin with the name of the command that runs; for tests that call it inside this process, ``run.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipes/bissl/run.py"])
        yield
