"""The loop of plain stages, and the lines that stages share a file for."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bilevel.training import NonFiniteError
from recipes.bissl.training.loop import MOST_LINES, Seconds, discard_checkpoints, optimizer_step, run_steps
from recipes.experiment.events import StageEvents


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Counting:
    """A stage whose only state is a weight, moved by a random amount each step."""

    def __init__(self, folder: Path, stop: int | None = None) -> None:
        self.folder, self.stop, self.weight, self.after_steps = folder, stop, torch.zeros(1), []
        self.events = StageEvents(folder / "metrics.jsonl", {"stage": "count", "variant": "a", "seed": 0})

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])

    def step(self) -> dict[str, Any]:
        self.weight += torch.rand(1)
        if self.stop is not None:
            self.stop -= 1
            if self.stop == 0:
                raise KeyboardInterrupt
        return {"loss": float(self.weight)}

    def run(self, total: int, every: int = 4) -> float:
        return run_steps(
            self.step,
            total=total,
            parts={"counting": self},
            writer=self.events,
            directory=self.folder / "stage",
            checkpoint_every=every,
            console=Console(quiet=True),
            description="counting",
            after=self.after_steps.append,
        )


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9, 11])
def test_interrupted_steps_continue_exactly(tmp_path: Path, stop: int) -> None:
    whole = Counting(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    torch.manual_seed(3)
    whole.run(11)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "metrics.jsonl").write_text('{"stage": "earlier", "variant": "a", "seed": 0}\n')
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        Counting(parts, stop).run(11)
    # Whatever happens in between, also to the generators.
    torch.manual_seed(99)
    again = Counting(parts)
    again.run(11)
    assert torch.equal(again.weight, whole.weight)
    assert again.after_steps == list(range((stop - 1) // 4 * 4 + 1, 12))
    assert lines(parts / "metrics.jsonl")[1:] == lines(tmp_path / "whole" / "metrics.jsonl")


def test_every_step_is_an_event_up_to_a_limit(tmp_path: Path) -> None:
    for total in (1, 7, MOST_LINES, MOST_LINES + 1, 2 * MOST_LINES - 1, 2 * MOST_LINES + 1):
        folder = tmp_path / str(total)
        folder.mkdir()
        Counting(folder).run(total, every=10**9)
        steps = [line["step"] for line in lines(folder / "metrics.jsonl")]
        assert steps[-1] == total
        assert len(steps) <= MOST_LINES
        assert len(steps) == total or total > MOST_LINES
        assert len({b - a for a, b in pairwise(steps[:-1])}) <= 1


def test_checkpoints_are_discarded_at_the_end(tmp_path: Path) -> None:
    counting = Counting(tmp_path)
    counting.run(11)
    assert list((tmp_path / "stage").glob("step-*"))
    (tmp_path / "stage" / "weights.safetensors").write_bytes(b"x")
    discard_checkpoints(tmp_path / "stage")
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["weights.safetensors"]


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


def rates(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_one_step_records_what_it_did() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = rates(optimizer)
    record = optimizer_step(0.5 * weight.square().sum(), optimizer, scheduler)
    assert record == {"loss": 12.5, "lr": 0.1, "grad_norm": 5.0}
    torch.testing.assert_close(weight.detach(), torch.tensor([2.7, 3.6]))
    # The next step's rate, and no gradient left over from this one.
    assert optimizer_step((0.0 * weight).sum(), optimizer, scheduler)["lr"] == pytest.approx(0.05)
    torch.testing.assert_close(weight.detach(), torch.tensor([2.7, 3.6]))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(factor: float, where: str) -> None:
    weight = torch.tensor([0.0, 4.0], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler = rates(optimizer)
    before = optimizer.state_dict(), scheduler.state_dict()
    # The root's derivative at 0 is infinite where its value is 0.
    loss = weight.sum() * factor if where == "loss" else weight.sqrt().sum() * (1.0 if factor > 1 else 0.0)
    with pytest.raises(NonFiniteError, match=r"no weight was changed. Lower the learning rate \(0.1\)"):
        optimizer_step(loss, optimizer, scheduler)
    assert weight.tolist() == [0.0, 4.0]
    assert (optimizer.state_dict(), scheduler.state_dict()) == before


def stage_events(path: Path, **context: Any) -> StageEvents:
    return StageEvents(path, {"stage": "head", "variant": "bissl", "seed": 0, **context})


def test_resuming_cuts_the_own_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, other = stage_events(path), stage_events(path, seed=1)
    first.write({"step": 1, "loss": float("nan")})
    other.write({"step": 1})
    state = first.state_dict()
    first.write({"step": 2})
    other.write({"step": 2})
    first.write({"step": 3})
    with path.open("ab") as file:
        file.write(b'{"stage": "head", "ar')
    resumed = stage_events(path)
    resumed.load_state_dict(state)
    resumed.on_event(None, {"step": 2, "again": True})
    found = [(line["seed"], line["step"], line.get("again", False)) for line in lines(path)]
    assert found == [(0, 1, False), (1, 1, False), (1, 2, False), (0, 2, True)]
    assert resumed.state_dict() == {"lines": 2}
    assert lines(path)[0] == {"stage": "head", "variant": "bissl", "seed": 0, "step": 1, "loss": None}


def test_resuming_in_the_file_of_another_run_loses_nothing(tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    writer = stage_events(there)
    for step in range(9):
        writer.write({"step": step})
    stage_events(here, stage="pretext").write({"step": 1, "text": "x" * 200})
    content = here.read_bytes()
    # Stages shared by runs bring a checkpoint whose lines are in the other run's file.
    resumed = stage_events(here)
    resumed.load_state_dict({"lines": 5})
    assert here.read_bytes() == content
    assert resumed.state_dict() == {"lines": 0}


def test_a_fresh_start_forgets_an_earlier_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    stage_events(path).restart()
    assert not path.exists()
    stage_events(path).write({"step": 1})
    stage_events(path, variant="baseline").write({"step": 1})
    stage_events(path).restart()
    assert [line["variant"] for line in lines(path)] == ["baseline"]
