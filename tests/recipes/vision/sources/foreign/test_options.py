"""Options behind a source's name, cache folders, and packages that are not installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from recipes.vision.errors import DataError
from recipes.vision.pictures.arrow import ArrowItem
from recipes.vision.sources.foreign.hugging_face import open_hugging_face
from recipes.vision.sources.foreign.options import cache_path, megabytes, split_options
from recipes.vision.sources.loading import load_pretext
from tests.support.recipes.encoded_pictures import request


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("a/b", "a/b", {}),
        ("a/b?image=x", "a/b", {"image": "x"}),
        ("a?image=x&label=y,z", "a", {"image": "x", "label": "y,z"}),
        ("a?label=", "a", {"label": ""}),
        ("shard-00?.tar", "shard-00?.tar", {}),
        ("shard-00?.tar?image=x", "shard-00?.tar", {"image": "x"}),
        ("what?.tar", "what?.tar", {}),
        ("m:Class?root=/a b/c=d%20e&size=[1, 2]", "m:Class", {"root": "/a b/c=d%20e", "size": "[1, 2]"}),
    ],
)
def test_options_stand_behind_the_last_question_mark(text: str, name: str, options: dict[str, str]) -> None:
    assert split_options(text) == (name, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a?image=x&label", r"a\?image=x&label: 'label' is not an option of the form name=value"),
        ("a?image=x&", r"'' is not an option of the form name=value"),
        ("a?image=x&=y", r"'=y' is not an option of the form name=value"),
        ("a?image=x&image=x", r"the option image is given twice"),
    ],
)
def test_options_of_another_form_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_options(text)


def test_a_cache_goes_by_the_state_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_bytes(b"abc")
    seen = {cache_path("kind", files)}
    assert next(iter(seen)).parent == tmp_path / "c" / "bilevel" / "kind"
    assert cache_path("kind", files) in seen
    monkeypatch.chdir(tmp_path)
    assert cache_path("kind", [Path("one"), Path("two")]) in seen
    changes = (
        lambda: cache_path("kind", files, "settings"),
        lambda: cache_path("kind", files[::-1]),
        lambda: cache_path("kind", files[:1]),
        lambda: (os.utime(files[0], ns=(1, 1)), cache_path("kind", files))[1],
        lambda: (files[1].write_bytes(b"abcd"), cache_path("kind", files))[1],
    )
    for change in changes:
        path = change()
        assert path not in seen
        seen.add(path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_path("kind", files).is_relative_to(tmp_path / "home" / ".cache" / "bilevel")


def test_sizes_in_words() -> None:
    assert [megabytes(count) for count in (0, 12_345_678, 999_900_000, 1_234_567_890_123)] == [
        "0.0 MB",
        "12.3 MB",
        "999.9 MB",
        "1,234.6 GB",
    ]


def test_a_package_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs the package datasets: pip install 'bilevel\[hf\]'"):
        open_hugging_face(str(tmp_path), request())
    with pytest.raises(DataError, match=r"needs the package pyarrow: pip install 'bilevel\[hf\]'"):
        ArrowItem(str(tmp_path / "x.arrow"), "image", 0).content()


@pytest.mark.parametrize("name", ["hf:", "webdataset:", "hf", "webdataset"])
def test_a_kind_without_a_path_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"no data source .*hf:PATH .*webdataset:PATH .*module:Class"):
        load_pretext(name, root=".", download=False)


@pytest.mark.parametrize("kind", ["hf", "webdataset"])
def test_the_home_folder_may_be_written_short(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=rf"there is no (folder|file) {tmp_path}/nowhere"):
        load_pretext(f"{kind}:~/nowhere", root=".", download=False)
