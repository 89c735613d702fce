"""What may be imported before there is work to do: nothing that takes a large part of the time that torch takes.

Times are in benchmarks/results/startup.json, and the guard compares them with those of a commit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.guard.commands import COMMANDS, OUTPUT
from tests.support.paths import ROOT

HEAVY = {
    *("torchvision", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.utils.tensorboard"),
    *("scipy", "sklearn", "sympy", "pandas", "pyarrow", "datasets", "matplotlib", "torchmetrics", "timm", "optuna"),
}
RECIPES = {"pydantic", "pydantic_settings", "jinja2", "safetensors", "PIL"}
"""What a user of the core may not even have."""
CHILD = """
import json, os, runpy, sys
sys.argv[:] = json.loads(sys.argv[1])
what, where = sys.argv.pop(0), sys.argv[0]
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
try:
    if what == "-c":
        exec(sys.argv.pop(0))
    elif what == "-m":
        runpy.run_module(where, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(where, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)), file=answers)
"""


MISSING = """
import runpy, sys
sys.modules[sys.argv.pop(1)] = None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def loaded(command: tuple[str, ...], folder: Path) -> set[str]:
    """The modules that a process has when a command has ended."""
    given = [argument.replace(OUTPUT, str(folder)) for argument in command]
    arguments = given if given[0].startswith("-") else ["", *given]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return loaded(("-c", "import torch"), tmp_path_factory.mktemp("torch"))


CLEANING = {
    "cleaning --help": ("recipes/cleaning/run.py", "--help"),
    "cleaning --dry-run": ("recipes/cleaning/run.py", "--dry-run", "--output-dir", OUTPUT),
}


@pytest.mark.parametrize("command", [*COMMANDS.values(), *CLEANING.values()], ids=[*COMMANDS, *CLEANING])
def test_nothing_heavy_is_imported_before_it_is_needed(
    command: tuple[str, ...], of_torch: set[str], tmp_path: Path
) -> None:
    found = loaded(command, tmp_path) - of_torch
    assert any(name.startswith("bilevel.") for name in found)
    assert not found & HEAVY
    if command[0].startswith("-"):
        assert not found & RECIPES


def test_what_is_heavy_is_seen(of_torch: set[str], tmp_path: Path) -> None:
    assert {"torchvision", "scipy"} <= loaded(("-c", "import torchvision, scipy.stats"), tmp_path) - of_torch


@pytest.mark.parametrize("recipe", ["bissl", "cleaning"])
@pytest.mark.parametrize("package", ["torchvision", "scipy", "pydantic"])
def test_what_is_missing_is_said_at_once_although_it_is_imported_later(
    package: str, recipe: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISSING, package, str(ROOT / "recipes" / recipe / "run.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"run.py: error: {package} is not installed; what the recipes need comes with pip ")
    assert done.stderr.count("\n") == 1
