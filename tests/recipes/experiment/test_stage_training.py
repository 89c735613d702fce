"""A training within a stage: exact continuation, its events and time, and steps that are not finite."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bilevel import BatchStack, Level, Params
from bilevel.training import Callback, NonFiniteError, SingleLevelTrainer, gradient_of
from recipes.experiment.artifacts import ArtifactStore
from recipes.experiment.events import StageEvents
from recipes.experiment.stage import Attempt
from recipes.experiment.stage_training import Seconds, run_training
from recipes.experiment.workspace import Workspace

BAD = 7


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Recorder(Callback):
    """Batches and states, step by step."""

    def __init__(self, fit: "Fit") -> None:
        self.fit, self.steps = fit, []

    def on_progress(self, trainer: Any) -> None:
        self.steps.append(trainer.progress)


class Fit:
    """A network with BatchNorm and dropout on 12 points."""

    def __init__(self, folder: Path, *, bad: bool = False, skips: int = 0, check: Callable[[], None] = lambda: None):
        torch.manual_seed(0)
        self.folder, self.skips, self.check = folder, skips, check
        folder.mkdir(exist_ok=True)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.points = torch.randn(12, 3)
        if bad:
            self.points[BAD] = math.nan
        self.stack = BatchStack(12, 4, lambda indices, seed: self.points[indices], seed=3)
        self.seen: list[tuple[list[int], dict[str, Tensor], float]] = []
        self.recorder = Recorder(self)

    def loss(self, batch: Tensor) -> Tensor:
        indices = self.stack.last_indices
        assert indices is not None
        state = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        self.seen.append((indices.tolist(), state, self.optimizer.param_groups[0]["lr"]))
        return self.net(batch).square().mean()

    def make(self, callbacks: Sequence[Callback]) -> SingleLevelTrainer:
        variables: Params = dict(self.net.named_parameters())
        self.optimizer = torch.optim.SGD(list(variables.values()), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        level = Level(variables, self.optimizer, self.stack, scheduler=scheduler)
        return SingleLevelTrainer(
            gradient_of(self.loss, variables),
            level,
            self.total,
            parts={"net": self.net},
            callbacks=callbacks,
            nonfinite_skips=self.skips,
        )

    def run(self, total: int, every: int = 1) -> SingleLevelTrainer:
        self.total = total
        trainer, _ = run_training(
            self.make,
            "fit",
            events=StageEvents(self.folder / "metrics.jsonl", {"stage": "fit", "variant": "a", "seed": 0}),
            attempt=Attempt(self.folder / "stage", self.check),
            workspace=Workspace(self.folder, ArtifactStore(self.folder), Console(quiet=True)),
            checkpoint_every=every,
            callbacks=[self.recorder],
        )
        return trainer

    def same(self, other: "Fit") -> bool:
        pairs = zip(self.net.state_dict().values(), other.net.state_dict().values(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


class Taken(Exception):
    """Another process has taken the work over."""


def taken_at(call: int) -> Callable[[], None]:
    calls = [0]

    def check() -> None:
        calls[0] += 1
        if calls[0] == call:
            raise Taken

    return check


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9, 11])
def test_an_interrupted_training_continues_exactly(tmp_path: Path, stop: int) -> None:
    whole = Fit(tmp_path / "whole")
    whole.run(11, every=4)
    parts = tmp_path / "parts"
    first = Fit(parts, check=taken_at(stop))
    (parts / "metrics.jsonl").write_text('{"stage": "earlier", "variant": "a", "seed": 0}\n')
    with pytest.raises(Taken):
        first.run(11, every=4)
    # Who was taken over writes no event of the step any more.
    assert len(lines(parts / "metrics.jsonl")) == stop
    again = Fit(parts)
    # Whatever happens in between, also to the generators.
    torch.manual_seed(99)
    again.run(11, every=4)
    assert again.same(whole)
    assert again.recorder.steps == list(range((stop - 1) // 4 * 4 + 1, 12))
    both = [lines(folder / "metrics.jsonl") for folder in (parts, tmp_path / "whole")]
    shares = [line.pop("waiting") for part in both for line in part if line.pop("seconds", None) is not None]
    assert both[0][1:] == both[1]
    assert len(shares) == 2
    assert all(0.0 <= share <= 1.0 for share in shares)


def test_seconds_add_up_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    first = Seconds()
    now[0] += 5
    state = first.state_dict()
    now[0] += 1000
    second = Seconds()
    now[0] += 7
    second.load_state_dict(state)
    now[0] += 2
    assert second.total() == 7.0


def test_the_first_that_is_not_finite_stops_and_names_the_file(tmp_path: Path) -> None:
    fit = Fit(tmp_path, bad=True)
    with pytest.raises(
        NonFiniteError, match=r"fit step \d: loss nan.*no variable was changed; .*inspect/fit-a-seed-0-train-step"
    ):
        fit.run(6)
    indices, before, _ = fit.seen[-1]
    assert BAD in indices
    assert all(torch.equal(parameter, before[name]) for name, parameter in fit.net.named_parameters())
    (path,) = (tmp_path / "inspect").iterdir()
    assert path.name == f"fit-a-seed-0-train-step-{len(fit.seen)}.pt"
    saved = torch.load(path, weights_only=True)
    assert (saved["indices"], saved["step"]) == (indices, len(fit.seen))
    variables = saved["levels"]["train"]["variables"]
    assert all(torch.equal(variables[name], before[name]) for name in variables)
    assert saved["levels"]["train"]["optimizer"]["param_groups"][0]["momentum"] == 0.9


def test_as_many_are_left_out_as_allowed(tmp_path: Path) -> None:
    fit = Fit(tmp_path / "a", bad=True, skips=2)
    trainer = fit.run(6)
    bad = [number for number, (indices, _, _) in enumerate(fit.seen) if BAD in indices]
    assert len(bad) == 2, "each point is met once an epoch of three batches"
    assert trainer.skipped == {"train": 2}
    for number in bad:
        if number + 1 < 6:
            _, before, rate = fit.seen[number]
            _, after, later = fit.seen[number + 1]
            assert all(torch.equal(before[name], after[name]) for name in before), "statistics too"
            assert rate == later
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fit.net.state_dict().values())
    skipped = [line for line in lines(tmp_path / "a" / "metrics.jsonl") if "skipped" in line]
    assert [line["step"] for line in skipped] == [number + 1 for number in bad]
    assert all(line["loss"] is None for line in skipped)
    assert len(list((tmp_path / "a" / "inspect").iterdir())) == 2
    with pytest.raises(NonFiniteError):
        Fit(tmp_path / "b", bad=True, skips=1).run(6)


def test_skips_are_counted_over_a_resume(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            Fit(tmp_path, bad=True, skips=1).run(6)
    # Allowing one more continues where the run stopped.
    again = Fit(tmp_path, bad=True, skips=2)
    again.run(6)
    whole = Fit(tmp_path / "whole", bad=True, skips=2)
    whole.run(6)
    assert again.same(whole)
