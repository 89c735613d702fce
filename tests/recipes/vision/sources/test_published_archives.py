"""Fetching and unpacking: nothing is written outside the folder, nothing half-written is taken for whole."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest

from recipes.vision.errors import DataError
from recipes.vision.sources.loading import load_downstream
from recipes.vision.sources.published.archives import Archive, fetch, unpack
from recipes.vision.sources.published.catalog import DATASETS
from recipes.vision.sources.published.dataset import fetch_dataset
from tests.support.recipes.dataset_trees import md5, small
from tests.support.recipes.image_trees import downstream


def tar_of(file: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(file, "w:gz" if file.suffix in (".gz", ".tgz") else "w") as stored:
        for member, content in members:
            member.size = len(content)
            stored.addfile(member, io.BytesIO(content))
    return file


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_tar_is_unpacked_as_it_is(name: str, tmp_path: Path) -> None:
    content = [(member("set", tarfile.DIRTYPE), b""), (member("./set/deep/x.txt"), b"words"), (member("y"), b"")]
    unpack(tar_of(tmp_path / name, content), tmp_path / "out")
    found = {str(file.relative_to(tmp_path / "out")): file.read_bytes() for file in (tmp_path / "out").rglob("*.txt")}
    assert found == {"set/deep/x.txt": b"words"}
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "bad",
    [
        member("../out.txt"),
        member("set/../../out.txt"),
        member("/tmp/bissl-absolute.txt"),
        member("C:/out.txt"),
        member("..\\out.txt"),
        member("link", tarfile.SYMTYPE, "/etc"),
        member("link", tarfile.LNKTYPE, "../out.txt"),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=["parent", "within", "absolute", "drive", "backslash", "symlink", "hardlink", "fifo"],
)
def test_members_that_lead_out_of_the_folder_are_refused(bad: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "bad.tar", [(member("good.txt"), b"1"), (bad, b"")])
    with pytest.raises(DataError, match=r"bad\.tar holds .*not unpacked"):
        unpack(archive, tmp_path / "in" / "out")
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if not file.is_dir()) == [
        "bad.tar",
        "in/out/good.txt",
    ]


def test_zip_is_unpacked_and_its_paths_are_checked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as stored:
        stored.writestr("set/x.txt", "words")
        link = zipfile.ZipInfo("set/link")
        link.external_attr = 0o120777 << 16
        stored.writestr(link, "/etc/passwd")
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert (tmp_path / "out" / "set" / "x.txt").read_text() == "words"
    assert not (tmp_path / "out" / "set" / "link").is_symlink()
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as stored:
        stored.writestr("../x.txt", "words")
    with pytest.raises(DataError, match=r"b\.zip holds '\.\./x\.txt'"):
        unpack(tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "x.txt").exists()


def test_gz_file_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "images-idx3-ubyte.gz").write_bytes(gzip.compress(b"bytes"))
    unpack(tmp_path / "images-idx3-ubyte.gz", tmp_path / "raw")
    assert (tmp_path / "raw" / "images-idx3-ubyte").read_bytes() == b"bytes"
    (tmp_path / "setid.mat").write_bytes(b"matlab")
    unpack(tmp_path / "setid.mat", tmp_path)
    assert (tmp_path / "setid.mat").read_bytes() == b"matlab"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.gz"])
def test_archive_cut_short_is_named_and_leaves_no_file_of_the_full_name(name: str, tmp_path: Path) -> None:
    noise = bytes(range(256)) * 64
    file = tmp_path / name
    if name == "a.zip":
        with zipfile.ZipFile(file, "w") as stored:
            stored.writestr("big.bin", noise)
    elif name == "a.gz":
        file.write_bytes(gzip.compress(noise))
    else:
        tar_of(file, [(member("big.bin"), noise)])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{name} cannot be unpacked"):
        unpack(file, tmp_path / "out")
    assert not (tmp_path / "out" / "big.bin").exists()
    assert not (tmp_path / "out" / "a").exists()


def test_fetch_checks_the_sum_of_a_file_that_is_there_and_unpacks_what_is_within(tmp_path: Path) -> None:
    inner = tar_of(tmp_path / "inner.tar.gz", [(member("categories/x.txt"), b"words")])
    (tmp_path / "sets").mkdir()
    outer = tmp_path / "sets" / "outer.zip"
    with zipfile.ZipFile(outer, "w") as stored:
        stored.write(inner, "outer/inner.tar.gz")
    archive = Archive("https://nowhere.invalid/files/outer.zip?x=1", md5(outer), "sets", ("outer/inner.tar.gz",))
    fetch(archive, tmp_path)
    assert (tmp_path / "sets" / "categories" / "x.txt").read_text() == "words"


def test_failed_and_impossible_downloads_give_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", failing)
    with pytest.raises(DataError, match=r"download of CUB-200-2011 failed.*no network.*_2011\.tgz and unpack it"):
        fetch_dataset(DATASETS["cub200"], tmp_path)
    for name, file in (("cars", "cars_test_annos_withlabels.mat"), ("sun397", "Training_01.txt")):
        with pytest.raises(DataError, match=f"cannot be downloaded: its official download is gone.*{file}"):
            fetch_dataset(DATASETS[name], tmp_path)


def test_set_is_fetched_where_it_is_missing_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = small("cub200", tmp_path / "made", monkeypatch)
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(root / "CUB_200_2011.tgz", "w:gz") as stored:
        stored.add(tmp_path / "made" / "CUB_200_2011", "CUB_200_2011")
    shutil.rmtree(tmp_path / "made")
    own = Archive(dataset.archives[0].url, md5(root / "CUB_200_2011.tgz"))
    monkeypatch.setitem(DATASETS, "cub200", replace(dataset, archives=(own,)))
    with pytest.raises(DataError, match=r"images\.txt is missing"):
        downstream("cub200", root)
    sets = load_downstream("cub200", root=root, download=True)
    assert len(sets.test) == dataset.counts["test"]
