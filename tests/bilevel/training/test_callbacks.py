"""What listeners write, and that resuming takes it back."""

import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bilevel import Checkpointing, Level, ProgressBar
from bilevel.checkpoint import load_checkpoint
from bilevel.training import Callback, JSONLWriter, SingleLevelTrainer, gradient_of


def trainer(progress: int, total: int = 5, waiting: float = 0.0, **skipped: int) -> Any:
    seen = {"waiting": waiting, "skipped": Counter(skipped), "state_dict": lambda: {"progress": progress}}
    return SimpleNamespace(progress=progress, total=total, **seen)


def test_a_callback_does_nothing_by_default() -> None:
    callback = Callback()
    callback.on_new_run(trainer(0))
    callback.on_run_start(trainer(0))
    callback.on_event(trainer(0), {"event": "lower"})
    callback.on_progress(trainer(0))
    callback.on_run_end(trainer(0))
    callback.load_state_dict({})
    assert callback.state_dict() == {}


def test_metrics_are_one_object_a_line_with_context_and_no_nan(tmp_path: Path) -> None:
    writer = JSONLWriter(tmp_path / "metrics.jsonl", {"stage": "bissl", "seed": 3})
    writer.on_event(None, {"event": "upper", "loss": 0.5, "residual": math.nan, "status": None, "step": 1})
    writer.on_event(None, {"event": "lower", "loss": -math.inf, "stage": "other"})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"stage": "bissl", "seed": 3, "event": "upper", "loss": 0.5, "residual": None, "status": None, "step": 1},
        {"stage": "other", "seed": 3, "event": "lower", "loss": None},
    ]


def test_lists_are_written_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    JSONLWriter(tmp_path / "metrics.jsonl").write({"residual_curve": [0.5, math.inf, (1.0, math.nan)], "none": []})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "residual_curve": [0.5, None, [1.0, None]],
        "none": [],
    }


def test_metrics_are_cut_back_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JSONLWriter(path)
    assert writer.state_dict() == {"length": 0}
    writer.write({"event": "a"})
    state = writer.state_dict()
    kept = path.read_bytes()
    writer.write({"event": "b"})
    path.write_bytes(path.read_bytes() + b'{"event": "torn')
    resumed = JSONLWriter(path)
    resumed.load_state_dict(state)
    assert path.read_bytes() == kept
    resumed.write({"event": "b"})
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["a", "b"]
    JSONLWriter(tmp_path / "none.jsonl").load_state_dict(state)
    assert not (tmp_path / "none.jsonl").exists()


def test_checkpointing_saves_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    callback = Checkpointing(tmp_path, every=2, keep=3)
    for alternation in range(1, 6):
        callback.on_progress(trainer(alternation))
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"step-0000000{k}.pt" for k in (2, 4, 5)]
    assert load_checkpoint(tmp_path) == (5, {"progress": 5})
    with pytest.raises(ValueError, match="Checkpointing: every"):
        Checkpointing(tmp_path, every=0)


def test_progress_shows_losses_and_the_last_solve() -> None:
    output = io.StringIO()
    bar = ProgressBar(Console(file=output, force_terminal=True, width=200), "stage three")
    bar.on_progress(trainer(0))
    bar.on_run_start(trainer(1))
    bar.on_event(trainer(1), {"event": "lower", "loss": 0.25})
    bar.on_event(trainer(1), {"event": "upper", "loss": 0.5, "status": "NOT_CONVERGED", "residual": math.nan})
    bar.on_progress(trainer(2, waiting=0.374))
    bar.on_run_end(trainer(2))
    bar.on_run_end(trainer(2))
    text = output.getvalue()
    for part in ("waiting for data 37%", "stage three", "2/5", "lower 0.2500", "upper 0.5000", "not_converged"):
        assert part in text
    assert "skipped" not in text


SHOWN = {
    "name": "bilevel stage, bissl, seed 0",
    "waiting": "waiting for data 12%",
    "elapsed": "0:00:",
    "bar": "\u2501" * 9,
    "solve": "converged, residual 1.2e-02",
    "upper": "upper 0.5000",
    "lower": "lower 5.2500",
    "skipped": "2 skipped",
    "left": "-:--:--",
    "whole": " 95/100",
}
"""Parts of a line, those between name and whole from the least useful on."""


def line(width: int) -> str:
    """The last one that a terminal of so many columns shows of a training with everything to say."""
    output = io.StringIO()
    bar = ProgressBar(Console(file=output, force_terminal=True, width=width, color_system=None), SHOWN["name"])
    bar.on_run_start(trainer(1, total=100))
    bar.on_event(trainer(1), {"event": "lower", "loss": 5.25})
    bar.on_event(trainer(1), {"event": "upper", "loss": 0.5, "status": "CONVERGED", "residual": 0.012})
    bar.on_progress(trainer(95, total=100, waiting=0.12, lower=2))
    bar.on_run_end(trainer(95, total=100))
    lines = [part for part in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", output.getvalue()) if part.strip()]
    return lines[-1].rstrip()


@pytest.mark.parametrize(
    ("width", "absent"),
    [
        (200, []),
        (160, []),
        (140, ["waiting"]),
        (130, ["waiting", "elapsed"]),
        (120, ["waiting", "elapsed", "bar"]),
        (90, ["waiting", "elapsed", "bar", "solve"]),
        (80, ["waiting", "bar", "solve", "upper"]),
        (50, ["waiting", "elapsed", "bar", "solve", "upper", "lower", "skipped"]),
    ],
)
def test_a_line_fits_into_the_terminal(width: int, absent: list[str]) -> None:
    shown = line(width)
    assert len(shown) <= width
    # Nothing is cut: parts are there, or not.
    assert "\u2026" not in shown
    assert [name for name, part in SHOWN.items() if part not in shown] == absent, shown


def test_progress_shows_skipped_steps_where_there_are_any() -> None:
    output = io.StringIO()
    bar = ProgressBar(Console(file=output, force_terminal=True, width=200))
    bar.on_run_start(trainer(1))
    bar.on_progress(trainer(2, lower=2, upper=1))
    bar.on_run_end(trainer(2))
    assert "3 skipped" in output.getvalue()


def small(folder: Path, steps: int = 3, *extra: Callback) -> SingleLevelTrainer:
    y = torch.zeros(2, requires_grad=True)
    level = Level({"y": y}, torch.optim.SGD([y], lr=0.1), [torch.ones(2)])
    derivatives = gradient_of(lambda batch: (y - batch).square().sum(), level.params)
    return SingleLevelTrainer(derivatives, level, steps, callbacks=[*extra, Checkpointing(folder)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_checkpoints_of_another_run_are_left_alone(tmp_path: Path) -> None:
    small(tmp_path).run()
    before = files(tmp_path)
    said = r"^Checkpointing: .* holds checkpoints of another run, the newest of number 3, .* trainer.resume\("
    for steps in (3, 9):
        with pytest.raises(ValueError, match=said):
            small(tmp_path, steps).run()
    assert files(tmp_path) == before


def test_a_damaged_checkpoint_is_one_too(tmp_path: Path) -> None:
    small(tmp_path).run()
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="the newest of number 3"):
        small(tmp_path).run()


def test_a_bar_ends_where_a_run_does_not_begin(tmp_path: Path) -> None:
    small(tmp_path).run()
    bar = ProgressBar(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError, match="another run"):
        small(tmp_path, 3, bar).run()
    assert bar._bar is None


def test_a_run_that_continues_goes_on(tmp_path: Path) -> None:
    first = small(tmp_path)
    assert not first.resume(tmp_path)
    first.run()
    resumed = small(tmp_path, 5)
    assert resumed.resume(tmp_path)
    resumed.run()
    resumed.run()
    by_hand, saved = small(tmp_path, 7), load_checkpoint(tmp_path)
    assert saved is not None
    by_hand.load_state_dict(saved[1])
    by_hand.run()
    assert by_hand.progress == 7
    # Trained by hand before, in this process.
    advanced = small(tmp_path / "new", 4)
    advanced.advance()
    advanced.run()
    advanced.run()
    assert advanced.progress == 4
