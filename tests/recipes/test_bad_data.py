"""Data that cannot be used end every recipe's command with exit code 2 and one sentence, and nothing is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.recipes import cleaning_runs, small_runs
from tests.support.recipes.image_trees import tree

Refused = Callable[..., str]


def bissl(capsys: pytest.CaptureFixture[str], source: str, *options: str) -> str:
    return small_runs.refused(capsys, "--data.downstream", source, "--data.pretext", source, *options)


def cleaning(capsys: pytest.CaptureFixture[str], source: str, *options: str) -> str:
    return cleaning_runs.refused(capsys, "--data", source, *options)


RECIPES: list[Refused] = [bissl, cleaning]


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "a file instead": (lambda f: (shutil.rmtree(f), f.write_text("x")), "images"),
    "one class": (lambda f: shutil.rmtree(f / "b"), "has a single class folder, a"),
    "an empty class": (lambda f: (f / "c").mkdir(), "holds no image"),
    "no class": (lambda f: [shutil.rmtree(f / name) for name in "ab"], "has no class folder"),
    "a broken picture": (lambda f: (f / "b" / "011.png").write_bytes(b"no image"), "011.png"),
    "a cut picture": (lambda f: (f / "a" / "003.png").write_bytes((f / "a" / "003.png").read_bytes()[:90]), "003.png"),
    "an empty picture": (lambda f: (f / "a" / "000.png").write_bytes(b""), "000.png"),
    "a picture that links nowhere": (lambda f: (f / "a" / "gone.png").symlink_to("nowhere.png"), "gone.png"),
    "a table without its pictures": (lambda f: (f / "labels.csv").write_text("file,label\na/x.png,a\n"), "row 2"),
    "a table without a value": (lambda f: (f / "labels.csv").write_text("file,label\na/000.png,\n"), "row 2"),
    "a table with NaN": (lambda f: (f / "labels.csv").write_text("file,x\na/000.png,nan\nb/000.png,1.5\n"), "row 2"),
    "a table of one class": (
        lambda f: (f / "labels.csv").write_text("\n".join(["file,label", *(f"a/{i:03d}.png,a" for i in range(30))])),
        "single class",
    ),
}


@pytest.mark.parametrize("refused", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_folders_that_cannot_be_used(
    name: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tree(tmp_path / "images", {"a": 30, "b": 30})
    change, said = CASES[name]
    change(folder)
    before = small_runs.files(tmp_path)
    message = refused(capsys, f"folder:{folder}", "--output-dir", "run")
    assert said in message
    assert "\n" not in message.rstrip("\n")
    assert small_runs.files(tmp_path) == before


@pytest.mark.parametrize("refused", RECIPES)
@pytest.mark.parametrize("source", ["nothing", "folder:", "hf:nowhere", "os:path", "json:tool", "a b:c"])
def test_sources_that_are_none(
    source: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, source, "--output-dir", "run")
    assert not small_runs.files(tmp_path)


@pytest.mark.parametrize("refused", RECIPES)
@pytest.mark.parametrize("place", ["images/run", "images", "images/a/run"])
def test_nothing_is_written_among_the_pictures(
    place: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tree(tmp_path / "images", {"a": 3, "b": 3})
    before = small_runs.files(tmp_path)
    assert "reads as images" in refused(capsys, f"folder:{folder}", "--output-dir", place)
    assert small_runs.files(tmp_path) == before


@pytest.mark.parametrize("refused", RECIPES)
def test_a_folder_of_somebody_else_is_left_alone(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tree(tmp_path / "images", {"a": 30, "b": 30})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"theirs": 1}')
    before = small_runs.files(tmp_path)
    for options in ((), ("--overwrite",)):
        assert "is no config of a run of this program" in refused(
            capsys, f"folder:{folder}", "--output-dir", "run", *options
        )
    assert small_runs.files(tmp_path) == before
