"""WebDataset shards: what their headers say, which samples and labels they give, and what is refused."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.pictures.tar_members import TarImages
from recipes.vision.sources.foreign import web_dataset
from recipes.vision.sources.foreign.web_dataset import open_web_dataset
from recipes.vision.sources.loading import load_downstream
from recipes.vision.sources.sources import Source
from tests.support.recipes.encoded_pictures import ON_ITS_SIDE, by_pillow, cache, encoded, request

__all__ = ["cache"]

Files = Sequence[tuple[str, bytes]]


def shard(path: Path, files: Files, layout: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(labels: Sequence[object], first: int = 0, kind: str = "png") -> list[tuple[str, bytes]]:
    """A picture and a `.cls` for each label."""
    files = []
    for number, label in enumerate(labels, first):
        files += [(f"{number:06}.{kind}", encoded(number)), (f"{number:06}.cls", str(label).encode())]
    return files


def pictures(source: Source) -> TarImages:
    assert isinstance(source.images, TarImages)
    return source.images


def labels(source: Source) -> list[int]:
    assert source.labels is not None
    return source.labels.tolist()


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", f"{'deep/' * 14}", f"{'long-name-' * 13}/ä/"])
def test_members_are_found_in_every_layout_of_headers(tmp_path: Path, layout: int, folder: str) -> None:
    if layout == tarfile.USTAR_FORMAT and len(folder) > 100:
        folder = folder[:60] + "/" + folder[60:90] + "/"
    kinds = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP", "photo.PNG": "PNG"}
    contents = [encoded(number, kind) for number, kind in enumerate(kinds.values())]
    files = [(f"{folder}{number}.{suffix}", contents[number]) for number, suffix in enumerate(kinds)]
    shard(tmp_path / "data" / "one.tar", files, layout)
    source = open_web_dataset(str(tmp_path / "data"), request("pretext"))
    assert source.parts["unlabelled"].tolist() == list(range(len(kinds)))
    images = pictures(source)
    assert [images.member(position) for position in range(len(kinds))] == [name for name, _ in files]
    for position, content in enumerate(contents):
        assert images.items([position])[0].content() == content
        assert torch.equal(images.at(position), by_pillow(content))
    assert images.nbytes == sum(map(len, contents))


def test_pictures_come_at_their_own_size_upright_and_in_any_order(tmp_path: Path) -> None:
    contents = [encoded(n, "JPEG", exif_turn=ON_ITS_SIDE if n % 2 else None) for n in range(6)]
    for half in range(2):
        files = [(f"{n}.jpg", contents[n]) for n in range(3 * half, 3 * half + 3)]
        shard(tmp_path / f"data/part-{half}.tar", files)
    images = pictures(open_web_dataset(str(tmp_path / "data"), request("pretext")))
    chosen = images.subset(torch.tensor([4, 1, 1]))
    assert chosen.nbytes == len(contents[4]) + 2 * len(contents[1])
    for position, number in enumerate((4, 1, 1)):
        assert torch.equal(chosen.at(position), by_pillow(contents[number]))
    assert chosen.at(1).shape != images.at(2).shape


@pytest.mark.parametrize(
    ("texts", "classes", "expected"),
    [
        (["0", "1", "1", "0"], ("0", "1"), [0, 1, 1, 0]),
        (["7\n", "007", " 10", "9"], ("7", "9", "10"), [0, 0, 2, 1]),
        (["dog", "cat", "dog", "ähre"], ("cat", "dog", "ähre"), [1, 0, 1, 2]),
        (["3", "cat", "10", "3"], ("10", "3", "cat"), [1, 2, 0, 1]),
    ],
)
def test_classes_are_the_numbers_or_names_that_occur(
    tmp_path: Path, texts: list[str], classes: tuple[str, ...], expected: list[int]
) -> None:
    shard(tmp_path / "data/a.tar", samples(texts))
    source = open_web_dataset(str(tmp_path / "data"), request())
    assert (source.classes, labels(source)) == (classes, expected)


def test_members_of_a_sample_may_be_several_and_what_belongs_to_none_does_not_count(tmp_path: Path) -> None:
    files = [
        ("__meta__", b"x"),
        ("__about__/a.json", b"{}"),
        ("README", b"y"),
        ("._0.png", b"a mac was here"),
        ("a/0.input.png", encoded(0)),
        ("a/0.target.png", encoded(1)),
        ("a/0.breed", b"pug"),
        ("a/0.json", b"{}"),
        ("b/0.input.png", encoded(2)),
        ("b/0.target.png", encoded(3)),
        ("b/0.breed", b"boxer"),
    ]
    path = shard(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=r"'a/0' has several images \(.input.png, .target.png\): .*\?image=input.png"):
        open_web_dataset(str(path), request())
    source = open_web_dataset(f"{path}?image=target.png&label=breed", request())
    assert (source.classes, labels(source)) == (("boxer", "pug"), [1, 0])
    assert torch.equal(pictures(source).at(1), by_pillow(encoded(3)))
    with pytest.raises(DataError, match=r"no sample has a member with the suffix .colour"):
        open_web_dataset(f"{path}?image=target.png&label=colour", request())
    with pytest.raises(DataError, match=r"'a/0' has no .mask.png \(it has .input.png"):
        open_web_dataset(f"{path}?image=mask.png", request())
    with pytest.raises(DataError, match=r"no option 'colour'; there are: image, label"):
        open_web_dataset(f"{path}?colour=red", request())


@pytest.mark.parametrize(
    ("names", "pattern", "parts"),
    [
        (["train/0.tar", "train/1.tar", "val/0.tar", "test/0.tar"], "", {"train": 2, "val": 1, "test": 1}),
        (["train-0.tar", "train-1.tar", "validation-0.tar"], "", {"train": 2, "val": 1}),
        (["set-train-000.tar", "set-val-000.tar", "set-test.tar"], "/*.tar", {"train": 1, "val": 1, "test": 1}),
        (["Testing_1.tar", "Training_1.tar", "Training_2.tar"], "", {"train": 2, "test": 1}),
        (["0.tar", "1.tar", "10.tar"], "", {"train": 3}),
        (["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"], "/s-{008..010}.tar", {"train": 3}),
        (["a/x-0.tar", "a/x-1.tar", "b/x-0.tar"], "/{a,b}/x-{0..0}.tar", {"train": 2}),
        (["train/a.tar", "test/a.tar"], "/{train,test}/*.tar", {"train": 1, "test": 1}),
        (["test-0.tar", "test-1.tar", "train-0.tar"], "/test-?.tar", {"train": 2}),
        (["0.tar", "1.tar", "2.tar"], "/[01].tar", {"train": 2}),
    ],
)
def test_parts_by_folders_names_and_patterns(
    tmp_path: Path, names: list[str], pattern: str, parts: dict[str, int]
) -> None:
    for number, name in enumerate(names):
        shard(tmp_path / "train-set" / name, samples([0, 1, 0], 10 * number))
    source = open_web_dataset(f"{tmp_path}/train-set{pattern}", request())
    assert {part: len(positions) for part, positions in source.parts.items()} == {p: 3 * n for p, n in parts.items()}
    assert torch.cat(list(source.parts.values())).tolist() == list(range(len(pictures(source))))
    shards = pictures(source).shards
    for part, positions in source.parts.items():
        if len(parts) > 1:
            assert all(
                part in shards[pictures(source).shard[at]][len(str(tmp_path)) + 10 :].lower() for at in positions
            )


def test_unlabelled_shards_are_for_the_pretext_task_alone(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "test", "unlabelled")):
        content = samples([0, 1], 10 * number)
        shard(tmp_path / f"data/{part}.tar", content[::2] if part == "unlabelled" else content)
    pretext = open_web_dataset(str(tmp_path / "data"), request("pretext"))
    assert pretext.labels is None
    assert [pictures(pretext).member(at) for at in pretext.parts["unlabelled"].tolist()] == ["000020.png", "000021.png"]
    downstream = open_web_dataset(str(tmp_path / "data"), request())
    assert {part: len(held) for part, held in downstream.parts.items()} == {"train": 2, "test": 2}


def test_a_pretext_source_without_labels_leaves_the_test_part_out(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "val", "test")):
        shard(tmp_path / f"data/{part}.tar", samples([0, 1], 10 * number)[::2])
    source = open_web_dataset(str(tmp_path / "data"), request("pretext"))
    members = [pictures(source).member(at) for at in source.parts["unlabelled"].tolist()]
    assert members == ["000000.png", "000001.png", "000010.png", "000011.png"]


ONE = ("x.png", encoded(0))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.png", encoded(0)), ("a.png", encoded(1))], r"holds a.png twice"),
        (
            [("a.png", encoded(0)), ("A.png", encoded(1)), ("a.PNG", encoded(1))],
            r"'a' comes twice, or its members do not",
        ),
        (
            [("a.png", encoded(0)), ("b.png", encoded(1)), ("a.cls", b"1")],
            r"'a' comes twice, or its members do not lie",
        ),
        ([("a.png", encoded(0)), ("b.cls", b"1")], r"'b' has no image \(it has .cls\)"),
        ([("a.txt", b"1")], r"'a' has no image \(it has .txt\)"),
        ([("a.png", encoded(0)), ("a.jpg", encoded(1))], r"'a' has several images \(.png, .jpg\)"),
        ([("README", b"hello")], r"holds no sample"),
        ([], r"holds no sample"),
        ([ONE, ("x.cls", b"")], r"x.cls must hold a class as text"),
        ([ONE, ("x.cls", b"\xff\xfe")], r"x.cls must hold a class as text"),
        ([ONE, ("x.cls", b"1" * 5000)], r"x.cls must hold a class as text"),
        ([ONE, ("x.cls", b"1"), ("y.png", encoded(1))], r"image 1 of its train part has no label"),
        (samples([0, 0, 1, -1]), r"image 3 of its train part has no label"),
    ],
)
def test_samples_that_are_wrong_are_named(tmp_path: Path, files: Files, message: str) -> None:
    path = shard(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=message) as raised:
        open_web_dataset(str(path), request())
    assert str(path) in str(raised.value)


def test_links_and_sparse_files_are_named(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        path = shard(tmp_path / f"{kind!r}.tar", [ONE])
        with tarfile.open(path, "a") as archive:
            member = tarfile.TarInfo("y.png")
            member.type, member.linkname = kind, "x.png"
            archive.addfile(member)
        with pytest.raises(DataError, match=r"y.png is a link, a device or a sparse file"):
            open_web_dataset(str(path), request("pretext"))


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_that_is_cut_short_is_named_wherever_it_ends(tmp_path: Path, layout: int) -> None:
    files = [
        (f"{'long' * 30}{number}.{kind}", content)
        for number in range(2)
        for kind, content in [("png", encoded(number)), ("cls", b"1")]
    ]
    whole = shard(tmp_path / "whole.tar", files, layout).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        end = max(member.offset_data + 512 for member in archive)
    path = tmp_path / "cut.tar"
    for length in [*range(0, end, 512), *range(100, end, 512), end]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut.tar.* (cut short|damaged)"):
            open_web_dataset(str(path), request())
    path.write_bytes(whole[: end + 512])
    assert len(pictures(open_web_dataset(str(path), request()))) == 2


def test_damaged_headers_and_joined_shards_are_named(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", samples([0, 1, 1])).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        headers = [member.offset for member in archive]
    path = tmp_path / "data.tar"
    for offset in headers:
        path.write_bytes(whole[: offset + 150] + b"\xff\xff\xff" + whole[offset + 153 :])
        with pytest.raises(DataError, match=r"data.tar .*(damaged|not a member)"):
            open_web_dataset(str(path), request())
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"data.tar holds more .* joined"):
        open_web_dataset(str(path), request())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:curl -s http://localhost/x.tar", "pipes and addresses are not read"),
        ("http://localhost/x-{000..010}.tar", "pipes and addresses are not read"),
        ("s3://bucket/x.tar", "pipes and addresses are not read"),
        ("{here}/nothing", "there is no file .*nothing"),
        ("{here}/nothing-*.tar", "there is no .tar file at"),
        ("{here}/empty", "there is no .tar file at"),
        ("{here}/good-{0..2}.tar", r"there is no file .*good-1.tar \(2 of 3 are missing\)"),
        ("{here}/packed.tar.gz", "packed.tar.gz is compressed"),
        ("{here}/gz", "packed.tgz is compressed"),
        ("{here}/beside", "beside/b.tar.gz is compressed"),
        ("{here}/zips/a.zip", "a.zip is compressed"),
        ("{here}/hidden-gzip.tar", "is compressed by gzip"),
        ("{here}/hidden-zip.tar", "is compressed by zip"),
        ("{here}/text.tar", "damaged, cut short or no tar file"),
        ("{here}/mixed", r"other.tar does not say its part"),
        ("{here}/both", r"train-val.tar names two parts, train and val"),
        ("{here}/no-train", r"has the parts val and test, but none to train on"),
        ("{here}/copied", r"b.tar holds the same samples as .*a.tar"),
        ("{here}/strange", r"its test part has the class '2', which train does not have"),
    ],
)
def test_what_is_not_a_local_plain_shard_is_refused_by_name(tmp_path: Path, path: str, message: str) -> None:
    good = shard(tmp_path / "good-0.tar", samples([0, 1])).read_bytes()
    for name in ("packed.tar.gz", "gz/packed.tgz", "beside/b.tar.gz", "hidden-gzip.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(good))
    for name in ("beside/a.tar", "copied/a.tar", "copied/b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(good)
    (tmp_path / "empty").mkdir()
    (tmp_path / "zips").mkdir()
    for name in ("zips/a.zip", "hidden-zip.tar"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "text.tar").write_bytes(b"not a tar file at all" * 100)
    for number, name in enumerate(("mixed/train.tar", "mixed/other.tar", "both/train-val.tar", "no-train/val.tar")):
        shard(tmp_path / name, samples([0, 1], 10 * number))
    shard(tmp_path / "no-train/test.tar", samples([0, 1], 60))
    shard(tmp_path / "strange/train.tar", samples([0, 1], 70))
    shard(tmp_path / "strange/test.tar", samples([0, 2], 80))
    with pytest.raises(DataError, match=message):
        open_web_dataset(path.replace("{here}", str(tmp_path)), request())


def test_the_index_is_made_once_outside_the_data_and_again_when_a_shard_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard(tmp_path / "data/a.tar", samples([0, 1, 1]))
    first = open_web_dataset(str(path), request())
    (kept,) = cache.rglob("*.npz")
    assert str(kept) in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["a.tar"]
    with monkeypatch.context() as patched:
        patched.setattr(web_dataset, "indexed", None)  # reading a header would raise
        again = open_web_dataset(str(path), request())
    assert capsys.readouterr().err == ""
    assert (again.classes, labels(again)) == (first.classes, labels(first))
    assert all(torch.equal(pictures(again).at(at), pictures(first).at(at)) for at in range(3))
    shard(path, samples([1, 1, 0, 0]))
    assert labels(open_web_dataset(str(path), request())) == [1, 1, 0, 0]


def test_a_damaged_index_is_made_anew(tmp_path: Path, cache: Path) -> None:
    path = shard(tmp_path / "data/a.tar", samples(["x", "y", "y"]))
    open_web_dataset(str(path), request())
    (kept,) = cache.rglob("*.npz")
    whole = kept.read_bytes()
    draw = random.Random(0)
    damaged = [b"", whole[:-1], whole[:100], whole[: len(whole) // 2], b"nothing of the kind"]
    for _ in range(60):
        at = draw.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
    for content in damaged:
        kept.write_bytes(content)
        source = open_web_dataset(str(path), request())
        assert (source.classes, labels(source)) == (("x", "y"), [0, 1, 1])
        assert pictures(source).items([2])[0].content() == encoded(2)


def test_an_index_that_cannot_be_kept_is_told(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard(tmp_path / "data/a.tar", samples([0, 1]))
    cache.write_text("a file where the folder should be")
    assert labels(open_web_dataset(str(path), request())) == [0, 1]
    assert "cannot be kept" in capsys.readouterr().err


def test_a_shard_that_changes_or_goes_after_it_was_listed_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "data/a.tar", samples([0, 1]))
    item = pictures(open_web_dataset(str(path), request())).items([1])[0]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"a.tar: 000001.png is cut short: the file changed"):
        item.picture()
    path.unlink()
    with pytest.raises(DataError, match=r"a.tar cannot be read \(No such file"):
        item.picture()


def test_a_damaged_picture_is_named_by_shard_and_member(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("good.png", encoded(0)), ("bad.png", encoded(1)[:60])])
    images = pictures(open_web_dataset(str(path), request("pretext")))
    assert torch.equal(images.at(0), by_pillow(encoded(0)))
    with pytest.raises(DataError, match=r"a.tar: bad.png cannot be decoded"):
        images.at(1)


def test_the_parent_keeps_few_bytes_a_picture_and_an_item_is_small(tmp_path: Path) -> None:
    count = 3000
    files = [(f"n01440764/n01440764_{n:06}.{kind}", b"1") for n in range(count) for kind in ("jpg", "cls")]
    shard(tmp_path / "a.tar", files)
    images = pictures(open_web_dataset(str(tmp_path / "a.tar"), request("pretext")))
    arrays = (images.shard, images.starts, images.sizes, images.names, images.name_starts, images.name_sizes)
    # Beside them a label of eight bytes.
    assert sum(array.nbytes for array in arrays) / count + 8 < 200
    assert len(pickle.dumps(images.items([7]))) < 400 + len(str(tmp_path))


def test_a_run_takes_shards_by_their_name(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", samples([n % 3 for n in range(30)]))
    sets = load_downstream(f"webdataset:{tmp_path}/a.tar", root=tmp_path, download=False)
    assert (len(sets.train), len(sets.val), len(sets.test)) == (18, 4, 8)
    assert sets.train.classes == ("0", "1", "2")


def test_labels_that_nobody_wants_are_left_alone(tmp_path: Path) -> None:
    shard(tmp_path / "data/train.tar", samples([0, 1]))
    shard(tmp_path / "data/test.tar", samples([2, 1], 10))
    source = open_web_dataset(str(tmp_path / "data"), request("pretext"), labelled=False)
    assert (source.labels, source.parts["unlabelled"].tolist()) == (None, [0, 1])
