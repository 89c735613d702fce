"""``~`` and ``~user`` in every option that takes a path, where no shell has replaced them."""

import os
import pwd
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recipes.bissl.commands.main import main
from recipes.vision.networks.backbones import build_backbone
from tests.support.recipes.image_trees import tree
from tests.support.recipes.small_runs import SMALL_OPTIONS, execute, refused, whole_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and beside it files to name."""
    folder = tmp_path_factory.mktemp("home")
    whole_run(folder / "whole", "--seeds=1")
    torch.save(build_backbone("resnet-tiny").state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text('{"seeds": 1}')
    tree(folder / "images", {"a": 20, "b": 20})
    return folder


@pytest.fixture(params=["~", "~somebody"])
def home(
    request: pytest.FixtureRequest, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Path]:
    """How a home folder is written, and where it is."""
    here = tmp_path / "home"
    shutil.copytree(run, here)
    if request.param == "~":
        monkeypatch.setenv("HOME", str(here))
    else:
        monkeypatch.setattr(pwd, "getpwnam", lambda name: SimpleNamespace(pw_dir=str(here)))
    (tmp_path / "standing").mkdir()
    monkeypatch.chdir(tmp_path / "standing")
    return request.param, here


def artifact(here: Path, stage: str) -> str:
    return next((here / "whole" / "checkpoints").glob(f"{stage}-*")).name


def small(*arguments: str) -> Callable[[str, Path], list[str]]:
    return lambda sign, here: [*SMALL_OPTIONS, *(text.replace("~", sign) for text in arguments)]


def plain(*arguments: str) -> Callable[[str, Path], list[str]]:
    """Without the options of a pipeline."""
    return lambda sign, here: [text.replace("~", sign) for text in arguments]


def of_stage(stage: str, *arguments: str) -> Callable[[str, Path], list[str]]:
    """With the artifact's name in the place of ARTIFACT."""
    return lambda sign, here: [text.replace("~", sign).replace("ARTIFACT", artifact(here, stage)) for text in arguments]


SEARCH = ("--trials=1", "--finetune.epochs=1", "--seeds=1")
COMMANDS: dict[str, tuple[Callable[[str, Path], list[str]], str]] = {
    "output-dir": (small("pretext", "--output-dir=~/made"), "made/config.json"),
    "artifacts": (small("pretext", "--artifacts=~/store", "--output-dir=made"), "store/pretext-*/artifact.json"),
    "config": (small("--config=~/config.json", "--dry-run", "--output-dir=~/made"), "made/config.json"),
    "init-backbone": (small("--init-backbone", "~/weights.pt", "--dry-run", "--output-dir=~/made"), "made/config.json"),
    "data": (
        small(
            *("--data.pretext=folder:~/images", "--data.downstream=folder:~/images", "--data.image-size=8"),
            *("--data.pretext-limit=30", "--dry-run", "--output-dir=~/made", "--downstream.batch-size=6"),
        ),
        "made/config.json",
    ),
    "from": (
        lambda sign, here: [
            *SMALL_OPTIONS,
            *of_stage("pretext", "head", "--from=~/whole/checkpoints/ARTIFACT", "--output-dir=~/made")(sign, here),
        ],
        "made/checkpoints/head-*/artifact.json",
    ),
    "search": (
        lambda sign, here: [
            "search",
            *SMALL_OPTIONS,
            *SEARCH,
            *of_stage("bissl", "--from=~/whole/checkpoints/ARTIFACT", "--output-dir=~/made", "--artifacts=~/store")(
                sign, here
            ),
        ],
        "made/search.json",
    ),
    "figure2": (
        lambda sign, here: ["figure2", *SMALL_OPTIONS, "--seeds=1", "--epochs=4", f"--output-dir={sign}/made"],
        "made/figure2.csv",
    ),
    "table": (plain("table", "~/whole", "--to=~/made"), "made/table.csv"),
    "features": (
        plain("features", "~/whole", "--artifacts=~/whole/checkpoints", "--to=~/made", "--perplexity=5"),
        "made/features.json",
    ),
    "export of a run": (plain("export", "~/whole", "--to=~/made"), "made/MODEL_CARD.md"),
    "export of an artifact": (
        of_stage(
            "finetune",
            *("export", "~/whole/checkpoints/ARTIFACT", "--to=~/made", "--run=~/whole"),
            "--results=~/whole/results.json",
        ),
        "made/MODEL_CARD.md",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_home_folder_in_an_option_is_meant(command: str, home: tuple[str, Path]) -> None:
    if command == "search":
        pytest.importorskip("optuna", reason="a search needs Optuna, of the extra search")
    sign, here = home
    arguments, made = COMMANDS[command]
    assert main(arguments(sign, here)) == 0
    assert list(here.glob(made))
    assert not [name for name in os.listdir() if name.startswith("~")]


def test_the_root_of_published_sets(home: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    sign, here = home
    assert main(["data", "list", f"--root={sign}/sets"]) == 0
    assert str(here) in capsys.readouterr().out.replace("\n", "")
    options = "--data.pretext=stl10", "--data.downstream=stl10", "--data.download=false", f"--data.root={sign}/sets"
    assert f"so that {here / 'sets'} holds" in refused(capsys, *options)


def test_an_unknown_user_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--output-dir", "--artifacts", "--config", "--init-backbone"):
        assert "knows no home folder of ~nobody-at-all" in refused(capsys, f"{option}=~nobody-at-all/x")
    assert execute("--data.root=~nobody-at-all/x", "--data.pretext=stl10", "--data.download=false") == 2
