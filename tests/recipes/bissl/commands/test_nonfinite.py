"""Numbers that go wrong in a run whose skips are allowed: its exit code, and where skipped steps are shown."""

import hashlib
import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.bissl.outcome.console_table import results_table
from recipes.bissl.outcome.report import write_report
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.training import supervised
from recipes.bissl.training.problem import BiSSLProblem
from recipes.bissl.training.stages import pretext
from tests.support.recipes.small_runs import (
    events,
    execute,
    leave_out_report,
    refused,
    results,
    whole_run,
)

SKIPS = "--nonfinite-skips=99"


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_report(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("whole") / "run", "--seeds=1")


def artifact(run: Path, stage: str) -> Path:
    return next((run / "checkpoints").glob(f"{stage}-*"))


def spoil(patch: pytest.MonkeyPatch, owner: Any, name: str, bad: Collection[int]) -> None:
    """NaN in place of what a loss gives at these calls."""
    real, calls = getattr(owner, name), [0]

    def spoilt(*given: Any, **options: Any) -> Tensor:
        calls[0] += 1
        return real(*given, **options) * (math.nan if calls[0] - 1 in bad else 1.0)

    patch.setattr(owner, name, spoilt)


STAGES: dict[str, tuple[list[str], Any, str, str]] = {
    # Command, whose loss, and the level that is named; a small stage has 4, 4, 4, 4 and 8 steps.
    "pretext": (["pretext"], pretext, "pretext_loss", "pretext train: the last 4 of 4"),
    "head": (["head", "pretext"], Classification, "loss", "head train: the last 4 of 4"),
    "lower": (["bissl", "head"], BiSSLProblem, "lower_objective", "bissl lower: the last 4 of 4"),
    "upper": (["bissl", "head"], BiSSLProblem, "upper_objective", "bissl upper: the last 4 of 4"),
    "finetune": (["finetune", "bissl"], Classification, "loss", "finetune train: the last 8 of 8"),
}


@pytest.mark.filterwarnings("ignore:non-finite")
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_skips_all_of_its_steps_ends_with_the_code_for_it(
    stage: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command, *parent), owner, name, said = STAGES[stage]
    given = ["--from", str(artifact(whole, parent[0]))] if parent else []
    spoil(monkeypatch, owner, name, range(10**6))
    arguments = [command, *given, "--output-dir", str(tmp_path / "run"), SKIPS]
    for again in ([], ["--resume"]):
        assert execute(*arguments, *again) == 3
        error = capsys.readouterr().err
        assert error.startswith(
            f"run.py: stopped: {said} steps were left out, as their loss or gradient was not finite"
        )
    assert not list((tmp_path / "run" / "checkpoints").glob("*/artifact.json"))


def test_skipped_steps_stand_beside_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, pretext, "pretext_loss", [1])
    spoil(monkeypatch, BiSSLProblem, "lower_objective", [0])
    folder = tmp_path / "run"
    assert execute("--output-dir", str(folder), SKIPS) == 0
    found = results(folder)["variants"]
    skipped = [line for line in events(folder) if "skipped" in line]
    assert {(line["stage"], line["event"]) for line in skipped} == {("pretext", "train"), ("bissl", "lower")}
    assert found["bissl"]["skipped_pretext_steps"] == 2
    assert "skipped_label_steps" not in found["bissl"]
    assert not [name for name in found["baseline"] if "skipped" in name]
    facts = {stage: json.loads((artifact(folder, stage) / "artifact.json").read_text()) for stage in ("head", "bissl")}
    assert facts["head"]["skipped_pretext_steps"] == 1
    assert facts["bissl"]["skipped_pretext_steps"] == 2
    console = Console(width=200, record=True)
    console.print(results_table(results(folder)))
    assert "8 (2 skipped)" in console.export_text()
    assert "<td>8 (2 skipped)</td>" in re.sub(r"<td[^>]*>", "<td>", write_report(folder).read_text())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_validation_that_is_never_finite_gives_no_tested_model(
    wrong: float, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = supervised.evaluate
    monkeypatch.setattr(supervised, "evaluate", lambda *given, **options: {**real(*given, **options), "loss": wrong})
    arguments = ["finetune", "--from", str(artifact(whole, "bissl")), "--output-dir", str(tmp_path / "run")]
    for again in ([], ["--resume"]):
        assert execute(*arguments, *again) == 3
        said = capsys.readouterr().err
        assert "stopped: finetune: the loss on the validation set was not finite after any of 2 evaluations" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*/artifact.json"))


def test_an_epoch_whose_validation_is_finite_is_the_best_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = supervised.evaluate, [0]

    def evaluate(*given: Any, **options: Any) -> dict[str, float]:
        """The first one says 100% of a network whose outputs are no numbers."""
        calls[0] += 1
        values = real(*given, **options)
        return {**values, "loss": math.nan, "top1": 100.0} if calls[0] == 1 else values

    monkeypatch.setattr(supervised, "evaluate", evaluate)
    options = "--seeds=1", "--from", str(artifact(whole, "bissl")), "--output-dir", str(tmp_path / "run")
    assert execute("finetune", *options) == 0
    facts = json.loads((artifact(tmp_path / "run", "finetune") / "artifact.json").read_text())
    assert facts["best"]["epoch"] == 4


def test_an_artifact_that_is_not_finite_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, file = artifact(whole, "bissl"), tmp_path / "artifact" / "weights.safetensors"
    file.parent.mkdir()
    tensors = load_file(made / "weights.safetensors")
    tensors["backbone.conv1.weight"][0, 0, 0, 0] = math.nan
    save_file(tensors, file)
    facts = json.loads((made / "artifact.json").read_text())
    (file.parent / "artifact.json").write_text(
        json.dumps({**facts, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    )
    said = refused(capsys, "finetune", "--from", str(file.parent), "--output-dir", str(tmp_path / "run"))
    assert f"{file.parent}: the weights of 'backbone' hold NaN or infinity in conv1.weight" in said
    assert not (tmp_path / "run").exists()
