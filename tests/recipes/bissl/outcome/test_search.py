"""The search as a whole: workers, kills and single trials change nothing; stages that stop before the test."""

import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bissl.commands.parsing import parse
from recipes.bissl.outcome.pipeline import Pipeline
from recipes.bissl.outcome.search.space import pair_space
from recipes.bissl.outcome.search.variant_search import FEWER_WORKERS
from recipes.bissl.training.stages import finetune
from recipes.experiment.artifacts import ArtifactError
from recipes.experiment.errors import ConfigError
from recipes.experiment.folder.leases import LeaseLost
from recipes.experiment.search.space import draw
from recipes.experiment.stage import Attempt
from recipes.vision.errors import DataError
from tests.support.recipes.searches import records, search, selection
from tests.support.recipes.small_runs import SMALL_OPTIONS, of_stage, run_stage, small_config, small_pipeline

pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
COUNT = 12


def test_a_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def fit(pipeline: Pipeline, check: Callable[[], None]) -> finetune.Fitted:
        attempt = Attempt(pipeline.workspace.folder / "checkpoints", check)
        repeat = pipeline.at("bissl", 0)
        return finetune.fit(repeat, pipeline.data, pipeline.computing, pipeline.workspace, None, attempt)

    config = small_config()
    whole = fit(small_pipeline(tmp_path / "a", config), lambda: None)
    steps = []

    def stop() -> None:
        steps.append(None)
        if len(steps) == 6:
            raise LeaseLost("taken over")

    pipeline = small_pipeline(tmp_path / "b", config)
    with pytest.raises(LeaseLost):
        fit(pipeline, stop)
    # Two steps an epoch, and a checkpoint each: the sixth is in the third epoch, which begins anew.
    again: list[None] = []
    resumed = fit(pipeline, lambda: again.append(None))
    assert len(again) == whole.costs.label_steps - 4
    assert resumed.facts == whole.facts
    for name, value in whole.modules.state_dict().items():
        assert torch.equal(value, resumed.modules.state_dict()[name])


def kill_workers() -> int:
    """SIGKILL this process's children, one after the other; how many there were."""
    children = multiprocessing.active_children()
    for child in random.Random(0).sample(children, len(children)):
        child.kill()
    return len(children)


def test_workers_and_kills_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    options = ("--arm", "baseline", "--trials", COUNT, "--lease", 3, "--lr-range", 1e-3, 1.0)
    assert search(*options, "--output-dir", one) == 0
    expected = records(one)
    assert list(expected) == [f"{number:03d}" for number in range(COUNT)]
    assert len({(r["lr"], r["weight_decay"]) for r in expected.values()}) == COUNT

    codes: list[int] = []
    shared = (*options, "--artifacts", one / "checkpoints", "--output-dir", three, "--workers", 3)
    thread = threading.Thread(target=lambda: codes.append(search(*shared)))
    thread.start()
    while not records(three) and thread.is_alive():
        time.sleep(0.05)
    assert 1 <= kill_workers() <= 3
    thread.join()
    survivors = records(three)
    assert codes == [1]
    assert 1 <= len(survivors) < COUNT
    assert not (three / "selection.json").exists()
    capsys.readouterr()
    assert search(*shared, "--summary") == 0
    assert f"{len(survivors)} of {COUNT} trials done" in capsys.readouterr().out

    assert search(*shared) == 0
    assert records(three) == expected
    assert selection(three)["ranking"] == selection(one)["ranking"]
    assert selection(three)["winner"]["trial"] == selection(one)["winner"]["trial"]
    assert (three / "chosen.json").read_text() == (one / "chosen.json").read_text()
    assert not list(three.glob("trials/*/step-*"))
    assert not list(three.glob("leases/*.lease"))

    winner = selection(one)["winner"]
    config = parse([*SMALL_OPTIONS, "--config", str(one / "chosen.json")]).config
    pipeline = small_pipeline(one, config)
    baseline = pipeline.at("baseline", 0)
    artifact = pipeline.finetune(baseline, pipeline.pretext(baseline))
    best = artifact.info["best"]
    assert (best["epoch"], best["top1"], best["loss"]) == (winner["epoch"], winner["score"], winner["loss"])
    assert set(artifact.info["test"]) == {"top1", "top5", "loss"}


def test_single_trials_make_up_the_search(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    options = ("--arm", "scratch", "--trials", 3, "--lr-range", 1e-2, 1e30, "--output-dir", folder)
    for number in (1, 0, 1):
        assert search(*options, "--trial", number) == 0
    assert list(records(folder)) == ["000", "001"]
    assert not (folder / "selection.json").exists()
    with pytest.raises(ConfigError, match="--trial: there are trials 0 to 2, got 3"):
        search(*options, "--trial", 3)
    with pytest.raises(ConfigError, match=r"search.lr_range: \[0.01, 1e\+30\]"):
        search(*options, "--lr-range", 1e-2, 1.0)
    assert search(*options, "--trial", 2) == 0
    # A learning rate of 1e26 cannot go well: that is recorded, and cannot be chosen.
    diverged = records(folder)["001"]
    assert diverged["lr"] > 1e20
    assert (diverged["status"], "score" in diverged) == ("diverged", False)
    assert "loss" in diverged["message"]
    assert [(trial["status"], trial["score"]) for trial in selection(folder)["trials"]][1] == ("diverged", None)
    assert sorted(selection(folder)["ranking"]) == [0, 2]


def test_the_artifact_that_trials_start_from_is_checked(tmp_path: Path) -> None:
    first, second = (
        pipeline.pretext(pipeline.at("baseline", 0))
        for pipeline in (
            small_pipeline(tmp_path / "a", small_config()),
            small_pipeline(tmp_path / "b", small_config("--pretext.lr=0.5")),
        )
    )
    options = ("--trials", 1, "--output-dir", tmp_path / "s", "--from")
    with pytest.raises(ArtifactError, match="starts from a bissl artifact"):
        search(*options, first.directory)
    assert search("--arm", "baseline", *options, first.directory) == 0
    # Nothing was trained but the one trial.
    assert not list((tmp_path / "s").glob("checkpoints/pretext-*"))
    with pytest.raises(ConfigError, match="begun from another artifact"):
        search("--arm", "baseline", *options, second.directory)
    (tmp_path / "s" / "study.json").write_text("{")
    with pytest.raises(ConfigError, match=r"study\.json cannot be read .*; put it back, or name another folder"):
        search("--arm", "baseline", *options, first.directory)


def test_the_heads_grid_is_scored_by_its_last_epoch(tmp_path: Path) -> None:
    rates = ("--finetune.baseline-lr=0.07", "--finetune.baseline-weight-decay=0.002")
    assert search("--stage", "head", "--grid-side", 1, *rates, "--output-dir", tmp_path) == 0
    found = records(tmp_path)["000"]
    assert (found["lr"], found["weight_decay"]) == (0.07, 0.002)

    config = parse([*SMALL_OPTIONS, "--config", str(tmp_path / "chosen.json")]).config
    assert (config.head.lr, config.bissl.upper_lr) == (0.07, 0.07)
    assert (config.head.weight_decay, config.bissl.upper_weight_decay) == (0.002, 0.002)
    (tmp_path / "own").mkdir()
    pipeline = small_pipeline(tmp_path / "own", config)
    run_stage(pipeline, "head", run_stage(pipeline, "pretext"))
    last = of_stage(tmp_path / "own", "head", "epoch")[-1]
    assert (last["epoch"], last["val_top1"], last["val_loss"]) == (found["epoch"], found["score"], found["loss"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretext",), "search: takes no command"),
        (("--trials", "0"), "--trials: must be at least 1, got 0"),
        (("--lr-range", "1", "0.1"), "--lr-range: needs 0 < LOW <= HIGH, got 1 0.1"),
        (("--weight-decay-range", "0", "1"), "--weight-decay-range: needs 0 < LOW"),
        (("--workers", "2", "--trial", "1"), "exclude each other"),
        (("--workers", "0"), "--workers: must be at least 1"),
        (("--lease", "nan"), "--lease"),
        (("--tolerance", "nan"), "--tolerance"),
        (("--stage", "head", "--trials", "9"), "tries a grid"),
        (("--stage", "head", "--grid-side", "2"), "--grid-side: must be odd"),
        (("--stage", "head", "--grid-factor", "1"), "--grid-factor: must be above 1"),
        (("--stage", "head", "--arm", "baseline"), "--stage head belongs to bissl"),
        (("--arm", "baseline-time"), "give --from ARTIFACT"),
        (("--arm", "scratch", "--from", "x"), "starts from random weights"),
        (("--summary",), "holds no search"),
        (("--overwrite",), "delete its folder by hand"),
        (("--stage", "head", "--sampler", "tpe"), "--sampler: --stage head tries a grid; give --space"),
        (("--sampler", "best"), "--sampler: 'best' is not of the form 'module:Class'"),
        (("--pruner", "best"), "--pruner: 'best' is not of the form 'module:Class'"),
        (("--storage", "server"), "--storage: the URL is not of the form"),
        (("--space", "bissl.uper_lr=log:1e-4:1"), r"bissl\.uper_lr: unknown field; there is bissl\.upper_lr"),
        (("--workers", "two"), "argument --workers: invalid int value: 'two'; --help lists all options"),
        (("--space", "finetune.lr=log:0:1"), "--space finetune.lr=log:0:1: needs 0 < LOW <= HIGH, got 0 1"),
        (
            ("--space", "pretext.epochs=int:0:3", "--trials", "40"),
            "--space: .*pretext.epochs: 0 is for weights that are trained already",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(*arguments, "--output-dir", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_bad_data_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    cases: list[tuple[str, type[Exception], str]] = [
        (f"--data.downstream=folder:{tmp_path / 'none'}", DataError, "there is no folder"),
        (f"--data.pretext=folder:{tmp_path / 'none'}", DataError, "there is no folder"),
        ("--downstream.task=multilabel", DataError, "has single-label labels, but downstream.task 'multilabel'"),
        ("--downstream.batch-size=5000", ConfigError, "downstream.batch_size: 5000 is larger than the data"),
        ("--pretext.batch-size=5000", ConfigError, "pretext.batch_size: 5000 is larger than the data"),
        ('--tracking=["wandb"]', ConfigError, "tracking: the package wandb is not installed"),
    ]
    for option, error, message in cases:
        with pytest.raises(error, match=message):
            search(option, "--trials", 1, "--output-dir", tmp_path / "s")
        assert list(tmp_path.iterdir()) == []
    # Where nothing is pre-trained, the pretext images are not asked for.
    arguments = ("--arm", "scratch", f"--data.pretext=folder:{tmp_path / 'none'}", "--output-dir", tmp_path / "s")
    assert search("--trials", 1, *arguments) == 0


def test_a_trial_without_memory_names_the_fields_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(finetune, "fit", too_large)
    said = r"^finetune: cpu has too little memory for an allocation of 2\.50 GiB; lower downstream\.eval_batch_size"
    with pytest.raises(ConfigError, match=f"{said}.*{FEWER_WORKERS}$"):
        search("--arm", "scratch", "--trials", 1, "--output-dir", tmp_path / "s")


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        search("--arm", "scratch", "--output-dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.txt"]


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"^search needs Optuna .*; run: pip install 'bilevel\[search\]'"):
        search("--output-dir", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_space_of_fields_trains_what_they_decide(tmp_path: Path) -> None:
    fields = ("--space", "bissl.upper_lr=log:0.001:0.1", "--space", "finetune.lr=choice:0.01,0.1")
    shared = ("--trials", 3, "--artifacts", tmp_path / "stages")
    assert search(*fields, *shared, "--output-dir", tmp_path / "a") == 0
    found = records(tmp_path / "a")
    assert len(found) == 3
    # One warm-up of backbone and head, and a bilevel stage for each upper rate.
    stages = [path.parent.name.split("-")[0] for path in (tmp_path / "stages").glob("*-*/artifact.json")]
    assert sorted(stages) == ["bissl"] * 3 + ["head", "pretext"]
    best = selection(tmp_path / "a")["winner"]
    config = parse([*SMALL_OPTIONS, "--config", str(tmp_path / "a" / "chosen.json")]).config
    assert (config.bissl.upper_lr, config.finetune.lr) == (best["bissl.upper_lr"], best["finetune.lr"])
    pipeline = small_pipeline(tmp_path / "own", config)
    repeat = pipeline.at("bissl", 0)
    tuned = pipeline.finetune(repeat, pipeline.pretrain(repeat, {}))
    assert (tuned.info["best"]["top1"], tuned.info["best"]["loss"]) == (best["score"], best["loss"])
    with pytest.raises(ConfigError, match=r"search\.space"):
        search("--space", "finetune.lr=choice:0.01,0.2", *shared, "--output-dir", tmp_path / "a")


def test_a_sampler_and_a_pruner_search_in_the_same_folder_layout(tmp_path: Path) -> None:
    options = ("--arm", "scratch", "--trials", 4, "--sampler", "tpe", "--pruner", "median", "--lr-range", 1e-3, 1.0)
    assert search(*options, "--output-dir", tmp_path) == 0
    found = records(tmp_path)
    assert list(found) == ["000", "001", "002", "003"]
    assert all(1e-3 <= record["lr"] <= 1.0 for record in found.values())
    assert [trial["trial"] for trial in selection(tmp_path)["trials"]] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"search\.sampler: 'tpe' -> 'gp'"):
        search(*options, "--sampler", "gp", "--output-dir", tmp_path)


def test_a_dry_run_prints_the_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("--dry-run", "--trials", 2, "--output-dir", tmp_path / "s") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    expected = [
        f"trial {t.number:03d}: lr {t.values['lr']:.6g}, weight_decay {t.values['weight_decay']:.6g}"
        for t in draw(pair_space(), 2, 0)
    ]
    assert printed == expected
    assert not (tmp_path / "s").exists()
