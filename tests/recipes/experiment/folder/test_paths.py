"""Home folders in paths."""

import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.experiment.errors import ConfigError
from recipes.experiment.folder.paths import user_path


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two users' folders, and an empty one to stand in."""

    def entry(name: str) -> SimpleNamespace:
        if name != "somebody":
            raise KeyError(name)
        return SimpleNamespace(pw_dir=str(tmp_path / "theirs"))

    monkeypatch.setattr(pwd, "getpwnam", entry)
    monkeypatch.setenv("HOME", str(tmp_path / "mine"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_home_folder_takes_the_place_of_its_sign_at_the_beginning(kind: type, tmp_path: Path) -> None:
    assert user_path(kind("~")) == tmp_path / "mine"
    assert user_path(kind("~/a b/c")) == tmp_path / "mine" / "a b" / "c"
    assert user_path(kind("~somebody")) == tmp_path / "theirs"
    assert user_path(kind("~somebody/../x")) == tmp_path / "theirs" / ".." / "x"


@pytest.mark.parametrize("plain", ["a/~/b", "./~", "/~/x", "a~", "runs", "../x", "/", "."])
def test_other_paths_stay_as_they_are(plain: str) -> None:
    assert user_path(plain) == Path(plain)


def test_an_unknown_user_is_refused_but_a_file_of_that_name_is_meant() -> None:
    with pytest.raises(ConfigError, match="~nobody/x: this machine knows no home folder of ~nobody"):
        user_path("~nobody/x")
    Path("~nobody").mkdir()
    assert user_path("~nobody/x") == Path("~nobody/x")
