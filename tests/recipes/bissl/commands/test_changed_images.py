"""Images that change between two commands on one run: refused before anything is written, whatever the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.bissl.commands.main import main
from recipes.vision.record import listing
from recipes.vision.record.listing import Record
from tests.support.recipes.image_trees import picture, tree
from tests.support.recipes.small_runs import (
    SMALL,
    before_steps,
    execute,
    files,
    leave_out_report,
    refused,
    results,
    stop_at,
    weights,
    whole_run,
    without,
)

OPTIONS = (
    *("--data.storage=stream", "--data.num-workers=0", "--seeds=1"),
    *("--data.labels-per-class=null", "--data.val-per-class=null"),
)
FOLDERS = {"pretext": {"": 30}, "labelled": {"a": 16, "b": 16}}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_report(monkeypatch)


def images(folder: Path) -> Path:
    for seed, (name, sizes) in enumerate(FOLDERS.items(), 1):
        tree(folder / name, sizes, seed=seed)
    return folder


def options() -> tuple[str, ...]:
    return "--data.pretext=folder:pretext", "--data.downstream=folder:labelled", *OPTIONS


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and a run on them by relative paths, whose artifacts others share."""
    folder = images(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        whole_run(folder / "run", *options(), "--artifacts=shared")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder in the current folder, which is a copy of that one."""
    here = tmp_path / "here"
    shutil.copytree(finished, here)
    monkeypatch.chdir(here)
    return here / "run"


def more(folder: Path) -> str:
    picture(5).save(folder / "labelled" / "a" / "more.png")
    return "added (a/more.png)"


def fewer(folder: Path) -> str:
    (folder / "labelled" / "b" / "004.png").unlink()
    return "removed (b/004.png)"


def other(folder: Path) -> str:
    picture(6, 24, 24).save(folder / "labelled" / "b" / "004.png")
    return "of another size (b/004.png)"


def other_pretext(folder: Path) -> str:
    (folder / "pretext" / "007.png").rename(folder / "pretext" / "new.png")
    return "pretext: 1 added (new.png)"


CHANGES = [more, fewer, other, other_pretext]


@pytest.mark.parametrize("tamper", CHANGES)
def test_no_command_goes_on_with_other_images(
    run: Path, capsys: pytest.CaptureFixture[str], tamper: Callable[[Path], str]
) -> None:
    told = tamper(run.parent)
    before = files(run)
    again = ("--output-dir", "run", "--artifacts", "shared", *options())
    artifact = next(Path("shared").glob("bissl-*"))
    for arguments in (
        (*again, "--resume"),
        (*again, "--seeds=3", "--resume"),
        ("finetune", *again, "--resume", "--from", str(artifact)),
        (*again, "--resume", "--arms=bissl,baseline,scratch"),
    ):
        message = refused(capsys, *arguments)
        assert "the images of this run changed" in message
        assert told in message
    assert main(["features", "run", "--artifacts", "shared", "--to", "features"]) == 2
    assert told in capsys.readouterr().err
    assert files(run) == before


def test_a_run_that_is_started_anew_has_a_record_of_its_own(run: Path) -> None:
    more(run.parent)
    again = ("pretext", "--output-dir", "run", *options())
    assert execute(*again, "--overwrite") == 0
    assert execute(*again, "--resume") == 0


def test_an_interrupted_run_knows_what_it_has_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("pretext", "--output-dir", "new", *options())
    with monkeypatch.context() as patch:
        before_steps(patch, "pretext", stop_at(1))
        assert execute(*again) == 130
    record = Record.load(Path("new/images.npz"))
    assert record is not None
    known = record.listings["pretext"].known
    assert known.sum() >= SMALL["pretext.batch-size"]
    # Another time, not another content: the run goes on, and ends as one that nothing interrupted.
    path = Path("pretext/003.png")
    path.write_bytes(path.read_bytes())
    assert execute(*again, "--resume") == 0
    made = weights(Path("new"))
    assert made == {name: content for name, content in weights(Path("shared")).items() if name in made}
    assert len(made) == 1


def test_files_that_were_read_are_known_by_their_content(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record.load(run / "images.npz")
    assert record is not None
    assert record.listings["pretext"].known.all()
    path = Path("pretext/003.png")
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(bytes(content))
    message = refused(capsys, "--output-dir", "run", *options(), "--resume")
    assert "pretext: 1 of another content (003.png)" in message


@pytest.mark.parametrize("options_of", [("pretext",), (), ("--dry-run",)], ids=["stage", "run", "dry run"])
@pytest.mark.parametrize("content", [b"", b"<html>", None], ids=["empty", "a page", "cut short"])
def test_a_damaged_labelled_image_is_found_before_anything_is_computed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options_of: tuple[str, ...],
    content: bytes | None,
) -> None:
    monkeypatch.chdir(images(tmp_path))
    path = Path("labelled/b/004.png")
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    message = refused(capsys, *options_of, "--output-dir", "run", *options())
    assert "labelled/b/004.png cannot be decoded" in message
    assert not Path("run").exists()


def test_copies_with_other_times_are_the_same_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run.parent, tmp_path / "scratch-disk", copy_function=shutil.copy)
    monkeypatch.chdir(tmp_path / "scratch-disk")
    before = set(weights(Path("shared")))
    assert execute("--output-dir", "run", "--artifacts", "shared", *options(), "--resume") == 0
    assert set(weights(Path("shared"))) == before
    assert files(Path("run")).keys() == files(run).keys()
    assert without(results(Path("run"))) == without(results(run))


@pytest.mark.parametrize(
    ("tamper", "stages"),
    [(other, {"head", "bissl", "finetune"}), (other_pretext, {"pretext", "head", "bissl", "finetune"})],
)
def test_a_shared_folder_of_artifacts_serves_nobody_else(
    run: Path, tamper: Callable[[Path], str], stages: set[str]
) -> None:
    tamper(run.parent)
    before = set(weights(Path("shared")))
    whole_run(Path("two"), "--artifacts=shared", *options())
    assert {name.partition("-")[0] for name in set(weights(Path("shared"))) - before} == stages


def test_a_stage_goes_on_from_the_same_images_or_from_another_source(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = min(Path("shared").glob("pretext-*"))
    facts = json.loads((artifact / "artifact.json").read_text())["pretext_images"]
    assert facts["source"] == "folder:pretext"
    assert facts["images"] == 30
    head = ("head", "--from", str(artifact), *options())
    assert execute(*head, "--output-dir", "fresh") == 0
    warmed = next(Path("fresh/checkpoints").glob("head-*"))
    facts = json.loads((warmed / "artifact.json").read_text())
    assert facts["pretext_images"] == json.loads((artifact / "artifact.json").read_text())["pretext_images"]
    assert facts["labelled_images"]["images"] == 32
    Path("pretext/003.png").unlink()
    for command, source in (("head", artifact), ("bissl", warmed)):
        message = refused(capsys, command, "--from", str(source), *head[3:], "--output-dir", "refused")
        assert "was made from 30 pretext images of folder:pretext, which are not those of now" in message
        assert not Path("refused").exists()
    transfer = [option for option in head if not option.startswith("--data.pretext=")]
    tree(Path("elsewhere"), {"": 30}, seed=9)
    assert execute(*transfer, "--data.pretext=folder:elsewhere", "--output-dir", "transfer") == 0


@pytest.mark.parametrize("tamper", [more, other, None], ids=["added", "other content", "split seed"])
def test_a_stage_does_not_go_on_from_other_labelled_images(
    run: Path, capsys: pytest.CaptureFixture[str], tamper: Callable[[Path], str] | None
) -> None:
    # Images that weights have been trained on would be tested on.
    changed = ("--data.split-seed=2",) if tamper is None else ()
    if tamper is not None:
        tamper(run.parent)
    before = files(run.parent)
    for command, stage in (("finetune", "bissl"), ("bissl", "head")):
        artifact = next(Path("shared").glob(f"{stage}-*"))
        given = (command, "--from", str(artifact), *options(), *changed, "--output-dir", "refused")
        message = refused(capsys, *given)
        assert refused(capsys, *given, "--dry-run") == message
        assert "was made from 32 labelled images of folder:labelled, which are not those of now" in message
    assert files(run.parent) == before


def test_another_labelled_source_is_a_transfer(run: Path) -> None:
    tree(Path("elsewhere"), {"a": 16, "b": 16}, seed=9)
    artifact = next(Path("shared").glob("bissl-*"))
    given = ("finetune", "--from", str(artifact), *options(), "--data.downstream=folder:elsewhere")
    assert execute(*given, "--output-dir", "transfer") == 0


def test_copies_of_test_images_are_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(images(tmp_path))
    shutil.copytree("labelled", "pretext/also")
    capsys.readouterr()
    assert execute("pretext", "--output-dir", "run", *options(), "--data.pretext-limit=null") == 0
    said = capsys.readouterr().out
    assert "8 pretext images are copies of test images, byte for byte, and are left out" in said
    assert "5 pretext images are copies of validation images" in said
    record = Record.load(Path("run/images.npz"))
    assert record is not None
    assert record.listings["pretext"].count == 30 + 32 - 8


def test_other_versions_of_torchvision_are_a_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "version", lambda _: "0.1.0")
    capsys.readouterr()
    assert execute("--output-dir", "run", "--artifacts", "shared", *options(), "--resume") == 0
    said = capsys.readouterr().out
    assert "this run was started with torch" in said
    assert "torchvision 0.1.0, views may differ" in said
