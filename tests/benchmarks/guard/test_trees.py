"""The files of a commit beside a working tree that is left as it is."""

from pathlib import Path

import pytest

from benchmarks.guard import trees
from benchmarks.guard.trees import CheckoutError, files_of, resolve
from tests.benchmarks.guard.repositories import git, repository, write

COMMITTED = {"a.txt": "old", "folder/b.txt": "old", "gone.txt": "old"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    repository(tmp_path / "checkout", COMMITTED, {"a.txt": "new", "new.txt": "new"})
    (tmp_path / "checkout" / "gone.txt").unlink()
    return tmp_path / "checkout"


def content(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and ".git" not in file.parts)
    return {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in files}


def test_the_commits_files_are_there_and_then_gone(checkout: Path) -> None:
    git(checkout, "add", "new.txt")
    before = git(checkout, "status", "--porcelain"), content(checkout)
    with files_of(checkout, resolve(checkout, "HEAD")) as tree:
        assert content(tree) == COMMITTED
        (tree / "left.pyc").touch()
    assert not tree.parent.exists()
    assert (git(checkout, "status", "--porcelain"), content(checkout)) == before
    assert git(checkout, "worktree", "list").count("\n") == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_they_are_gone_after_an_interruption(checkout: Path, error: type[BaseException]) -> None:
    seen: list[Path] = []

    def interrupted() -> None:
        with files_of(checkout, resolve(checkout, "HEAD")) as tree:
            seen.append(tree)
            raise error

    with pytest.raises(error):
        interrupted()
    assert not seen[0].parent.exists()


def test_names_of_a_commit(checkout: Path) -> None:
    first = git(checkout, "rev-parse", "HEAD")
    git(checkout, "tag", "--annotate", "--message", "a tag", "v1")
    write(checkout, {"a.txt": "second"})
    git(checkout, "commit", "--quiet", "--all", "--message", "second")
    assert {resolve(checkout, name) for name in (first, first[:10], "HEAD~1", "v1")} == {first}
    assert resolve(checkout, "HEAD") == git(checkout, "rev-parse", "HEAD") != first


def test_a_worktree_is_a_checkout(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "worktree", "add", "--quiet", "--detach", str(tmp_path / "other"))
    with files_of(tmp_path / "other", resolve(tmp_path / "other", "HEAD")) as tree:
        assert content(tree) == COMMITTED


@pytest.mark.parametrize("name", ["nowhere", "HEAD~7", "", "--all", "HEAD:a.txt", "0" * 40])
def test_an_unknown_commit_is_named(checkout: Path, name: str) -> None:
    with pytest.raises(CheckoutError, match=f"--against: .*checkout has no commit {name!r}"):
        resolve(checkout, name)


def test_what_is_no_checkout_is_refused(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").mkdir()
    for folder in (tmp_path / "plain", tmp_path / "missing"):
        with pytest.raises(CheckoutError, match=f"--tree: {folder} is no git checkout .*name the folder of one"):
            resolve(folder, "HEAD")
    with pytest.raises(CheckoutError, match=r"folder lies in the git checkout .*checkout; name that one"):
        resolve(checkout / "folder", "HEAD")
    monkeypatch.setattr(trees.shutil, "which", lambda _: None)
    with pytest.raises(CheckoutError, match="git is not installed"):
        resolve(checkout, "HEAD")


def test_a_hooks_variables_do_not_lead_elsewhere(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repository(tmp_path / "another", {"c.txt": "another's"}, {})
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "another" / ".git" / "index"))
    with pytest.raises(CheckoutError, match="has no commit"):
        resolve(checkout, commit)
    with files_of(checkout, resolve(checkout, "HEAD")) as tree:
        assert content(tree) == COMMITTED
