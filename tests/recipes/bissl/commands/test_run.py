"""The command line from end to end: what a run leaves, what it reuses, and what it refuses."""

import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bissl.commands import main as run
from recipes.bissl.outcome.side_by_side import all_stages
from recipes.bissl.settings.config import Config
from recipes.experiment.folder.run_folder import CONFIG
from recipes.vision.networks.backbones import build_backbone
from recipes.vision.sources.loading import load_downstream, load_pretext
from tests.support.paths import ROOT
from tests.support.recipes.image_trees import tree
from tests.support.recipes.small_runs import (
    STAGES,
    events,
    execute,
    files,
    leave_out_report,
    refused,
    results,
    weights,
    without,
)

ARMS = ("--arms", "bissl,baseline,scratch")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with three arms and two seeds."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert execute("--output-dir", str(folder), *ARMS) == 0
    return folder


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_report(monkeypatch)


def test_every_file_is_there(reference: Path) -> None:
    names = {path.name for path in reference.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "results.json", "report.html", "splits.json", "images.npz"} | {
        "checkpoints"
    }
    stages = sorted(path.name.partition("-")[0] for path in (reference / "checkpoints").iterdir())
    assert stages == ["bissl", *["finetune"] * 6, "head", "pretext", "pretext"]
    for folder in (reference / "checkpoints").iterdir():
        assert {path.name for path in folder.iterdir()} == {"artifact.json", "weights.safetensors"}


def test_results_follow_the_schema(reference: Path) -> None:
    found = results(reference)
    assert found.keys() == {
        *(
            "preset",
            "seeds",
            "repeats",
            "primary_metric",
            "variants",
            "comparisons",
            "solver",
            "environment",
            "notes",
            "images",
        ),
    }
    assert (found["preset"], found["seeds"], found["repeats"], found["primary_metric"]) == (
        *("digits", [0, 1], "finetune", "top1"),
    )
    assert list(found["variants"]) == ["bissl", "baseline", "scratch"]
    steps = {"bissl": (8, 16), "baseline": (8, 8), "scratch": (0, 8)}
    for name, arm in found["variants"].items():
        assert arm.keys() == {"top1", "top5", "pretext_steps", "label_steps", "seconds"}
        assert (arm["pretext_steps"], arm["label_steps"]) == steps[name]
        assert arm["seconds"] > 0
        for metric in ("top1", "top5"):
            entry = arm[metric]
            assert entry.keys() == {"mean", "std", "per_seed", "higher_is_better"}
            assert entry["higher_is_better"] is True
            assert len(entry["per_seed"]) == 2
            assert all(0 <= value <= 100 for value in entry["per_seed"])
            assert entry["mean"] == pytest.approx(statistics.mean(entry["per_seed"]))
            assert entry["std"] == pytest.approx(statistics.stdev(entry["per_seed"]))
    solves = {"solves": 4, "failures": {}}
    assert found["solver"] == {"bissl": {**solves, "per_seed": [{"seed": 0, **solves}]}}
    first = found["comparisons"][0]
    assert {"a", "b", "metric", "difference", "ci95", "test", "p_value"} <= first.keys()
    assert (first["a"], first["b"], first["metric"]) == ("bissl", "baseline", "top1")
    means = [found["variants"][name]["top1"]["mean"] for name in ("bissl", "baseline")]
    assert first["difference"] == pytest.approx(means[0] - means[1])
    assert first["ci95"][0] <= first["difference"] <= first["ci95"][1]
    assert "fine-tuning noise" in first["test"]
    assert any("crop" in note for note in found["notes"])
    assert any("48 pretext images" in note and "30 labelled" in note for note in found["notes"])
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == 1


EVENTS = {
    ("pretext", "train"): {"loss", "lr", "grad_norm"},
    ("pretext", "monitor"): {"epoch", "knn_top1", "embedding_spread"},
    ("head", "train"): {"loss", "lr", "grad_norm"},
    ("head", "epoch"): {"epoch", "val_top1", "val_top5", "val_loss"},
    ("bissl", "lower"): {"alternation", "loss", "lr", "grad_norm"},
    ("bissl", "adaptation"): {"alternation", "strength"},
    ("bissl", "upper"): {
        *("alternation", "loss", "lr", "grad_norm", "status", "residual", "relative_change", "cosine", "min_curvature"),
        *("iterations", "num_hvps", "stationarity", "gradient_noise", "stationarity_over_noise"),
        "active_changes",
        *("ritz_min", "ritz_max", "tikhonov", "residual_curve", "residual_without_tikhonov", "solver_noise", "failure"),
    },
    ("bissl", "alternation"): {"alternation", "seconds", "waiting"},
    ("finetune", "train"): {"loss", "lr", "grad_norm"},
    ("finetune", "epoch"): {"epoch", "train_loss", "val_top1", "val_top5", "val_loss"},
    **{(stage, "waiting"): {"seconds", "waiting"} for stage in ("pretext", "head", "bissl", "finetune")},
}


def test_events_are_those_that_the_report_reads(reference: Path) -> None:
    lines = events(reference)
    assert {(line["stage"], line["event"]) for line in lines} == EVENTS.keys()
    for line in lines:
        fields = EVENTS[line["stage"], line["event"]] | {"stage", "variant", "seed", "event", "step"}
        assert line.keys() == fields
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    places = [(line["stage"], line["variant"], line["seed"], line["event"], line["step"]) for line in lines]
    assert len(set(places)) == len(places)
    assert {(arm, seed) for stage, arm, seed, *_ in places if stage == "finetune"} == {
        (arm, seed) for arm in ("bissl", "baseline", "scratch") for seed in (0, 1)
    }
    assert {arm for stage, arm, *_ in places if stage == "pretext"} == {"bissl", "baseline"}


def test_report_needs_nothing_but_itself(reference: Path) -> None:
    page = (reference / "report.html").read_text()
    assert page.count("<svg") == 5
    assert "not recorded" not in page
    assert "Run not finished" not in page
    assert not re.search(r"(?i)<script|<link|<img|<iframe|@import|\b(?:src|href)\s*=\s*[\"']?\s*(?!#)\w", page)
    for name in ("bissl", "baseline", "scratch"):
        assert f"<td>{name}</td>" in page


def test_splits_do_not_meet(reference: Path) -> None:
    splits = json.loads((reference / "splits.json").read_text())
    train, val, test = (set(splits[part]) for part in ("train", "val", "test"))
    assert (len(train), len(val)) == (30, 20)
    assert not train & val
    assert not test & (train | val)
    data = Config.model_validate_json((reference / CONFIG).read_bytes()).data
    common: dict[str, Any] = {"root": ".", "download": False}
    every = load_downstream("digits", **common, split_seed=data.split_seed, test_fraction=data.test_fraction)
    assert test == set(every.indices["test"])
    # No test image is among those without labels either.
    unlabelled = load_pretext(
        "digits", **common, limit=48, split_seed=data.split_seed, test_fraction=data.test_fraction
    )
    pictures = {image.numpy().tobytes() for image in every.test.images.stacked()}
    assert len(unlabelled) == 48
    assert not any(image.numpy().tobytes() in pictures for image in unlabelled.images.stacked())


def test_weights_give_the_recorded_accuracy(reference: Path) -> None:
    """Every fine-tuned network again: plain modules, pixels scaled by hand, hits counted in numpy."""
    config = Config.model_validate_json((reference / CONFIG).read_bytes())
    view = config.downstream.options["view"]
    data = config.data
    sets = load_downstream(
        "digits", root=".", download=False, split_seed=data.split_seed, test_fraction=data.test_fraction
    )
    assert sets.test.labels is not None
    pixels = sets.test.images.stacked().expand(-1, 3, -1, -1).float() / 255
    mean, std = (torch.tensor(view[name]).view(3, 1, 1) for name in ("mean", "std"))
    scores: dict[str, dict[int, float]] = {}
    for folder in (reference / "checkpoints").glob("finetune-*"):
        info = json.loads((folder / "artifact.json").read_text())
        tensors = torch.nn.ModuleDict(
            {"backbone": build_backbone(config.model.backbone), "head": torch.nn.Linear(64, 10)}
        ).eval()
        run.Artifact("finetune", "", folder, info).load_into(dict(tensors.items()))
        with torch.no_grad():
            logits = tensors["head"](tensors["backbone"]((pixels - mean) / std)).numpy()
        hits = logits.argmax(axis=1) == sets.test.labels.numpy()
        scores.setdefault(info["variant"], {})[info["seed"]] = 100.0 * float(hits.mean())
    for arm, entry in results(reference)["variants"].items():
        assert entry["top1"]["per_seed"] == pytest.approx([scores[arm][seed] for seed in (0, 1)])


def test_resuming_a_finished_run_trains_nothing(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    before = files(reference)
    for stage in STAGES.values():
        monkeypatch.setattr(stage, "build_backbone", None)
    assert execute("--output-dir", str(reference), *ARMS, "--resume") == 0
    assert files(reference) == before
    # Also without repeating the options: the run's own config is taken.
    assert run.main(["--output-dir", str(reference), "--resume"]) == 0
    assert files(reference) == before


def test_stage_by_stage_is_the_same_as_all(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stage(command: str, *options: str) -> list[str]:
        capsys.readouterr()
        folder = tmp_path / f"{command}{len(list(tmp_path.iterdir()))} [x]"
        assert execute(command, *options, "--output-dir", str(folder)) == 0
        assert not (folder / "results.json").exists()
        return re.findall(r"^artifact: (.*)$", capsys.readouterr().out, re.M)

    (pretext,) = stage("pretext")
    (head,) = stage("head", "--from", pretext)
    (bissl,) = stage("bissl", "--from", head)
    assert len(stage("finetune", "--from", bissl)) == 2
    (baseline,) = stage("pretext", "--arm", "baseline")
    stage("finetune", "--arm", "baseline", "--from", baseline)
    stage("finetune", "--arm", "scratch")
    assert weights(tmp_path) == weights(reference)


def test_pipeline_seeds_repeat_everything(reference: Path, tmp_path: Path, no_report: None) -> None:
    assert execute("--output-dir", str(tmp_path), "--pipeline-seeds", "2") == 0
    found = results(tmp_path)
    assert (found["seeds"], found["repeats"]) == ([0, 1], "pipeline")
    assert "paired" in found["comparisons"][0]["test"]
    stages = sorted(path.name.partition("-")[0] for path in (tmp_path / "checkpoints").iterdir())
    assert stages == [*["bissl"] * 2, *["finetune"] * 4, *["head"] * 2, *["pretext"] * 4]
    first = {name: arm["top1"]["per_seed"][0] for name, arm in found["variants"].items()}
    assert first == {name: results(reference)["variants"][name]["top1"]["per_seed"][0] for name in first}
    bissl = {path: content for path, content in weights(tmp_path).items() if path.startswith("bissl")}
    assert len(set(bissl.values())) == 2


def test_earlier_stages_are_found_again(reference: Path, tmp_path: Path, no_report: None) -> None:
    store = tmp_path / "store"
    for name, content in files(reference / "checkpoints").items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(content)
    before = files(store)
    folder = tmp_path / "run"
    assert execute("--output-dir", str(folder), "--artifacts", str(store), "--finetune.lr", "0.011") == 0
    assert {line["stage"] for line in events(folder)} == {"finetune"}
    added = files(store).keys() - before.keys()
    assert {name.partition("-")[0] for name in added} == {"finetune"}
    assert {name: content for name, content in files(store).items() if name in before} == before
    assert not (folder / "checkpoints").exists()


def test_more_seeds_and_arms_on_resume(reference: Path, tmp_path: Path, no_report: None) -> None:
    assert execute("--output-dir", str(tmp_path), "--seeds", "1") == 0
    assert results(tmp_path)["variants"]["bissl"]["top1"]["std"] is None
    assert execute("--output-dir", str(tmp_path), "--seeds", "2", *ARMS, "--resume") == 0
    assert weights(tmp_path) == weights(reference)
    assert without(results(tmp_path)) == without(results(reference))


def test_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert execute("--output-dir", str(folder), "--dry-run") == 0
    output = capsys.readouterr().out
    assert '"preset": "digits"' in output
    assert "bissl: pretext 4 + lower 4 = 8 pretext steps" in output
    assert "baseline: pretext 8 + lower 0 = 8 pretext steps" in output
    assert files(folder).keys() == {CONFIG}
    assert json.loads(files(folder)[CONFIG]) == json.loads(output[: output.rindex("}") + 1])
    assert execute("pretext", "--output-dir", str(folder)) == 0
    before = files(folder)
    assert "holds a run already" in refused(capsys, "--output-dir", str(folder), "--dry-run")
    assert files(folder) == before


def test_a_run_is_only_replaced_on_demand(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(reference)
    assert "holds a run already; continue it with --resume" in refused(capsys, "--output-dir", str(reference))
    message = refused(capsys, "--output-dir", str(reference), *ARMS, "--resume", "--finetune.lr", "0.5")
    assert re.search(r"\n  finetune.lr: 0\.\d+ -> 0.5\n", message)
    # Data that cannot be read must not cost the run that is to be replaced.
    assert "nowhere" in refused(
        capsys, "--output-dir", str(reference), "--overwrite", "--data.pretext", f"folder:{tmp_path}/nowhere"
    )
    assert files(reference) == before
    assert execute("pretext", "--output-dir", str(tmp_path)) == 0
    (old,) = weights(tmp_path)
    assert execute("pretext", "--output-dir", str(tmp_path), "--overwrite", "--pretext.lr", "0.5") == 0
    assert Config.model_validate_json((tmp_path / CONFIG).read_bytes()).pretext.lr == 0.5
    assert len(weights(tmp_path)) == 1
    assert old not in weights(tmp_path)


BAD_RUNS = [
    (["--data.downstream", "folder:nowhere"], "nowhere"),
    (["--data.pretext", "nothing"], "there is no data source 'nothing'"),
    (["--data.pretext", "folder:broken", "--data.downstream", "folder:broken"], "002.png"),
    (["--data.downstream", "folder:few"], "class 'rare' has too few images"),
    (["--data.labels-per-class", "9999"], "labels_per_class"),
    (["--pretext.batch-size", "49"], "pretext.batch_size: 49 is larger than the data, 48 pretext images"),
    (["--downstream.batch-size", "31"], "downstream.batch_size: 31 is larger than the data, 30 labelled images"),
    (["head", "--from", "nowhere"], "nowhere holds no finished artifact"),
    (["head", "--from", "few"], "few holds no finished artifact"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_RUNS)
def test_bad_data_leaves_nothing_behind(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "few", {"common": 9, "rare": 1})
    tree(tmp_path / "broken", {"a": 25, "b": 25})
    (tmp_path / "broken" / "a" / "002.png").write_bytes(b"no image")
    before = files(tmp_path)
    assert message in refused(capsys, *arguments)
    assert files(tmp_path) == before
    if "--from" not in arguments:
        assert message in refused(capsys, *arguments, "--dry-run")
        assert files(tmp_path) == before


def test_cuda_and_torchrun_are_refused_where_they_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "run"
    message = refused(capsys, "--output-dir", str(folder), "--device", "cuda")
    assert "device: cuda was asked for, but torch sees no CUDA device; use --device cpu or auto" in message
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE" in refused(capsys, "--output-dir", str(folder))
    assert not folder.exists()


def test_wrong_and_damaged_artifacts_are_refused(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {path.name.partition("-")[0]: path for path in (reference / "checkpoints").iterdir()}
    for command, stage, expected in (
        ("head", "head", "pretext"),
        ("head", "finetune", "pretext"),
        ("bissl", "pretext", "head"),
        ("bissl", "bissl", "head"),
        ("finetune", "head", "bissl"),
        ("finetune", "pretext", "bissl"),
        ("finetune --arm baseline", "bissl", "pretext"),
    ):
        message = refused(capsys, *command.split(), "--from", str(places[stage]), "--output-dir", str(tmp_path / "run"))
        arm = "baseline" if "baseline" in command else "bissl"
        assert f"--from: {command.split()[0]} of the arm '{arm}' starts from a {expected} artifact" in message
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files(places["pretext"]).items():
        (copy / name).write_bytes(content[: len(content) - 10] if name.startswith("weights") else content)
    for name in ("weights.safetensors", "artifact.json"):
        message = refused(capsys, "head", "--from", str(copy), "--output-dir", str(tmp_path / "run"))
        assert name in message
        assert "delete the folder" in message
        (copy / "artifact.json").write_text("{}")
    assert not (tmp_path / "run").exists()


def test_a_report_that_cannot_be_written_is_said_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(folder: Path) -> Path:
        raise ValueError("the report needs matplotlib")

    monkeypatch.setattr(all_stages, "write_report", fails)
    message = refused(capsys, "--output-dir", str(tmp_path), "--seeds", "1")
    assert "report.html was not written, all other files were: the report needs matplotlib" in message
    assert (tmp_path / "results.json").exists()


def script(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / "bissl" / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    # Names of the recipe's own files, which must not hide anything installed nor be hidden.
    (tmp_path / "data.py").write_text("raise SystemExit('wrong data')")
    done = script(tmp_path, "--dry-run", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "pretext steps" in done.stdout
    assert set(files(tmp_path)) == {"data.py", f"runs/digits/{CONFIG}"}


def test_the_script_fails_with_one_line(tmp_path: Path) -> None:
    done = script(tmp_path, "--pretext.lr", "-1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "run.py: error: pretext.lr: Input should be greater than 0, got '-1'\n"
    assert not files(tmp_path)


def test_an_artifact_of_another_backbone_is_refused_before_anything_is_written(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = next((reference / "checkpoints").glob("pretext-*"))
    options = ("head", "--from", str(artifact), "--model.backbone=resnet-small", "--output-dir", str(tmp_path / "run"))
    message = refused(capsys, *options)
    assert "the weights of 'backbone' do not fit this configuration" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
