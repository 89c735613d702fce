"""Whole runs: what they leave, what they find, and that one which is killed anywhere ends like one that is not."""

import csv
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from bilevel import Implicit, Trainer
from bilevel.products import GaussNewton, HVPProvider, ReverseOverReverse
from recipes.cleaning import command, fold, outcome
from recipes.cleaning.settings import RANKING
from recipes.experiment import artifacts
from recipes.experiment.records import read_run
from recipes.vision.networks.backbones import build_backbone
from tests.support.html_page import Page
from tests.support.recipes.cleaning_runs import clean, in_a_child, refused, shaded
from tests.support.recipes.small_runs import files, weights, without

FILES = {"config.json", "images.npz", "metrics.jsonl", "report.html", "results.json", RANKING}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shaded(tmp_path_factory.mktemp("pictures") / "data", 16)


def options(data: Path, folder: Path) -> list[str]:
    trusted = ["--trusted-fraction=0.25", "--flips=uniform:0.25"]
    return ["--data", f"folder:{data}", *trusted, "--learning.alternations=2", "--output-dir", str(folder)]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert clean(*options(data, folder)) == 0
    return folder


def ranking(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / RANKING).read_text())))


def test_every_file_is_there(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {*FILES, "checkpoints"}
    stages = sorted(path.name.partition("-")[0] for path in (whole / "checkpoints").iterdir())
    assert stages == ["features", "fold", "fold"]
    assert not list(whole.rglob("step-*"))


def test_the_ranking_holds_every_sample_most_suspicious_first(whole: Path, data: Path) -> None:
    rows = ranking(whole)
    assert len(rows) == 24
    assert all((data / row["file"]).is_file() for row in rows)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(0.0 < float(row["weight"]) < 2.0 for row in rows)
    assert {row["right"] == row["file"].split("/")[0] for row in rows} == {True}


def test_planted_labels_of_pictures_that_are_easily_told_apart_come_first(whole: Path) -> None:
    wrong = [row["given"] != row["right"] for row in ranking(whole)]
    assert wrong == [True] * 6 + [False] * 18
    results = json.loads((whole / "results.json").read_text())
    assert results["rankings"]["weighted fit"]["area_under_curve"]["per_seed"] == [1.0]
    assert results["accuracy"]["kept"]["samples"]["mean"] == 1.0
    assert results["rankings"].keys() >= {"weighted fit", "out-of-fold loss", "trusted part alone", "weights alone"}


def test_the_page_shows_the_pictures_and_asks_for_nothing(whole: Path) -> None:
    page = Page((whole / "report.html").read_text())
    assert sum(address.startswith("data:image/png") for address in page.addresses) == 3
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    first = ranking(whole)[0]
    score = f"score {float(first['score']):.3g}, suspicious"
    caption = f"given {first['given']}, predicted {first['predicted']} right: {first['right']} {score} {first['file']}"
    assert caption in page.text
    count = sum(row["suspicious"] == "1" for row in ranking(whole))
    # Those that are wrong are among them, and at most a few more: eight trusted pictures say little of their losses.
    assert 6 <= count < 24
    assert f"{count} of 24 labels are suspicious by the weighted fit; 3 of the {count} are below" in page.text
    assert ["weighted fit", "1.0000", f"{6 / count:.4f}", "1.0000", str(count)] in page.cells


def test_the_events_are_those_of_a_run(whole: Path) -> None:
    records = read_run(whole)
    upper = [(e["variant"], e["step"]) for e in records.events if e["event"] == "upper"]
    assert upper == [("fold 0", 1), ("fold 0", 2), ("fold 1", 1), ("fold 1", 2)]
    assert {e["status"] for e in records.events if e["event"] == "upper"} == {"CONVERGED"}


def kill_before(owner: Any, name: str, call: int) -> None:
    """From now on, die by SIGKILL before this call."""
    real, left = getattr(owner, name), [call]

    def killing(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    setattr(owner, name, killing)


# Where a run of two folds with two alternations each can be told to die; each fold saves weights, then facts.
PLACES: dict[str, tuple[Any, str, int]] = {
    "before the first file of features": (artifacts, "write_atomic", 1),
    "between weights and facts of features": (artifacts, "write_atomic", 2),
    "in the first fold's first step": (Trainer, "_upper_step", 1),
    "in the first fold's second step": (Trainer, "_upper_step", 2),
    "in the baselines of the first fold": (fold, "_kept", 1),
    "between weights and facts of a fold": (artifacts, "write_atomic", 4),
    "in the second fold": (Trainer, "_upper_step", 4),
    "before the ranking": (outcome, "write_atomic", 1),
    "before the page": (outcome, "write_atomic", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_killed_and_resumed_leaves_the_same_bits(
    place: str, whole: Path, data: Path, tmp_path: Path
) -> None:
    arguments = options(data, tmp_path / "run")

    def killed() -> None:
        kill_before(*PLACES[place])
        os._exit(clean(*arguments))

    assert in_a_child(killed) == -signal.SIGKILL
    assert clean(*arguments, "--resume") == 0
    assert_same(tmp_path / "run", whole)


def test_with_a_network_below_too(data: Path, tmp_path: Path) -> None:
    arguments = [[*options(data, tmp_path / name), "--learning.hidden=3"] for name in ("whole", "run")]
    assert clean(*arguments[0]) == 0

    def killed() -> None:
        kill_before(*PLACES["in the second fold"])
        os._exit(clean(*arguments[1]))

    assert in_a_child(killed) == -signal.SIGKILL
    assert clean(*arguments[1], "--resume") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("hidden", "kind"), [(0, ReverseOverReverse), (3, GaussNewton)])
def test_a_network_is_solved_with_gauss_newton_products(
    hidden: int, kind: type[HVPProvider], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def recording(solver: Any, *, hvp: HVPProvider) -> Implicit:
        taken.append(hvp)
        return Implicit(solver, hvp=hvp)

    monkeypatch.setattr(fold, "Implicit", recording)
    assert clean(*options(data, tmp_path / "run"), f"--learning.hidden={hidden}") == 0
    assert [type(hvp) for hvp in taken] == [kind, kind]


def assert_same(run: Path, whole: Path) -> None:
    assert weights(run) == weights(whole)
    assert files(run).keys() - {".writer.lock"} == files(whole).keys() - {".writer.lock"}
    assert (run / RANKING).read_bytes() == (whole / RANKING).read_bytes()
    first, second = (without(json.loads((folder / "results.json").read_text())) for folder in (run, whole))
    assert first == second
    events = [without([dict(event) for event in read_run(folder).events]) for folder in (run, whole)]
    assert events[0] == events[1]


def test_ctrl_c_ends_with_its_code_and_the_run_goes_on(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(data, tmp_path / "run")

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_upper_step", stop)
        assert clean(*arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("interrupted; the same command with --resume continues")
    assert clean("--output-dir", str(tmp_path / "run"), "--resume") == 0
    assert_same(tmp_path / "run", whole)


def test_more_seeds_on_resume_are_added(whole: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = weights(tmp_path / "run")
    assert clean(*options(data, tmp_path / "run"), "--seeds=2", "--resume") == 0
    after = weights(tmp_path / "run")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert len(results["rankings"]["weighted fit"]["recall"]["per_seed"]) == 2


def test_a_run_is_only_replaced_on_demand(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = files(tmp_path / "run")
    assert "holds a run already" in refused(capsys, *options(data, tmp_path / "run"))
    said = refused(capsys, *options(data, tmp_path / "run"), "--resume", "--false-alarms=0.2")
    assert "false_alarms: 0.05 -> 0.2" in said
    assert files(tmp_path / "run") == before


def test_changed_pictures_are_noticed_on_resume(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "dark" / "003.png").rename(tmp_path / "data" / "bright" / "103.png")
    before = files(tmp_path / "run")
    moved = options(tmp_path / "data", tmp_path / "run")
    assert "data.source" in refused(capsys, *moved, "--resume")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["source"] = f"folder:{tmp_path / 'data'}"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    before = files(tmp_path / "run")
    assert "the images of this run changed since it was started" in refused(capsys, *moved, "--resume")
    assert files(tmp_path / "run") == before


def test_a_dry_run_writes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clean(*options(data, tmp_path / "run"), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "24 pictures to look at, 8 trusted" in said
    assert json.loads(said[said.index("{") :])["data"]["flips"] == "uniform:0.25"
    assert not (tmp_path / "run").exists()


def test_trusted_pictures_of_a_folder_and_labels_that_nobody_knows(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy, trusted = tmp_path / "noisy", shaded(tmp_path / "trusted", 4, seed=1)
    shutil.copytree(data, noisy)
    # One wrong label, and a copy of a trusted picture under another one.
    (noisy / "dark" / "000.png").rename(noisy / "bright" / "900.png")
    shutil.copy(trusted / "dark" / "001.png", noisy / "bright" / "901.png")
    run = tmp_path / "run"
    arguments = ["--data", f"folder:{noisy}", "--trusted", f"folder:{trusted}", "--output-dir", str(run)]
    assert clean(*arguments) == 0
    rows = ranking(run)
    assert rows[0]["file"] == "bright/900.png"
    assert (rows[0]["given"], rows[0]["predicted"], rows[0]["suspicious"]) == ("bright", "dark", "1")
    assert "right" not in rows[0]
    results = json.loads((run / "results.json").read_text())
    assert "left out of the data as copies of trusted pictures: 1" in results["notes"]
    assert "a certain wrong label: bright/901.png (given bright, trusted dark)" in results["notes"]
    (certain,) = (line for line in results["warnings"] if line.startswith("certain wrong labels"))
    assert certain.endswith(": bright/901.png (given bright, trusted dark)")
    assert f"note: {certain}" in capsys.readouterr().out.splitlines()
    assert f"Note: {certain}" in Page((run / "report.html").read_text()).text
    assert results["rankings"]["weighted fit"].keys() == {"suspicious"}


def test_what_was_not_named_and_not_read_is_said_before_a_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "dark" / "about.txt").write_text("pictures")
    arguments = ["--data", f"folder:{tmp_path / 'data'}", "--trusted-fraction=0.2"]
    assert clean(*arguments, "--output-dir", str(tmp_path / "run"), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "passed over 1 file (.txt 1)" in said
    assert "note: no trusted pictures are named: 20% of the given labels are taken as trusted, wrong ones" in said
    assert clean(*arguments, "--flips=uniform:0.2", "--output-dir", str(tmp_path / "run"), "--dry-run") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")] == [
        f"note: folder:{tmp_path / 'data'}: passed over 1 file (.txt 1)"
    ]


def test_features_that_tell_nothing_are_called_weak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    # Six classes of pictures of the same kind.
    for k in range(6):
        shutil.copytree(shaded(tmp_path / f"{k}", 16, seed=k, classes=("a",)) / "a", data / f"class{k}")
    assert clean(*options(data, run)) == 0
    results = json.loads((run / "results.json").read_text())
    right = results["accuracy"]["weighted"]["trusted"]["mean"]
    assert right < 0.5
    said = capsys.readouterr().out
    for words in (f"weak features: the weighted model gets {1 - right:.0%} of the held-out", "no better beyond chance"):
        assert words in said
        assert words in Page((run / "report.html").read_text()).text


def test_a_stop_before_a_run_has_saved_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command, "check_places", stop)
    assert clean(*options(data, tmp_path / "run"), "--dry-run") == 75
    assert capsys.readouterr().err == "run.py: stopped by SIGTERM before a run began; this command has saved nothing\n"
    assert not (tmp_path / "run").exists()


def test_short_names_stand_among_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert clean("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in ("trusted", "trusted-fraction", "truth", "flips"):
        assert f" --{name} {'float' if 'fraction' in name else 'str'}, --data.{name} " in said
    assert " --data str, --data.source str pictures with labels" in said
    assert " --init-backbone str, --model.init-backbone str " in said
    assert "--data [JSON]" not in said


def test_trusted_pictures_without_pictures_to_look_at(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--trusted", f"folder:{data}")
    assert "data.trusted: the pictures to look at are missing; name them by --data" in said


def test_a_folder_without_the_word_is_suggested_with_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"but a folder of that name: write folder:{data}" in refused(capsys, "--data", str(data))


def test_a_name_that_is_no_text_is_shown_by_its_bytes(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    name = os.fsdecode(b"\xff<b>.png")
    (tmp_path / "data" / "dark" / "000.png").rename(tmp_path / "data" / "dark" / name)
    assert clean(*options(tmp_path / "data", tmp_path / "run"), "--learning.alternations=1", "--shown=24") == 0
    assert b"dark/\xff<b>.png," in (tmp_path / "run" / RANKING).read_bytes()
    assert r"dark/\udcff<b>.png" in Page((tmp_path / "run" / "report.html").read_text()).text


def test_the_single_loop_finds_them_too(data: Path, tmp_path: Path) -> None:
    arguments = options(data, tmp_path / "run")
    assert clean(*arguments, "--learning.method=soba", "--learning.batch-size=4", "--learning.epochs=20") == 0
    wrong = [row["given"] != row["right"] for row in ranking(tmp_path / "run")]
    assert wrong == [True] * 6 + [False] * 18


def test_features_of_a_backbone_with_weights_of_a_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(data, tmp_path / "run"), "--model.features=backbone", "--backbone=resnet-tiny"]
    assert clean(*arguments, "--model.image-size=16") == 0
    (made,) = (tmp_path / "run" / "checkpoints").glob("features-*/artifact.json")
    assert json.loads(made.read_text())["width"] == 64
    said = refused(capsys, *arguments, "--init-backbone", str(tmp_path / "none.pt"), "--overwrite")
    assert "none.pt" in said


def test_features_of_a_network_of_timm(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm:NAME needs timm, of the extra timm")
    backbone = ("--model.features=backbone", "--backbone=timm:test_resnet", "--model.image-size=32")
    assert clean(*options(data, tmp_path / "run"), *backbone) == 0
    (made,) = (tmp_path / "run" / "checkpoints").glob("features-*/artifact.json")
    width = build_backbone("timm:test_resnet", image_size=32).num_features
    assert json.loads(made.read_text())["width"] == width


def test_too_many_features_are_refused_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *options(data, tmp_path / "run"), "--model.image-size=32")
    assert "model.image_size: a picture of 32 px has 3,072 features, and at most 2,048 can be used" in said
    patches = ("--model.features=patches", "--model.filters=257")
    said = refused(capsys, *options(data, tmp_path / "run"), *patches)
    assert "model.filters: a picture seen by 257 has 2,056 features, and at most 2,048 can be used; take fewer" in said
    assert not (tmp_path / "run").exists()


def test_a_page_that_cannot_be_drawn_is_said_at_the_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: Any) -> None:
        raise ValueError("a drawing needs matplotlib")

    monkeypatch.setattr(outcome, "precision_drawn", fails)
    said = refused(capsys, *options(data, tmp_path / "run"))
    assert "report.html was not written, all other files were: a drawing needs matplotlib" in said
    assert (tmp_path / "run" / RANKING).exists()
    assert (tmp_path / "run" / "results.json").exists()
