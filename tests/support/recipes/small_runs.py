"""Runs of the recipe that take a second, and readers of what they leave."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from recipes.bissl.commands.main import main
from recipes.bissl.commands.parsing import parse
from recipes.bissl.outcome import execution
from recipes.bissl.outcome.execution import compute_device
from recipes.bissl.settings.config import Config
from recipes.bissl.training.artifacts import artifact_store
from recipes.bissl.training.context import Context, Datasets
from recipes.bissl.training.stages import bissl, finetune, head, pretext
from recipes.experiment.artifacts import Artifact

# Two pretext batches an epoch, two labelled ones, a checkpoint inside every stage.
SMALL = {
    "threads": 1,
    "seeds": 2,
    "device": "cpu",
    "data.pretext-limit": 48,
    "data.labels-per-class": 3,
    "data.val-per-class": 2,
    "pretext.batch-size": 24,
    "pretext.epochs": 2,
    "pretext.warmup-epochs": 1,
    "pretext.monitor-every": 1,
    "pretext.checkpoint-every": 1,
    "downstream.batch-size": 16,
    "head.epochs": 2,
    "bissl.alternations": 2,
    "bissl.lower-steps": 2,
    "bissl.upper-steps": 2,
    "bissl.hessian-batches": 2,
    "bissl.solver": "cg",
    "bissl.solver-iterations": 2,
    "bissl.solver-rtol": "null",
    "bissl.aggregate": "false",
    "bissl.adaptation-every": 2,
    "bissl.checkpoint-every": 1,
    "bissl.lower-warmup-epochs": 1,
    "finetune.epochs": 4,
    "finetune.validate-every": 2,
    "finetune.checkpoint-every": 1,
}
SMALL_OPTIONS = [f"--{name}={value}" for name, value in SMALL.items()]


def small_config(*arguments: str) -> Config:
    return parse([*SMALL_OPTIONS, *arguments]).config


def small_context(folder: Path, config: Config) -> Context:
    metrics = folder / "metrics.jsonl"
    data = Datasets(config)
    return Context(
        config, compute_device(config), artifact_store(folder / "checkpoints"), metrics, data, Console(quiet=True)
    )


def execute(*arguments: str) -> int:
    """Exit code of a small run with these arguments."""
    try:
        return main([*SMALL_OPTIONS, *arguments])
    except SystemExit as stop:
        return int(str(stop.code))


def leave_out_report(patch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run."""
    patch.setattr(execution, "write_report", lambda folder: folder)


def whole_run(folder: Path) -> Path:
    """The folder of a run that nothing interrupts, without its report."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        assert execute("--output-dir", str(folder)) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message with which the command line is refused."""
    capsys.readouterr()
    code = execute(*arguments)
    output = capsys.readouterr()
    assert code == 2, output
    assert output.err.startswith("run.py: error: "), output.err
    assert output.err.count("error: ") == 1, output.err
    assert "Traceback" not in output.err + output.out
    return output.err


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without(values: Any, names: Iterable[str] = ("seconds",)) -> Any:
    """The same JSON value without the fields that measure time."""
    if isinstance(values, dict):
        return {key: without(value, names) for key, value in values.items() if key not in names}
    return [without(value, names) for value in values] if isinstance(values, list) else values


def weights(folder: Path) -> dict[str, bytes]:
    """The weights of every finished stage, by its folder's name, byte for byte."""
    return {path.parent.name: path.read_bytes() for path in folder.rglob("weights.safetensors")}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


STAGES: dict[str, ModuleType] = {"pretext": pretext, "head": head, "bissl": bissl, "finetune": finetune}


def run_all(context: Context) -> dict[str, Artifact]:
    made: dict[str, Artifact] = {}
    last = None
    for name, stage in STAGES.items():
        made[name] = last = stage.run(context, last)
    return made


def part(artifact: Artifact, name: str) -> dict[str, Tensor]:
    tensors = artifact.tensors()
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def of_stage(folder: Path, stage: str, event: str) -> list[dict[str, Any]]:
    return [line for line in events(folder) if (line["stage"], line["event"]) == (stage, event)]
