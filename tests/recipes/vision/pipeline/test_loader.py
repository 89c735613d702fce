"""Views of batches: the same bits whoever makes them, and memory of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.distributed import shard, world_size
from bilevel.training import Transfer
from recipes.vision.errors import DataError
from recipes.vision.pictures.base import Images
from recipes.vision.pictures.files import FileImages
from recipes.vision.pictures.memory import ArrayImages, read_all
from recipes.vision.pipeline.loader import SLICE, Loader, View
from recipes.vision.pipeline.workers import Later, Workers
from recipes.vision.sources.file_table import FileTable
from recipes.vision.views.batched_views import views_of_crops, views_of_pictures
from recipes.vision.views.evaluation_view import EvalView
from recipes.vision.views.view_policy import ViewPolicy, draw
from tests.support.fake_cuda import CUDA, FakeCuda
from tests.support.rank_processes import on_ranks
from tests.support.recipes.image_trees import picture
from tests.support.recipes.sample_photographs import encoded, photograph
from tests.support.recipes.view_reference import generator, photographs

VIEWS: tuple[View, ...] = (
    ViewPolicy(size=16, blur_probability=0.5, solarize_probability=0.2, crop_scale=(0.2, 1.0)),
    ViewPolicy(size=9, interpolation="bilinear", rotation=20, crop_scale=(0.05, 0.2)),
    EvalView(14, 12),
    10,
)
FILES = 150


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileImages:
    """Pictures of many sizes, some of them grey."""
    root = tmp_path_factory.mktemp("files")
    for number in range(FILES):
        mode = "L" if number % 7 == 0 else "RGB"
        content = encoded(photograph(number, 20 + 5 * (number % 11), 15 + 7 * (number % 6), mode))
        (root / f"{number}.jpg").write_bytes(content)
    return FileImages(FileTable.of(root, [f"{number}.jpg" for number in range(FILES)]))


@pytest.fixture(scope="module")
def pool() -> Iterator[dict[int, Workers]]:
    made = {count: Workers(count) for count in (0, 1, 2, 4)}
    yield made
    for workers in made.values():
        workers.close()


BATCHES = [torch.arange(FILES), torch.tensor([5]), torch.arange(FILES).flip(0)[: SLICE + 1], torch.tensor([3, 3, 140])]


def made(images: Images, workers: Workers, **options: Any) -> list[tuple[Tensor, ...]]:
    loader = Loader(images, VIEWS, workers, **options)
    begun = [loader.begin(indices, seed) for seed, indices in enumerate(BATCHES)]
    # Not in the order in which they were begun.
    found = [loader.finish(each)[0] for each in reversed(begun)]
    assert workers.in_flight == 0
    return found[::-1]


def same(first: list[tuple[Tensor, ...]], second: list[tuple[Tensor, ...]]) -> bool:
    return all(
        torch.equal(one, other)
        for ones, others in zip(first, second, strict=True)
        for one, other in zip(ones, others, strict=True)
    )


@pytest.fixture(scope="module")
def expected(files: FileImages) -> list[tuple[Tensor, ...]]:
    """By this process, streamed."""
    return made(files, Workers(0))


def test_types_and_shapes(expected: list[tuple[Tensor, ...]]) -> None:
    for views, indices in zip(expected, BATCHES, strict=True):
        n = len(indices)
        assert [tuple(view.shape) for view in views] == [(n, 3, 16, 16), (n, 3, 9, 9), (n, 3, 12, 12), (n, 3, 10, 10)]
        assert [view.dtype for view in views] == [*3 * [torch.float32], torch.uint8]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_same_bits_for_any_number_of_workers(
    count: int, files: FileImages, pool: dict[int, Workers], expected: list[tuple[Tensor, ...]]
) -> None:
    assert same(made(files, pool[count]), expected)


def test_the_same_bits_in_memory_and_streamed(files: FileImages, expected: list[tuple[Tensor, ...]]) -> None:
    held = read_all(files)
    assert held.in_memory
    assert same(made(held, Workers(0)), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_bits_of_one_size_as_of_any(channels: int, tmp_path: Path) -> None:
    pixels = photographs(FILES, 20, 26, channels)
    together = made(ArrayImages(pixels), Workers(0))
    one_by_one = made(read_all(Listed(pixels)), Workers(0))
    for views, others in zip(together, one_by_one, strict=True):
        for view, other in zip(views, others, strict=True):
            assert torch.equal(view, other)


class Listed(Images):
    """Pictures of one size that are not one tensor."""

    in_memory = True

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def items(self, positions: Any) -> Any:
        return ArrayImages(self.pixels).items(positions)

    def subset(self, positions: Tensor) -> Images:
        return Listed(self.pixels[positions])


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("way", ["streamed", "in memory", "on the device"])
def test_shares_are_rows_of_the_whole(ranks: int, way: str, files: FileImages) -> None:
    pixels = photographs(FILES, 20, 26)
    images = {"streamed": files, "in memory": read_all(files), "on the device": ArrayImages(pixels)}[way]
    loader = Loader(images, VIEWS, Workers(0), array=pixels if way == "on the device" else None)
    for indices in BATCHES:
        whole = loader.make(indices, 5)
        parts = [loader.make(indices, 5, rows) for rows in parts_of(len(indices), ranks)]
        for view, *shares in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat(shares), view)


def parts_of(count: int, ranks: int) -> list[slice]:
    ends = [count * (rank + 1) // ranks for rank in range(ranks)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False) if b > a]


@pytest.mark.parametrize("size", [4, 24, 96, 200])
def test_rows_are_the_same_bits_at_any_place_of_the_batch(size: int) -> None:
    """On either side of a chunk's border, and where only samples of another chunk move or have colour."""
    policy = ViewPolicy(size=size, blur_probability=0.3, solarize_probability=0.3, rotation=10)
    count = 70
    crops = photographs(count, size, size)
    parameters = draw(policy, count, generator(1))
    still = draw(policy.model_copy(update=dict(rotation=0.0, jitter_probability=0.0)), count, generator(1))
    mixed = {name: getattr(still, name).clone() for name in vars(still)}
    mixed["angle"][-1], mixed["jitter"][0], mixed["blur"][:] = 20.0, True, False
    for drawn in (parameters, still, type(parameters)(**mixed)):
        whole = views_of_crops(policy, crops, drawn)
        for rows in (slice(0, 1), slice(0, 31), slice(31, 33), slice(1, 69), slice(69, 70), slice(5, 5)):
            assert torch.equal(views_of_crops(policy, crops[rows], drawn, rows), whole[rows])


def of_this_rank() -> dict[str, Any]:
    pixels = photographs(37, 18, 22)
    held = read_all(Listed(pixels))
    rows = shard(37)
    found = {
        "one size": Loader(ArrayImages(pixels), VIEWS, Workers(0)).make(torch.arange(37), 9, rows),
        "any size": Loader(held, VIEWS, Workers(0)).make(torch.arange(37), 9, rows),
    }
    return {"world": world_size(), **{name: list(views) for name, views in found.items()}}


def test_real_ranks_make_the_batch_of_one_process(tmp_path: Path) -> None:
    whole = Loader(ArrayImages(photographs(37, 18, 22)), VIEWS, Workers(0)).make(torch.arange(37), 9)
    for ranks in on_ranks(of_this_rank, tmp_path).values():
        for way in ("one size", "any size"):
            for view, *shares in zip(whole, *(rank[way] for rank in ranks), strict=True):
                assert torch.equal(torch.cat(shares), view)


@pytest.mark.parametrize("way", ["streamed", "workers", "in memory", "one size", "on the device"])
def test_views_own_their_memory(way: str, files: FileImages, pool: dict[int, Workers]) -> None:
    """Whatever is done to a batch changes neither pictures nor another batch, also where nothing is resized."""
    pixels = photographs(12, 10, 10)
    held = read_all(Listed(pixels))
    images: Images = {
        "streamed": files,
        "workers": files,
        "in memory": held,
        "one size": ArrayImages(pixels.clone()),
        "on the device": ArrayImages(pixels.clone()),
    }[way]
    array = images.array if way == "on the device" else None
    views = (*VIEWS, EvalView(10, 10))
    loader = Loader(images, views, pool[2 if way == "workers" else 0], array=array)
    for indices in (torch.tensor([2]), torch.arange(5), torch.tensor([1, 1])):
        ahead = [loader.begin(indices, 4) for _ in range(2)]
        first = loader.make(indices, 4)
        kept = [view.clone() for view in first]
        second = loader.finish(ahead[0])[0]
        for view in (*second, *loader.finish(ahead[1])[0]):
            view.fill_(7)
        assert all(torch.equal(view, copy) for view, copy in zip(first, kept, strict=True))
        again = loader.make(indices, 4)
        assert all(torch.equal(view, copy) for view, copy in zip(again, kept, strict=True))


def test_the_pictures_lie_as_they_were(files: FileImages) -> None:
    held = read_all(Listed(photographs(12, 10, 10)))
    before = [held.at(position).clone() for position in range(12)]
    for indices in (torch.tensor([3]), torch.arange(12)):
        for view in Loader(held, (10, EvalView(10, 10)), Workers(0)).make(indices):
            view.zero_()
    assert all(torch.equal(held.at(position), picture) for position, picture in enumerate(before))


@pytest.mark.parametrize("axis", [1, 2])
def test_masks_are_cut_and_mirrored_as_the_pictures_are(axis: int) -> None:
    """Pictures of which every pixel tells its row or column, and so does its mask."""
    shape = [40, 24, 30]
    masks = torch.arange(shape[axis]).to(torch.uint8).view([-1 if d == axis else 1 for d in range(3)]).expand(shape)
    policy = ViewPolicy(
        size=16, jitter_probability=0, grey_probability=0, crop_scale=(0.3, 1.0), mean=(0, 0, 0), std=(1, 1, 1)
    )
    views = (policy, EvalView(16, 16, (0, 0, 0), (1, 1, 1)), 12)
    loader = Loader(ArrayImages((8 * masks).unsqueeze(1)), views, Workers(0), masks=masks)
    made, cut = loader.finish(loader.begin(torch.arange(40), 3))
    for view, mask, scale in zip(made, cut, (255, 255, 1), strict=True):
        assert mask.shape == (40, *view.shape[2:])
        assert mask.dtype == torch.uint8
        assert (view[:, 0] * scale / 8 - mask).abs().max() < 1.5
    assert len(cut[0].unique()) > 16


def test_masks_share_rows_with_their_pictures() -> None:
    masks = (torch.arange(20 * 24 * 30) % 5).view(20, 24, 30).to(torch.uint8)
    policy = ViewPolicy(size=16, rotation=30)
    loader = Loader(ArrayImages(photographs(20, 24, 30)), (policy,), Workers(0), masks=masks)
    whole = loader.finish(loader.begin(torch.arange(20), 3))
    parts = [loader.finish(loader.begin(torch.arange(20), 3, rows)) for rows in parts_of(20, 3)]
    for kind in range(2):
        assert torch.equal(torch.cat([part[kind][0] for part in parts]), whole[kind][0])
    # Nothing lies outside a turned picture.
    assert (whole[1][0] == 255).any()


def test_what_is_under_way_is_counted_and_given_back(files: FileImages, pool: dict[int, Workers]) -> None:
    workers = pool[1]
    loader = Loader(files, VIEWS, workers)
    bytes_each = 3 * (16**2 + 9**2 + 12**2 + 10**2)
    first, second = (loader.begin(torch.arange(100)) for _ in range(2))
    assert workers.in_flight == 200 * bytes_each
    loader.give_up(second)
    assert workers.in_flight == 100 * bytes_each
    loader.finish(first)
    assert workers.in_flight == 0
    workers.in_flight = workers.budget - 10 * bytes_each
    assert loader.room(torch.arange(10))
    assert not loader.room(torch.arange(11))
    workers.in_flight = 0


def test_a_damaged_picture_of_a_batch_is_named(tmp_path: Path, pool: dict[int, Workers]) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"none")
    images = FileImages(FileTable.of(tmp_path, [f"{number}.png" for number in range(3)]))
    for count in (0, 1):
        loader = Loader(images, VIEWS, pool[count])
        begun, other = loader.begin(torch.arange(3)), loader.begin(torch.tensor([0, 2]))
        with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
            loader.finish(begun)
        assert len(loader.finish(other)[0][0]) == 2
        assert pool[count].in_flight == 0


@pytest.mark.parametrize("way", ["files", "files by workers", "memory", "array"])
@pytest.mark.parametrize("sends", [False, True])
def test_what_goes_to_a_device_is_the_same_bits(
    way: str, sends: bool, files: FileImages, pool: dict[int, Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = photographs(100, 20, 24)
    images = files if way.startswith("files") else ArrayImages(pictures)
    # As it lies on the device, which the stand-in takes for the CPU.
    array = pictures if way == "array" else None
    workers = pool[2 if way == "files by workers" else 0]
    given = [torch.arange(100), torch.tensor([5, 3, 3])]
    expected = [Loader(images, VIEWS, workers, array=array).make(indices, 7) for indices in given]
    cuda = FakeCuda(monkeypatch)
    loader = Loader(images, VIEWS, workers, transfer=Transfer(CUDA), array=array)
    under_way = [loader.begin(indices, 7) for indices in given]
    if sends:
        for begun in under_way:
            while not all(part.done() for part in begun.parts):
                time.sleep(0.01)
            copies = len(cuda.copies)
            loader.send(begun)
            loader.send(begun)
            assert (len(cuda.copies) > copies) == (array is None), "sent before it is asked for, once"
    found = [loader.finish(begun)[0] for begun in under_way]
    assert same(found, expected)
    assert cuda.all_recorded()
    assert workers.in_flight == 0


def test_masks_go_to_a_device_with_their_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.arange(12, dtype=torch.uint8).view(12, 1, 1).repeat(1, 16, 16)
    images, policy = ArrayImages(photographs(12, 16, 16)), VIEWS[0]
    loaders = [Loader(images, (policy,), Workers(0), masks=masks)]
    expected = loaders[0].finish(loaders[0].begin(torch.arange(12), 3))
    cuda = FakeCuda(monkeypatch)
    loader = Loader(images, (policy,), Workers(0), masks=masks, transfer=Transfer(CUDA))
    begun = loader.begin(torch.arange(12), 3)
    loader.send(begun)
    found = loader.finish(begun)
    assert all(torch.equal(a, b) for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True))
    assert cuda.all_recorded()


def test_what_is_not_made_yet_is_not_sent(files: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    loader = Loader(files, VIEWS, Workers(0), transfer=Transfer(CUDA))
    begun = loader.begin(torch.arange(4), 1)
    monkeypatch.setattr(Later, "done", lambda work: False)
    loader.send(begun)
    assert not cuda.copies
    assert len(loader.finish(begun)[0][0]) == 4


def test_what_was_sent_and_is_given_up_is_counted_once(files: FileImages, pool: dict[int, Workers]) -> None:
    loader = Loader(files, VIEWS, pool[1])
    first, second = (loader.begin(torch.arange(10)) for _ in range(2))
    for begun in (first, second):
        while not all(part.done() for part in begun.parts):
            time.sleep(0.01)
    loader.send(first)
    loader.give_up(first)
    loader.give_up(second)
    assert pool[1].in_flight == 0


def test_a_damaged_picture_is_told_with_its_own_batch(tmp_path: Path, pool: dict[int, Workers]) -> None:
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"none")
    images = FileImages(FileTable.of(tmp_path, ["0.png", "1.png"]))
    for count in (0, 1):
        loader = Loader(images, VIEWS, pool[count])
        begun = loader.begin(torch.arange(2))
        while not all(part.done() for part in begun.parts):
            time.sleep(0.01)
        # While the step before it is computed: that one is to be made.
        loader.send(begun)
        for _ in range(2):
            with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
                loader.finish(begun)
        assert pool[count].in_flight == 0


def test_seeds_and_batches_decide_alone(files: FileImages) -> None:
    loader = Loader(files, VIEWS[:1], Workers(0))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = loader.make(torch.arange(4), 1)[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(loader.make(torch.arange(4), 1)[0], first)
    assert not torch.equal(loader.make(torch.arange(4), 2)[0], first)


def test_the_float_crops_of_a_device_are_within_two_steps() -> None:
    pixels = photographs(30, 40, 52)
    policy = ViewPolicy(
        size=24, jitter_probability=0, grey_probability=0, crop_scale=(0.2, 1.0), mean=(0, 0, 0), std=(1, 1, 1)
    )
    host, device = (Loader(ArrayImages(pixels), (policy,), Workers(0), array=a) for a in (None, pixels))
    first, second = (loader.make(torch.arange(30), 4)[0] for loader in (host, device))
    assert (first - second).abs().max() <= 2 / 255
    assert not torch.equal(first, second)
    assert torch.equal(second, views_of_pictures(policy, pixels, draw(policy, 30, generator(4))))
