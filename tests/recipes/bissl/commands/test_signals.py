"""Signals end a run after its step, saved; SIGKILL at random moments loses nothing that a resumed run shows."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import passed, soak
from bilevel.nn.functional import in_curvature_pass
from recipes.bissl.commands.main import main
from recipes.bissl.outcome.side_by_side import all_stages
from recipes.bissl.training.problem import BiSSLProblem
from tests.support.recipes.small_runs import (
    SMALL_OPTIONS,
    before_steps,
    events,
    execute,
    leave_out_report,
    results,
    weights,
    whole_run,
    without,
)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_report(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    return whole_run(tmp_path_factory.mktemp("whole"))


def ringing(real: Callable[..., Any], number: signal.Signals, call: int) -> Callable[..., Any]:
    """`real`, whose call number `call` begins with a signal to this process."""
    calls = [0]

    def rung(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    return rung


def signalled(monkeypatch: pytest.MonkeyPatch, stage: str, number: signal.Signals, call: int, *options: str) -> int:
    """Exit code of a run in which a signal comes in step number `call` of a stage, or in that product of solves."""
    with monkeypatch.context() as patch:
        if stage == "product":
            rung, real = ringing(lambda: None, number, call), BiSSLProblem.lower_objective

            def objective(self: BiSSLProblem, *args: Any) -> Any:
                if in_curvature_pass():
                    rung()
                return real(self, *args)

            patch.setattr(BiSSLProblem, "lower_objective", objective)
        else:
            before_steps(patch, stage, ringing(lambda: None, number, call))
        return execute(*options)


def assert_same_run(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert without(results(folder)) == without(results(whole))
    assert without(events(folder)) == without(events(whole))
    assert not list(folder.rglob("*.lease"))


# A signal in a step of BiSSL's upper level comes before its first product: that step is undone.
POINTS = [
    ("pretext", signal.SIGTERM, 3, "pretext", 3),
    ("pretext", signal.SIGUSR1, 4, "pretext", 4),
    ("head", signal.SIGINT, 1, "head", 1),
    ("bissl", signal.SIGTERM, 3, "upper", 2),
    ("finetune", signal.SIGUSR1, 7, "finetune", 7),
]


@pytest.mark.parametrize(("stage", "number", "call", "last", "step"), POINTS)
def test_the_step_is_finished_and_saved(
    stage: str,
    number: signal.Signals,
    call: int,
    last: str,
    step: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    arguments = "--output-dir", str(tmp_path)
    assert signalled(monkeypatch, stage, number, call, *arguments) == (130 if number == signal.SIGINT else 75)
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == (
        f"run.py: stopped by {number.name}, and saved; the same command with --resume continues"
    )
    assert "Traceback" not in said
    assert signal.getsignal(number) is before
    made = [line for line in events(tmp_path) if line["event"] in ("train", "upper")]
    assert (made[-1]["step"], last in (made[-1]["stage"], made[-1]["event"])) == (step, True)
    # No step that was finished is made again.
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    assert execute(*arguments, "--resume") == 0
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(lines)
    assert_same_run(tmp_path, whole)


def test_a_solve_ends_after_the_product(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--output-dir", str(tmp_path)
    # The second of the two batches of the first product; graphs are kept for later ones.
    assert signalled(monkeypatch, "product", signal.SIGTERM, 2, *arguments) == 75
    made = [line["event"] for line in events(tmp_path) if line["stage"] == "bissl"]
    assert made == ["lower", "lower"]
    assert execute(*arguments, "--resume") == 0
    assert_same_run(tmp_path, whole)


def test_between_stages_signals_act_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_stages, "summarise", ringing(all_stages.summarise, signal.SIGTERM, 1))
    assert execute("--output-dir", str(tmp_path)) == 75
    assert not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    leave_out_report(monkeypatch)
    assert execute("--output-dir", str(tmp_path), "--resume") == 0
    assert results(tmp_path)["variants"]


def test_a_trial_of_a_search_is_saved_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
    options = [*SMALL_OPTIONS, "--arm", "scratch", "--trials", "2", "--lr-range", "0.01", "0.1"]
    assert main(["search", *options, "--output-dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        before_steps(patch, "finetune", ringing(lambda: None, signal.SIGTERM, 3))
        assert main(["search", *options, "--output-dir", str(tmp_path / "a")]) == 75
    assert list((tmp_path / "a").glob("trials/*/step-00000003.json"))
    assert not list(tmp_path.rglob("*.lease"))
    assert main(["search", *options, "--output-dir", str(tmp_path / "a")]) == 0
    whole, resumed = (json.loads((tmp_path / name / "selection.json").read_text())["trials"] for name in ("whole", "a"))
    assert [trial | {"seconds": 0} for trial in resumed] == [trial | {"seconds": 0} for trial in whole]


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "2 bad input",
        "3 losses or gradients",
        "74 files",
        "75 stopped by SIGTERM or SIGUSR1",
        "130 stopped by Ctrl-C",
    ):
        assert words in said


def test_killed_three_times_and_resumed(tmp_path: Path) -> None:
    figures = soak(SMALL_OPTIONS, 3, 5, tmp_path)
    assert figures["kills"] >= 2, figures
    assert figures["stages"] == 8
    assert passed(figures), figures
