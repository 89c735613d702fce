"""Decoded pictures on a disk: the same batches, or nearly; whole or not there; damaged ones are refused by name."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.loading.photographs import write_photographs
from recipes.vision.errors import DataError
from recipes.vision.pictures import decoding
from recipes.vision.pictures.files import FileImages
from recipes.vision.pictures.mapped import MappedImages
from recipes.vision.pictures.memory import ArrayImages
from recipes.vision.pipeline import picture_cache
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.picture_cache import FACTS, PIXELS, ROWS, PictureCache, read_pictures
from recipes.vision.pipeline.reduction import View
from recipes.vision.pipeline.workers import Workers
from recipes.vision.sources.file_table import FileTable
from recipes.vision.sources.loading import load_pretext
from recipes.vision.views.evaluation_view import EvalView
from recipes.vision.views.view_policy import ViewPolicy

SMALL: list[View] = [ViewPolicy(size=32), EvalView(resize=36, crop=32)]
LARGE: list[View] = [ViewPolicy(size=96, crop_scale=(0.08, 1.0))]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> FileImages:
    folder = write_photographs(tmp_path_factory.mktemp("photographs") / "p", 24)
    images = load_pretext(f"folder:{folder}", root="", download=False, evaluated=False, storage="stream").images
    assert isinstance(images, FileImages)
    return images


def cache(folder: Path) -> PictureCache:
    return PictureCache(folder, lambda line: None)


def kept(images: Any, views: list[View], folder: Path) -> MappedImages:
    found = cache(folder).kept(images, views, "p")
    assert isinstance(found, MappedImages)
    return found


def made(images: Any, views: list[View], workers: int = 0) -> tuple[torch.Tensor, ...]:
    processes = Workers(workers)
    try:
        return Loader(images, views, processes).make(torch.arange(len(images)), 5)
    finally:
        processes.close()


def test_whole_pictures_give_the_same_bits(photographs: FileImages, tmp_path: Path) -> None:
    found = kept(photographs, LARGE, tmp_path)
    assert not found.reduced
    assert all(torch.equal(found.at(i), photographs.at(i)) for i in range(len(photographs)))
    for one, other in zip(made(found, LARGE), made(photographs, LARGE), strict=True):
        assert torch.equal(one, other)


def test_workers_read_the_same_bits(photographs: FileImages, tmp_path: Path) -> None:
    found = kept(photographs, SMALL, tmp_path)
    assert found.reduced
    for one, other in zip(made(found, SMALL, workers=1), made(found, SMALL), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("least", [0.3, 0.5, 1.0])
def test_views_of_reduced_pictures_are_those_of_originals_nearly(
    scale: float, interpolation: Any, least: float, tmp_path: Path
) -> None:
    """The mean error of a training view is below 1/255; of an evaluation's and of a working size too."""
    plain: Any = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    size = round(32 * scale)
    random = ViewPolicy(
        size=size,
        crop_scale=(least, 1.0),
        interpolation=interpolation,
        jitter_probability=0.0,
        grey_probability=0.0,
        **plain,
    )
    views = [random, EvalView(resize=size, crop=size - 4, interpolation=interpolation, **plain), size]
    folder = write_photographs(tmp_path / "p", 8, scale=scale)
    images = FileImages(FileTable.of(folder, sorted(str(p.relative_to(folder)) for p in folder.rglob("*.jpg"))))
    found = kept(images, views, tmp_path / "cache")
    assert found.reduced
    for index, (one, other) in enumerate(zip(made(found, views), made(images, views), strict=True)):
        unit = 1.0 if other.dtype == torch.uint8 else 255.0
        assert 0 < unit * (one.float() - other.float()).abs().mean() < 1, index


def test_kinds_of_pictures(tmp_path: Path) -> None:
    """EXIF turns, transparency, grey and one pixel: what is kept is what decoding gives."""
    folder = tmp_path / "data"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(folder / "a.jpg", exif=turned)
    Image.fromarray(pixels).save(folder / "b.png")
    Image.fromarray(pixels[..., 0]).save(folder / "c.png")
    Image.fromarray(pixels[:1, :1, :3]).save(folder / "d.png")
    images = FileImages(FileTable.of(folder, ["a.jpg", "b.png", "c.png", "d.png"]))
    found = kept(images, [8], tmp_path / "cache")
    for position in range(4):
        assert torch.equal(found.at(position), images.at(position))
    assert found.subset(torch.tensor([3, 0])).at(1).shape == (3, 20, 30)


def test_it_is_found_again_and_made_anew_where_anything_changed(tmp_path: Path, monkeypatch) -> None:
    folder = write_photographs(tmp_path / "p", 6)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))

    def path(views: list[View] = SMALL, chosen: list[str] = names) -> str:
        return kept(FileImages(FileTable.of(folder, chosen)), views, tmp_path / "cache").path

    first = path()
    assert path() == first
    others = [path(LARGE), path(chosen=names[1:]), path(chosen=names[::-1])]
    os.utime(folder / names[0], ns=(1, 1))
    others.append(path())
    # The same size and time of modification.
    content = bytearray((folder / names[1]).read_bytes())
    (folder / names[1]).write_bytes(content + b"more")
    others.append(path())
    monkeypatch.setattr(decoding, "RULES", decoding.RULES + 1)
    others.append(path())
    assert len({first, *others}) == 7


def test_the_size_is_told_before_anything_is_written(photographs: FileImages, tmp_path: Path) -> None:
    lines: list[str] = []

    def say(line: str) -> None:
        assert not list(tmp_path.glob("*pictures*/*"))
        lines.append(line)

    told = PictureCache(tmp_path, say)
    found = told.kept(photographs, SMALL, "folder:p")
    assert lines
    assert "24 decoded pictures of folder:p take 3 MiB in" in lines[0]
    assert isinstance(found, MappedImages)
    assert told.size(photographs, SMALL) == found.nbytes == Path(found.path).stat().st_size
    told.kept(photographs, SMALL, "folder:p")
    assert len(lines) == 1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    photographs: FileImages, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 2**20))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"take 3 MiB, but .* has 1 MiB free"):
        kept(photographs, SMALL, tmp_path)
    assert not [path for path in tmp_path.iterdir() if "lease" not in path.name]


def test_a_disk_that_fills_up_leaves_nothing(photographs: FileImages, tmp_path: Path, monkeypatch) -> None:
    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture_cache, "_synchronise", full)
    with pytest.raises(DataError, match=r"data\.cache: .*No space left on device"):
        kept(photographs, SMALL, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert len(kept(photographs, SMALL, tmp_path)) == 24


def test_what_a_killed_process_left_is_removed(photographs: FileImages, tmp_path: Path) -> None:
    name = Path(kept(photographs, SMALL, tmp_path).path).parent.name
    shutil.rmtree(tmp_path / name)
    left = tmp_path / f".{name}.abcdef"
    left.mkdir()
    (left / PIXELS).write_bytes(b"half")
    kept(photographs, SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_that_cannot_be_decoded_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "p", 70)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    (folder / names[69]).write_bytes((folder / names[69]).read_bytes()[:5000])
    with pytest.raises(DataError, match=names[69]):
        kept(FileImages(FileTable.of(folder, names)), SMALL, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def cut_pixels(folder: Path) -> None:
    os.truncate(folder / PIXELS, 1000)


def change_pixels(folder: Path) -> None:
    content = bytearray((folder / PIXELS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / PIXELS).write_bytes(content)


def change_rows(folder: Path) -> None:
    rows = np.load(folder / ROWS)
    rows[1, 0] += 1
    np.save(folder / ROWS, rows)


def empty_facts(folder: Path) -> None:
    (folder / FACTS).write_text("{}")


def cut_facts(folder: Path) -> None:
    (folder / FACTS).write_text((folder / FACTS).read_text()[:20])


def no_pixels(folder: Path) -> None:
    (folder / PIXELS).unlink()


def no_rows(folder: Path) -> None:
    (folder / ROWS).unlink()


def list_of_facts(folder: Path) -> None:
    (folder / FACTS).write_text(json.dumps([1]))


@pytest.mark.parametrize(
    "damage",
    [cut_pixels, change_pixels, change_rows, empty_facts, cut_facts, no_pixels, no_rows, list_of_facts],
    ids=lambda damage: damage.__name__,
)
def test_damage_is_refused_by_name(damage: Callable[[Path], None], photographs: FileImages, tmp_path: Path) -> None:
    folder = Path(kept(photographs, SMALL, tmp_path).path).parent
    damage(folder)
    # The folder is moved, as another process would see it that has mapped none of its files.
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"moved.* damaged.*delete the folder .*moved"):
        made(read_pictures(moved), SMALL)


@pytest.mark.parametrize("inside", ["", "cache", "temple/deep/cache"])
@pytest.mark.parametrize("by_link", [False, True])
def test_never_inside_the_data_folder(photographs: FileImages, inside: str, by_link: bool, tmp_path: Path) -> None:
    root = photographs.files.root
    if by_link:
        (tmp_path / "link").symlink_to(root)
        root = str(tmp_path / "link")
    before = sorted(Path(photographs.files.root).rglob("*"))
    with pytest.raises(DataError, match=r"data\.cache: .* lies in the data folder"):
        kept(photographs, SMALL, Path(root) / inside)
    assert sorted(Path(photographs.files.root).rglob("*")) == before


def test_a_folder_beside_the_data_whose_name_begins_alike_is_none_inside(photographs: FileImages) -> None:
    beside = Path(photographs.files.root + "-cache")
    assert len(kept(photographs, SMALL, beside)) == 24
    shutil.rmtree(beside)


def test_pictures_in_memory_and_unknown_ones_are_left_as_they_are(tmp_path: Path) -> None:
    images = ArrayImages(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    assert cache(tmp_path / "cache").kept(images, SMALL, "digits") is images
    assert not (tmp_path / "cache").exists()


def _make(folder: str, root: str, names: list[str], path: Any) -> None:
    found = PictureCache(Path(folder), lambda line: path.put("wrote"))
    images = found.kept(FileImages(FileTable.of(root, names)), SMALL, "p")
    path.put((len(images), images.at(5).sum().item()))


def test_of_several_processes_one_writes_and_all_read(photographs: FileImages, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    names = [photographs.files.relative(position) for position in range(len(photographs))]
    arguments = (str(tmp_path), photographs.files.root, names, queue)
    processes = [context.Process(target=_make, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    said = [queue.get(timeout=120) for _ in range(4)]
    for process in processes:
        process.join(120)
    assert said.count("wrote") == 1
    results = [line for line in said if line != "wrote"]
    assert len(set(results)) == 1
    assert results[0][0] == 24
    assert len(list(tmp_path.iterdir())) == 1
