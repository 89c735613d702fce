"""The lines that stages share a file for."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recipes.experiment.events import MOST_LINES, StageEvents
from tests.support.rank_processes import forkserver


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_an_event_up_to_a_limit(tmp_path: Path) -> None:
    for total in (1, 7, MOST_LINES, MOST_LINES + 1, 2 * MOST_LINES - 1, 2 * MOST_LINES + 1):
        path, trainer = tmp_path / f"{total}.jsonl", SimpleNamespace(total=total)
        writer = stage_events(path)
        for step in range(1, total + 1):
            writer.on_event(trainer, {"event": "train", "step": step})
        steps = [line["step"] for line in lines(path)]
        assert steps[-1] == total
        assert len(steps) <= MOST_LINES
        assert len(steps) == total or total > MOST_LINES
        assert len({b - a for a, b in pairwise(steps[:-1])}) <= 1


def test_steps_left_out_are_events_always(tmp_path: Path) -> None:
    writer, trainer = stage_events(tmp_path / "m.jsonl"), SimpleNamespace(total=3 * MOST_LINES)
    writer.on_event(trainer, {"event": "train", "step": 4})
    writer.on_event(trainer, {"event": "train", "step": 5, "skipped": True})
    # Of events other than the steps of one level there are few.
    writer.on_event(trainer, {"event": "upper", "step": 7})
    assert [line["step"] for line in lines(tmp_path / "m.jsonl")] == [5, 7]


def stage_events(path: Path, **context: Any) -> StageEvents:
    return StageEvents(path, {"stage": "head", "variant": "ours", "seed": 0, **context})


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
    resumed.on_event(None, {"event": "upper", "step": 2, "again": True})
    found = [(line["seed"], line["step"], line.get("again", False)) for line in lines(path)]
    assert found == [(0, 1, False), (1, 1, False), (1, 2, False), (0, 2, True)]
    assert resumed.state_dict() == {"lines": 2}
    assert lines(path)[0] == {"stage": "head", "variant": "ours", "seed": 0, "step": 1, "loss": None}


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


def write_and_cut(path: str, seed: int) -> None:
    """Again and again a stage of its own, the last time whole."""
    for length in (3, 50, 7, 120):
        events = StageEvents(Path(path), {"stage": "fit", "variant": "a", "seed": seed}, shared=True)
        events.restart()
        for step in range(length):
            events.write({"event": "train", "step": step})


def test_stages_of_several_processes_lose_no_line_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    processes = [forkserver().Process(target=write_and_cut, args=(str(path), seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    written = lines(path)
    for seed in range(4):
        assert [line["step"] for line in written if line["seed"] == seed] == list(range(120))
    assert len(written) == 4 * 120
