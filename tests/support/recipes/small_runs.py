"""Runs of the recipe that take a second, and readers of what they leave."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from bilevel import Trainer
from recipes.bissl.commands.main import main
from recipes.bissl.commands.parsing import parse
from recipes.bissl.outcome.open_run import compute_device
from recipes.bissl.outcome.pipeline import Pipeline
from recipes.bissl.outcome.side_by_side import all_stages
from recipes.bissl.settings.config import Config
from recipes.bissl.settings.run_directory import PROJECT
from recipes.bissl.training.compute import Computing
from recipes.bissl.training.costs import artifact_store
from recipes.bissl.training.datasets import Datasets
from recipes.bissl.training.image_batches import Batches
from recipes.bissl.training.stages import bissl, finetune, head, pretext
from recipes.experiment.artifacts import Artifact
from recipes.experiment.workspace import Workspace

# Two pretext batches an epoch, two labelled ones, a checkpoint inside every stage.
SMALL = {
    "threads": 1,
    "jobs": 1,
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
    "bissl.hvp": "reverse",
    "bissl.solver-iterations": 2,
    # A system near the identity: two iterations of CG cannot make its residual grow tenfold, whatever the last digits.
    "bissl.damping": 50,
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


def small_pipeline(folder: Path, config: Config) -> Pipeline:
    computing = Computing(config.compute, compute_device(config))
    workspace = Workspace(folder, artifact_store(folder / "checkpoints"), Console(quiet=True), config.tracking, PROJECT)
    return Pipeline(config, Datasets(config), computing, workspace)


def batches_of(pipeline: Pipeline) -> Batches:
    """Those of the method at the first seed."""
    return Batches(pipeline.at("bissl", pipeline.config.seed), pipeline.data, pipeline.computing)


def execute(*arguments: str) -> int:
    """Exit code of a small run with these arguments."""
    try:
        return main([*SMALL_OPTIONS, *arguments])
    except SystemExit as stop:
        return int(str(stop.code))


def leave_out_report(patch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run."""
    patch.setattr(all_stages, "write_report", lambda folder: folder)


def whole_run(folder: Path, *arguments: str) -> Path:
    """The folder of a run that nothing interrupts, without its report."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_report(patch)
        assert execute("--output-dir", str(folder), *arguments) == 0
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


def without(values: Any, names: Iterable[str] = ("seconds", "waiting")) -> Any:
    """The same JSON value without the fields that measure time."""
    if isinstance(values, dict):
        return {key: without(value, names) for key, value in values.items() if key not in names}
    return [without(value, names) for value in values] if isinstance(values, list) else values


def weights(folder: Path) -> dict[str, bytes]:
    """The weights of every finished stage, by its folder's name, byte for byte."""
    return {path.parent.name: path.read_bytes() for path in folder.rglob("weights.safetensors")}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def before_steps(patch: pytest.MonkeyPatch, stage: str, hook: Callable[[], None]) -> None:
    """Call `hook` before every step of a stage, in the bilevel one before every upper step."""
    if stage == "bissl":
        real = Trainer._upper_step

        def upper_step(self: Trainer, *given: Any) -> None:
            hook()
            real(self, *given)

        patch.setattr(Trainer, "_upper_step", upper_step)
        return
    plain = STAGES[stage].gradient_of

    def gradient_of(*given: Any) -> Callable[[Any], Any]:
        derivatives = plain(*given)

        def hooked(batch: Any) -> Any:
            hook()
            return derivatives(batch)

        return hooked

    patch.setattr(STAGES[stage], "gradient_of", gradient_of)


def stop_at(call: int) -> Callable[[], None]:
    """A Ctrl-C when it is called for the given time."""
    calls = [0]

    def hook() -> None:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt

    return hook


STAGES: dict[str, ModuleType] = {"pretext": pretext, "head": head, "bissl": bissl, "finetune": finetune}


def run_stage(pipeline: Pipeline, stage: str, parent: Artifact | None = None) -> Artifact:
    """One stage of the method at the first seed."""
    repeat = pipeline.at("bissl", pipeline.config.seed)
    if stage == "pretext":
        return pipeline.pretext(repeat)
    if stage == "finetune":
        return pipeline.finetune(repeat, parent)
    assert parent is not None
    return (pipeline.head if stage == "head" else pipeline.bissl)(repeat, parent)


def run_all(pipeline: Pipeline) -> dict[str, Artifact]:
    made: dict[str, Artifact] = {}
    last = None
    for stage in STAGES:
        made[stage] = last = run_stage(pipeline, stage, last)
    return made


def part(artifact: Artifact, name: str) -> dict[str, Tensor]:
    tensors = artifact.tensors()
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def of_stage(folder: Path, stage: str, event: str) -> list[dict[str, Any]]:
    return [line for line in events(folder) if (line["stage"], line["event"]) == (stage, event)]
