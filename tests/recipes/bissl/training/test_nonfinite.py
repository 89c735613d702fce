"""Losses that are not finite: nothing is updated, what they were made of is saved, and some may be skipped."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bilevel import AlternatingSchedule, BatchStack
from bilevel.training import NonFiniteError
from bilevel.training.inspection import Inspect
from recipes.bissl.outcome import execution
from recipes.bissl.training.loop import optimizer_step, run_steps
from recipes.bissl.training.stages import pretext
from recipes.experiment.events import StageEvents
from tests.support.recipes.small_runs import events, execute, of_stage
from tests.support.two_heads import LOWER_BATCHES, make

BAD = 7


class Fit:
    """A network with BatchNorm on 12 points, one of which is NaN."""

    def __init__(self, folder: Path, skips: int) -> None:
        torch.manual_seed(0)
        self.folder, self.skips = folder, skips
        folder.mkdir(exist_ok=True)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.points = torch.randn(12, 3)
        self.points[BAD] = math.nan
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.stack = BatchStack(12, 4, lambda indices, seed: self.points[indices], seed=3)
        self.seen: list[tuple[list[int], list[Tensor], float]] = []

    def step(self) -> dict[str, Any]:
        batch = self.stack.next()
        indices = self.stack.last_indices
        assert indices is not None
        tensors = [tensor.detach().clone() for tensor in self.net.state_dict().values()]
        self.seen.append((indices.tolist(), tensors, float(self.scheduler.get_last_lr()[0])))
        return optimizer_step(self.net(batch).square().mean(), self.optimizer, self.scheduler)

    def run(self, total: int) -> None:
        run_steps(
            self.step,
            total=total,
            parts={"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler, "stack": self.stack},
            writer=StageEvents(self.folder / "metrics.jsonl", {"stage": "fit", "variant": "a", "seed": 0}),
            directory=self.folder / "stage",
            checkpoint_every=1,
            console=Console(quiet=True),
            description="fit",
            nonfinite_skips=self.skips,
        )


def test_the_first_stops_and_names_the_file(tmp_path: Path) -> None:
    fit = Fit(tmp_path, skips=0)
    with pytest.raises(
        NonFiniteError, match=r"fit step \d: loss nan.*no weight was changed.*inspect/fit-a-seed-0-step"
    ):
        fit.run(6)
    indices, before, _ = fit.seen[-1]
    assert BAD in indices
    names = list(dict(fit.net.named_parameters()))
    now = dict(zip(fit.net.state_dict(), before, strict=True))
    assert all(torch.equal(fit.net.state_dict()[name], now[name]) for name in names)
    (path,) = (tmp_path / "inspect").iterdir()
    assert path.name == f"fit-a-seed-0-step-{len(fit.seen)}.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["indices"] == indices
    assert saved["step"] == len(fit.seen)
    assert all(torch.equal(saved["state"]["net"][name], now[name]) for name in names)
    assert saved["state"]["optimizer"]["param_groups"][0]["momentum"] == 0.9


def test_as_many_are_skipped_as_allowed(tmp_path: Path) -> None:
    fit = Fit(tmp_path / "a", skips=2)
    fit.run(6)
    bad = [number for number, (indices, _, _) in enumerate(fit.seen) if BAD in indices]
    assert len(bad) == 2, "each point is met once an epoch of three batches"
    for number in bad:
        if number + 1 < 6:
            _, before, rate = fit.seen[number]
            _, after, later = fit.seen[number + 1]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "statistics too"
            assert rate == later
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fit.net.state_dict().values())
    lines = events(tmp_path / "a")
    assert [line["step"] for line in lines if "skipped" in line] == [number + 1 for number in bad]
    assert [line["skipped"] for line in lines if "skipped" in line] == [1, 2]
    assert all(line["loss"] is None for line in lines if "skipped" in line)
    assert len(list((tmp_path / "a" / "inspect").iterdir())) == 2
    with pytest.raises(NonFiniteError):
        Fit(tmp_path / "b", skips=1).run(6)


def test_skips_are_counted_over_a_resume(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        Fit(tmp_path, skips=1).run(6)
    with pytest.raises(NonFiniteError):
        Fit(tmp_path, skips=1).run(6)
    # Allowing one more continues where the run stopped.
    again = Fit(tmp_path, skips=2)
    again.run(6)
    whole = Fit(tmp_path / "whole", skips=2)
    whole.run(6)
    pairs = zip(again.net.state_dict().values(), whole.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_stops_with_its_code_and_goes_on_where_skips_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(execution, "write_report", lambda folder: folder)
    real, arguments = pretext.optimizer_step, ("pretext", "--output-dir", str(tmp_path))
    calls = [0]

    def second(loss: Tensor, *rest: Any) -> Any:
        calls[0] += 1
        return real(loss * (math.nan if calls[0] == 2 else 1.0), *rest)

    monkeypatch.setattr(pretext, "optimizer_step", second)
    assert execute(*arguments) == 3
    said = capsys.readouterr().err
    assert said.startswith("run.py: stopped: pretext step 2: loss nan")
    assert str(tmp_path / "inspect" / "pretext-bissl-seed-0-step-2.pt") in said
    saved = torch.load(tmp_path / "inspect" / "pretext-bissl-seed-0-step-2.pt", weights_only=True)
    assert len(saved["indices"]) == 24
    assert saved["state"].keys() >= {"backbone", "heads", "optimizer", "scheduler", "stack"}
    calls[0] = 0
    assert execute(*arguments, "--resume", "--nonfinite-skips", "1") == 0
    assert [line["skipped"] for line in of_stage(tmp_path, "pretext", "train") if "skipped" in line] == [1]


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_a_trainer_skips_and_saves(level: str, tmp_path: Path) -> None:
    spoilt = (LOWER_BATCHES[1][0], torch.full((5,), math.nan, dtype=torch.float64))
    data: dict[str, Any] = {"lower_data": [LOWER_BATCHES[0], spoilt, LOWER_BATCHES[2]]}
    if level == "upper":
        bad = torch.full((3,), math.nan, dtype=torch.float64)
        data = {"upper_data": [torch.ones(3, dtype=torch.float64), bad]}
    options: dict[str, Any] = {
        "schedule": AlternatingSchedule(1, 3, 2),
        "adaptation_pairs": None,
        "hessian_batches": 1,
        "on_failure": "ignore",
        **data,
    }
    trainer = make(**options, nonfinite_skips=1, callbacks=[Inspect(tmp_path)])
    trainer.run()
    assert trainer.skipped == {level: 1}
    assert trainer.steps == {"lower": 3, "upper": 2}
    # By hand: the same run without the spoilt batch.
    less = {"lower": (2, 2), "upper": (3, 1)}[level]
    data = (
        {"lower_data": [LOWER_BATCHES[0], LOWER_BATCHES[2]]}
        if level == "lower"
        else {"upper_data": [data["upper_data"][0]]}
    )
    clean = make(**{**options, **data, "schedule": AlternatingSchedule(1, *less)})
    clean.run()
    for ours, theirs in ((trainer.upper, clean.upper), (trainer.lower, clean.lower)):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = torch.load(tmp_path / f"{level}-step-2.pt", weights_only=True)
    assert (saved["event"], saved["step"], saved["indices"]) == (level, 2, None)
    assert saved["lower"].keys() == clean.lower.keys()
    resumed = make(**options, nonfinite_skips=1, callbacks=[Inspect(tmp_path)])
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.skipped == {level: 1}
    with pytest.raises(NonFiniteError, match=rf"{level} step 2 .*batch and state are in .*{level}-step-2\.pt"):
        make(**options, callbacks=[Inspect(tmp_path)]).run()


def test_the_trainer_refuses_a_number_of_skips_that_is_none() -> None:
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match="nonfinite_skips"):
            make(nonfinite_skips=value)
