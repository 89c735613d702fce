"""A dry run refuses what the run refuses, in the same words, and passes what the run passes."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bissl.commands.main import main
from recipes.experiment.folder.run_folder import CONFIG
from recipes.vision.networks.backbones import build_backbone
from tests.support.recipes.image_trees import tree
from tests.support.recipes.small_runs import SMALL_OPTIONS, execute, files, refused, whole_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and files that are wrong in many ways."""
    folder = tmp_path_factory.mktemp("made")
    whole_run(folder / "whole", "--seeds=1")
    for stage in ("pretext", "head", "bissl", "finetune"):
        shutil.copytree(next((folder / "whole" / "checkpoints").glob(f"{stage}-*")), folder / stage)
    shutil.copytree(folder / "head", folder / "cut")
    (folder / "cut" / "weights.safetensors").write_bytes((folder / "head" / "weights.safetensors").read_bytes()[:-9])
    state = build_backbone("resnet-tiny").state_dict()
    torch.save(state, folder / "right.pt")
    torch.save({**state, "conv1.weight": state["conv1.weight"] * math.nan}, folder / "nan.pt")
    torch.save(build_backbone("resnet-small").state_dict(), folder / "other.pt")
    (folder / "damaged.pt").write_bytes((folder / "right.pt").read_bytes()[:500])
    tree(folder / "images", {"a": 30, "b": 30})
    (folder / "table").mkdir()
    for number, file in enumerate(sorted((folder / "images" / "a").iterdir())):
        shutil.copy(file, folder / "table" / f"{number}.png")
    rows = "".join(f"{number}.png,{number % 2},{number % 3 % 2}\n" for number in range(30))
    (folder / "table" / "labels.csv").write_text(f"file,x,y\n{rows}")
    (folder / "file").write_text("none")
    return folder


REFUSED: dict[str, tuple[list[str], str]] = {
    "weights that are nowhere": (["--init-backbone=nowhere.pt"], "nowhere.pt cannot be read"),
    "damaged weights": (["--init-backbone=damaged.pt"], "damaged.pt is no whole file of torch.save"),
    "weights of another network": (["--init-backbone=other.pt"], "does not fit resnet-tiny|neither to resnet-tiny"),
    "weights that are not finite": (["--init-backbone=nan.pt"], "nan.pt holds NaN or infinity in conv1.weight"),
    "weights of no kind": (["--init-backbone=images"], "holds no finished artifact"),
    "a task for other labels": (
        ["--data.downstream=folder:table", "--downstream.batch-size=4", "--data.labels-per-class=null"],
        "has multi-label labels, but downstream.task 'classification' takes single-label ones",
    ),
    "a tracker": (["--tracking=wandb"], "the package wandb is not installed"),
    "no parent": (["head"], "head: needs --from ARTIFACT"),
    "a parent that is nowhere": (["head", "--from=nowhere"], "nowhere holds no finished artifact"),
    "a parent of another stage": (["bissl", "--from=pretext"], "starts from a head artifact, pretext is of pretext"),
    "a parent of another network": (["head", "--from=pretext", "--model.backbone=resnet-small"], "do not fit this con"),
    "a parent with other heads": (["head", "--from=pretext", "--pretext.task=byol"], "weights of 'heads' do not fit"),
    "a parent for other classes": (
        [
            *("bissl", "--from=head", "--data.downstream=folder:images", "--downstream.batch-size=4"),
            *("--data.pretext=folder:images", "--pretext.batch-size=4"),
            *("--data.labels-per-class=null", "--data.val-per-class=null"),
        ],
        "weights of 'head' do not fit",
    ),
    "a parent that is cut short": (["bissl", "--from=cut"], "weights.safetensors is damaged"),
    "batches": (["--pretext.batch-size=49"], "49 is larger than the data, 48 pretext images"),
    "labelled batches": (["--downstream.batch-size=31"], "31 is larger than the data, 30 labelled images"),
    "chunks": (["--compute.micro-batch=23", "--bissl.hvp=reverse"], "chunks of 23 leave a single image"),
    "images": (["--data.pretext=folder:nowhere"], "there is no folder nowhere"),
    "a device": (["--device=cuda"], "torch sees no CUDA device"),
    "a file for a folder": (["--output-dir=file"], "output-dir: file is a file"),
    "a file for artifacts": (["--artifacts=file"], "--artifacts: file is a file"),
    "a run that is there": (["--output-dir=whole"], "holds a run already"),
    "a run of another configuration": (
        ["--output-dir=whole", "--resume", "--seeds=1", "--finetune.lr=9"],
        "was made with another configuration",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_run_refuses(
    case: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "wandb" else spec(name, *of))
    arguments, said = REFUSED[case]
    before = files(made)
    messages = [refused(capsys, *arguments, *more) for more in ([], ["--dry-run"])]
    assert any(part in messages[0] for part in said.split("|")), messages[0]
    assert messages[0] == messages[1]
    assert files(made) == before
    assert not (made / "runs").exists()


PASSED: dict[str, list[str]] = {
    "all": [],
    "weights": ["--init-backbone=right.pt", "--pretext.epochs=0"],
    "an artifact's weights": ["--init-backbone=pretext"],
    "head": ["head", "--from=pretext"],
    "bissl": ["bissl", "--from=head"],
    "finetune": ["finetune", "--from=bissl"],
    "several labels": [
        *("--data.downstream=folder:table", "--downstream.batch-size=4", "--data.labels-per-class=null"),
        *("--downstream.task=multilabel", "--data.val-per-class=null"),
    ],
}


@pytest.mark.parametrize("case", PASSED)
def test_a_dry_run_passes_what_is_right(case: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert execute(*PASSED[case], "--dry-run", f"--output-dir={tmp_path / 'run'}") == 0
    assert files(tmp_path / "run").keys() == {CONFIG}


def test_a_dry_run_with_overwrite_leaves_the_run_that_is_there(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "whole", tmp_path / "run")
    before = files(tmp_path / "run")
    assert execute("--output-dir", str(tmp_path / "run"), "--overwrite", "--finetune.lr=9", "--dry-run") == 0
    assert files(tmp_path / "run") == before


OTHERS = {
    "search": (["search", "--trials=2"], "--from=bissl"),
    "figure2": (["figure2", "--epochs=4,5", "--output-dir=figure"], ""),
}


@pytest.mark.parametrize("command", OTHERS)
@pytest.mark.parametrize("case", ["damaged weights", "a task for other labels", "a tracker", "labelled batches"])
def test_dry_runs_of_other_commands_check_too(
    command: str, case: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "search":
        pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
    monkeypatch.chdir(made)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    arguments, said = REFUSED[case]
    (tool, *options), _ = OTHERS[command]
    before = files(made)
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert main([tool, *SMALL_OPTIONS, *arguments, *options, *more]) == 2
        assert said in capsys.readouterr().err
    assert files(made) == before


def test_a_dry_run_of_a_search_looks_at_its_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
    monkeypatch.chdir(made)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "notes.txt").write_text("mine")
    arguments = ["search", *SMALL_OPTIONS, "--trials=1", "--finetune.epochs=1", "--from=bissl", "--output-dir"]
    for more in (["--dry-run"], []):
        assert main([*arguments, str(tmp_path / "search"), *more]) == 2
        assert "holds other files, but no search.json" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert main([*arguments, str(tmp_path / "whole"), "--dry-run"]) == 0
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "whole"), "--finetune.validate-every=1", "--dry-run"]) == 2
    assert "holds another search" in capsys.readouterr().err


Spelling = Callable[[Path], str]
SPELLINGS: dict[str, Spelling] = {
    "inside": lambda here: str(here / "images" / "run"),
    "the folder itself": lambda here: str(here / "images"),
    "deep": lambda here: str(here / "images" / "a" / "b" / "c"),
    "relative": lambda here: "images/run",
    "with dots": lambda here: "other/../images/./run",
    "through a link": lambda here: linked(here / "link", here / "images") + "/run",
    "by a link inside": lambda here: linked_to(here / "images" / "more", here / "elsewhere") + "/run",
    "home": lambda here: "~/images/run",
}


def linked(link: Path, target: Path) -> str:
    link.symlink_to(target)
    return str(link)


def linked_to(link: Path, target: Path) -> str:
    """Another place that a link in the data folder leads to."""
    target.mkdir()
    link.symlink_to(target)
    return str(target)


IMAGES = ["--data.labels-per-class=null", "--data.val-per-class=null", "--downstream.batch-size=4"]


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "other").mkdir()
    tree(tmp_path / "images", {"a": 30, "b": 30})
    return tmp_path


@pytest.mark.parametrize("option", ["--output-dir", "--artifacts"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_run_is_not_written_where_images_are_read_from(
    spelling: str, option: str, standing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = SPELLINGS[spelling](standing)
    before = files(standing)
    for source in (["--data.pretext=folder:images"], ["--data.downstream=folder:~/images"]):
        for more in ([], ["--dry-run"]):
            said = refused(capsys, *IMAGES, *source, f"{option}={place}", *more)
            assert f"{option.removeprefix('--') if 'output' in option else option}: " in said
            assert "images, whose folders data." in said
            assert "Name a folder outside of it" in said
            assert "delete" not in said
    assert files(standing) == before


@pytest.mark.parametrize("tool", [["search", "--trials=1"], ["figure2", "--epochs=4"]])
def test_other_commands_are_not_written_there_either(
    tool: list[str], standing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if tool[0] == "search":
        pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
    before = files(standing)
    for more in ([], ["--dry-run"]):
        source = ["--data.pretext=folder:images", "--output-dir=images/x"]
        assert main([tool[0], *SMALL_OPTIONS, *tool[1:], *IMAGES, *source, *more]) == 2
        assert "images/x lies in images, whose folders data.pretext reads as images" in capsys.readouterr().err
    assert files(standing) == before


def test_a_run_that_was_begun_there_goes_on_elsewhere(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = [*IMAGES, "--data.pretext=folder:images", "--data.downstream=folder:images"]
    assert execute("pretext", *source, "--output-dir=run") == 0
    shutil.move("run", "images/run")
    said = refused(capsys, "pretext", *source, "--output-dir=images/run", "--resume")
    assert "The run that is there goes on with --resume once it is moved out" in said
    shutil.move("images/run", "again")
    assert execute("pretext", *source, "--output-dir=again", "--resume") == 0


@pytest.mark.parametrize("place", ["beside", "images-too", "images/.hidden/run", ".."])
def test_places_that_are_not_read_are_allowed(place: str, standing: Path) -> None:
    output = f"{place}/made" if place == ".." else place
    assert execute(*IMAGES, "--data.pretext=folder:images", f"--output-dir={output}", "--dry-run") == 0
    assert json.loads((standing / output / CONFIG).read_text())["data"]["pretext"] == "folder:images"


def test_a_folder_with_a_table_of_labels_may_hold_a_run(standing: Path) -> None:
    rows: Any = "".join(f"a/{number:03d}.png,{number % 2}.5\n" for number in range(30))
    (standing / "images" / "labels.csv").write_text(f"file,x\n{rows}")
    options = ["--data.pretext=folder:images", "--data.downstream=folder:images", "--downstream.task=regression"]
    small = [*IMAGES, "--data.pretext-limit=20", "--pretext.batch-size=10", "--output-dir=images/run"]
    for more in (["--dry-run"], []):
        assert execute("pretext", *options, *small, *more) == 0
    assert execute("pretext", *options, *small, "--resume") == 0
