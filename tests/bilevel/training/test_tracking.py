"""TensorBoard and Weights & Biases: what reaches them, and that a resume sends nothing twice."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bilevel.checkpoint import load_checkpoint
from bilevel.training.trackers import TensorBoardLogger, TrackerError, WandbLogger, numbers
from tests.support.paths import ROOT
from tests.support.recipes.small_runs import (
    STAGES,
    before_steps,
    events,
    execute,
    refused,
    run_all,
    small_config,
    small_pipeline,
    stop_at,
)

UPPER = {"event": "upper", "step": 3, "alternation": 2, "loss": 0.5, "residual": math.nan, "status": "CONVERGED"}


class FakeRun:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.logged, self.axes, self.finished = settings, [], {}, False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        assert not self.finished
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A stand-in for the package; the list is of the runs that were begun."""
    runs: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        runs.append(FakeRun(settings))
        return runs[-1]

    spec = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=spec))  # type: ignore[arg-type]
    return runs


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value), as TensorBoard itself reads them back."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(item.step, item.value) for item in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(lines: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The same from the lines of metrics.jsonl."""
    found: dict[str, list[Any]] = {}
    for line in lines:
        for name, value in line.items():
            if type(value) in (int, float) and name not in ("step", "seed"):
                found.setdefault(f"{line['event']}/{name}", []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_numbers_are_the_finite_ones() -> None:
    record = {**UPPER, "num_hvps": 4, "flag": True, "none": None, "curve": [1.0], "infinite": -math.inf}
    assert numbers(record) == {"upper/alternation": 2.0, "upper/loss": 0.5, "upper/num_hvps": 4.0}


def test_tensorboard_shows_events_by_their_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path / "run")
    logger.on_run_start(None)
    for step in (1, 2):
        logger.on_event(None, {"event": "lower", "step": step, "loss": 0.5 * step})
    logger.on_event(None, UPPER)
    logger.on_run_end(None)
    assert scalars(tmp_path / "run") == {
        "lower/loss": [(1, 0.5), (2, 1.0)],
        "upper/alternation": [(3, 2.0)],
        "upper/loss": [(3, 0.5)],
    }


def test_tensorboard_is_cut_back_on_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    def write(logger: TensorBoardLogger, *steps: int) -> None:
        for step in steps:
            logger.write({"event": "train", "step": step, "loss": float(step)})

    (tmp_path / "notes.txt").write_text("not ours")
    first = TensorBoardLogger(tmp_path)
    write(first, 1, 2)
    state = json.loads(json.dumps(first.state_dict()))
    write(first, 3, 4)
    first.close()
    # Another process, which is interrupted too, after a checkpoint of its own.
    second = TensorBoardLogger(tmp_path)
    second.load_state_dict(state)
    write(second, 3)
    later = second.state_dict()
    write(second, 4)
    second.close()
    third = TensorBoardLogger(tmp_path)
    third.load_state_dict(later)
    write(third, 4, 5)
    third.close()
    assert scalars(tmp_path) == {"train/loss": [(step, float(step)) for step in (1, 2, 3, 4, 5)]}
    third.restart()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_wandb_has_an_axis_for_each_event_and_the_run_s_settings(tmp_path: Path, wandb: list[FakeRun]) -> None:
    logger = WandbLogger(tmp_path / "wandb", project="p", name="n", group="g", config={"lr": 0.1})
    assert not wandb
    logger.on_run_start(None)
    logger.on_event(None, UPPER)
    logger.on_event(None, {"event": "lower", "step": 7, "loss": 0.25})
    logger.on_run_end(None)
    (run,) = wandb
    settings = {key: run.settings[key] for key in ("project", "name", "group", "config", "resume", "dir")}
    folder = str(tmp_path / "wandb")
    assert settings == {
        **{"project": "p", "name": "n", "group": "g", "config": {"lr": 0.1}},
        **{"resume": "allow", "dir": folder},
    }
    assert run.axes == {"upper/*": "upper/step", "lower/*": "lower/step"}
    assert run.logged == [
        {"upper/alternation": 2.0, "upper/loss": 0.5, "upper/step": 3},
        {"lower/loss": 0.25, "lower/step": 7},
    ]
    assert run.finished


def test_wandb_passes_over_what_it_has_on_resume(tmp_path: Path, wandb: list[FakeRun]) -> None:
    def write(logger: WandbLogger, *steps: int) -> None:
        for step in steps:
            logger.write({"event": "train", "step": step, "loss": float(step)})

    first = WandbLogger(tmp_path, project="p")
    write(first, 1, 2)
    state = json.loads(json.dumps(first.state_dict()))
    write(first, 3, 4)
    second = WandbLogger(tmp_path, project="p")
    second.load_state_dict(state)
    write(second, 3, 4, 5)
    assert [item["train/step"] for run in wandb for item in run.logged] == [1, 2, 3, 4, 5]
    assert wandb[0].settings["id"] == wandb[1].settings["id"]
    second.restart()
    write(second, 1)
    assert wandb[2].settings["id"] != wandb[1].settings["id"]
    assert [item["train/step"] for item in wandb[2].logged] == [1]


def test_wandb_itself_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb.sdk")
    code = (
        "import sys; from bilevel.training import WandbLogger\n"
        "logger = WandbLogger(sys.argv[1], project='p', name='n', group='g', config={'a': 1})\n"
        "for step in (1, 2): logger.write({'event': 'train', 'step': step, 'loss': 0.5})\n"
        "print(logger.state_dict()['seen']); logger.close()\n"
    )
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    environment |= {"HOME": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", code, str(tmp_path / "logs")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]
    (sent,) = (tmp_path / "logs").glob("*.sent")
    assert sent.stat().st_size == 2
    assert list((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize(
    ("logger", "module", "extra"),
    [
        (lambda folder: TensorBoardLogger(folder), "torch.utils.tensorboard", "tensorboard"),
        (lambda folder: WandbLogger(folder, project="p"), "wandb", "wandb"),
    ],
    ids=["tensorboard", "wandb"],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: Any, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrackerError, match=rf"not installed: pip install 'bilevel\[{extra}\]'"):
        logger(tmp_path)


def test_the_command_line_names_a_missing_package_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(capsys, "--tracking=wandb", f"--output-dir={tmp_path / 'run'}")
    assert "tracking: the package wandb is not installed: pip install 'bilevel[wandb]'" in message
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_stops_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wandb: list[FakeRun]
) -> None:
    def no_key(**settings: Any) -> FakeRun:
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    message = refused(capsys, "--tracking=wandb", f"--output-dir={tmp_path / 'run'}")
    assert "tracking: Weights & Biases could not be started (RuntimeError: api_key not configured)" in message
    assert not events(tmp_path / "run")


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_tracker_that_fails_on_the_way_ends_the_run_in_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wandb: list[FakeRun],
    method: str,
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FakeRun, method, full)
    options = "pretext", "--tracking=wandb", f"--output-dir={tmp_path / 'run'}"
    message = refused(capsys, *options)
    assert "tracking: Weights & Biases cannot go on (OSError: [Errno 28] No space left on device)" in message
    assert "--resume" in message
    assert execute(*options[:1], *options[2:], "--tracking=", "--resume") == 0


class FullWriter:
    """A stand-in for TensorBoard's writer on a full disk."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        raise OSError(28, "No space left on device")

    flush = close = lambda self: FullWriter.add_scalar(self, "", 0.0, 0)


def test_tensorboard_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FullWriter))  # type: ignore[arg-type]
    logger = TensorBoardLogger(tmp_path)
    logger.start()
    for call in (lambda: logger.write(UPPER), logger.state_dict, logger.close):
        with pytest.raises(TrackerError, match=r"TensorBoard cannot write to .*No space left on device"):
            call()


def interrupted_run(folder: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> Any:
    """All stages, the first of which is interrupted after a checkpoint and goes on in a fresh pipeline."""
    config = small_config(f"--tracking={tracker}", "--data.pretext-limit=24", "--pretext.batch-size=12")
    with monkeypatch.context() as patch:
        before_steps(patch, "pretext", stop_at(4))
        with pytest.raises(KeyboardInterrupt):
            run_all(small_pipeline(folder, config))
    assert any(load_checkpoint(path) for path in (folder / "checkpoints").iterdir())
    run_all(small_pipeline(folder, config))
    return [(line["stage"], line["event"], line["step"]) for line in events(folder)]


def test_a_run_in_tensorboard_is_its_metrics_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    interrupted_run(tmp_path, monkeypatch, "tensorboard")
    lines = events(tmp_path)
    assert {line["stage"] for line in lines} == set(STAGES)
    for stage in STAGES:
        found = scalars(tmp_path / "tracking" / "tensorboard" / stage / "bissl" / "seed-0")
        assert found == expected([line for line in lines if line["stage"] == stage])


def test_a_run_in_wandb_is_its_metrics_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: list[FakeRun]
) -> None:
    lines = interrupted_run(tmp_path, monkeypatch, "wandb")
    assert [run.settings["name"] for run in wandb] == [
        f"{stage}/bissl/seed-0" for stage in ("pretext", "pretext", "head", "bissl", "finetune")
    ]
    assert wandb[0].settings["id"] == wandb[1].settings["id"]
    assert len({run.settings["id"] for run in wandb}) == 4
    assert wandb[0].settings["config"]["pretext"]["batch_size"] == 12
    assert all(run.finished for run in wandb)
    sent = []
    for run in wandb:
        for item in run.logged:
            (axis,) = [key for key in item if key.endswith("/step")]
            sent.append((run.settings["name"].split("/")[0], axis.removesuffix("/step"), item[axis]))
    assert Counter(sent) == Counter(lines)
    assert max(Counter(sent).values()) == 1


def test_no_tracker_unless_asked_for(tmp_path: Path) -> None:
    assert small_config().tracking == ()
    assert small_config("--tracking=tensorboard,wandb").tracking == ("tensorboard", "wandb")
    assert execute("--tracking=comet", f"--output-dir={tmp_path}") == 2
