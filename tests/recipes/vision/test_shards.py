"""Each rank's rows of a batch: the shares put together are the batch of one process, and so are gathered outputs."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import distributed
from bilevel.tree import tensors_in
from examples.masked_autoencoder import MaskedAutoencoder
from examples.segmentation import Segmentation
from recipes.bissl.settings.config import DOWNSTREAM_TASKS, PRETEXT_TASKS
from recipes.vision import shards as shares
from recipes.vision.errors import DataError
from recipes.vision.shards import on_shards, views_of_shard
from recipes.vision.views.random_view import RandomView, apply_view, apply_view_batched
from recipes.vision.views.view_policy import ViewPolicy, draw
from tests.support.recipes.view_reference import PLAIN, generator, photographs, policy_of

WORLDS = (1, 2, 3, 4)
MOVING = {"rotation": 20, "translation": 0.1, "zoom": (0.8, 1.2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "simclr": {},
    "vicreg": {"view1": {**MOVING, "interpolation": "bilinear"}, "view2": {**PLAIN, **MOVING}},
    "byol": {"view1": {"blur_probability": 0.5, "size": 12}},
    "classification": {},
    "multilabel": {"view": {**PLAIN, "flip_probability": 0.5, "grey_probability": 0.3}, "eval_resize": 18},
    "regression": {"view": MOVING},
}


@pytest.fixture
def on_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one of several, as far as numbers go."""

    def pretend(world: int, rank: int) -> None:
        for module in (distributed, shares):
            monkeypatch.setattr(module, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "rank", lambda: rank)

    return pretend


def labels_of(kind: str | None, count: int) -> Tensor:
    if kind == "segmentation":
        return torch.arange(count * 400).view(count, 20, 20).remainder(3).to(torch.uint8)
    made = torch.arange(2 * count).view(count, 2)
    return {"single-label": made[:, 0], "multi-label": made % 3 == 0, "regression": made / 7.0}[kind or "single-label"]


def transforms(name: str, views: str, channels: int) -> list[Callable[..., Any]]:
    """Those of a bundled task, to be called with a number of images and a generator."""
    options = {"image_size": 16, "views": views, **OPTIONS.get(name, {})}

    def images(count: int) -> Tensor:
        return photographs(count, 20, 20, channels)

    if name in PRETEXT_TASKS:
        function = views_of_shard(PRETEXT_TASKS[name](**options).transform(), name)
        return [lambda count, drawn: function(images(count), drawn)]
    task = DOWNSTREAM_TASKS[name](classes=("a", "b"), **options)
    made = [views_of_shard(task.transform(train), name) for train in (True, False)]
    return [lambda count, drawn, f=f: f(images(count), labels_of(task.labels, count), drawn) for f in made]


def check_shares(make: Callable[[int, torch.Generator], Any], on_rank: Callable[[int, int], None]) -> None:
    """The shares of any number of ranks, one after another, are the whole batch bit by bit; so are later draws."""
    for count in range(1, 10):
        on_rank(1, 0)
        alone = generator(count)
        whole = list(tensors_in(make(count, alone)))
        for world in WORLDS:
            parts: list[list[Tensor]] = []
            for rank in range(world):
                on_rank(world, rank)
                drawn = generator(count)
                parts.append(list(tensors_in(make(count, drawn))))
                assert torch.equal(drawn.get_state(), alone.get_state())
            # Sizes of shares, by hand: the first ranks have one more.
            assert [len(part[0]) for part in parts] == [len(range(rank, count, world)) for rank in range(world)]
            for tensor, *rows in zip(whole, *parts, strict=True):
                assert {part.dtype for part in rows} == {tensor.dtype}
                assert {part.shape[1:] for part in rows} == {tensor.shape[1:]}
                assert torch.equal(torch.cat(rows), tensor)


@pytest.mark.parametrize("views", ["per-image", "batched"])
@pytest.mark.parametrize("name", [*PRETEXT_TASKS, *DOWNSTREAM_TASKS])
def test_shares_make_up_the_batch(name: str, views: str, on_rank: Callable[[int, int], None]) -> None:
    for make in transforms(name, views, channels=1 if name == "simclr" else 3):
        check_shares(make, on_rank)


def test_shares_of_tasks_of_ones_own(on_rank: Callable[[int, int], None]) -> None:
    masked = views_of_shard(MaskedAutoencoder(image_size=20).transform(), "MaskedAutoencoder")
    check_shares(lambda count, drawn: masked(photographs(count, 20, 20), drawn), on_rank)
    task = Segmentation(image_size=20, classes=("a", "b"), flip_probability=0.5)
    segmented = views_of_shard(task.transform(train=True), "Segmentation")
    check_shares(
        lambda count, drawn: segmented(photographs(count, 20, 20), labels_of("segmentation", count), drawn), on_rank
    )


@pytest.mark.parametrize("batched", [False, True], ids=["per-image", "batched"])
def test_the_whole_batch_decides_how_a_sample_is_computed(batched: bool) -> None:
    """Only the last image moves, or has colour: the others must come out as they do beside it."""
    policy, images = policy_of(size=16, **PLAIN), photographs(40, 24, 20)
    one = torch.zeros(40, dtype=torch.bool)
    one[-1] = True
    for changes in ({"angle": 30.0 * one}, {"jitter": one, "brightness": 1 + 0.3 * one}):
        parameters = draw(policy, 40, 24, 20, generator())
        for field, value in changes.items():
            object.__setattr__(parameters, field, value)
        function = apply_view_batched if batched else apply_view
        whole = function(policy, images, parameters)
        for rows in (slice(0, 7), slice(7, 39), slice(39, 40)):
            assert torch.equal(function(policy, images, parameters, rows), whole[rows])


def test_a_share_costs_its_part_of_the_batch() -> None:
    view, images = RandomView(ViewPolicy(size=32)), photographs(64, 40, 40)

    def seconds(rows: slice) -> float:
        began = time.process_time()
        view(images, generator(), rows)
        return time.process_time() - began

    whole, quarter = (min(seconds(rows) for _ in range(3)) for rows in (slice(None), slice(16, 32)))
    assert quarter < 0.6 * whole


def test_a_transform_without_rows_is_cut(on_rank: Callable[[int, int], None]) -> None:
    def plain(images: Tensor, drawn: torch.Generator) -> dict[str, Any]:
        noise = torch.rand(images.shape, generator=drawn)
        return {"noisy": images / 255 + noise, "pair": (noise, [images.flip(0)]), "name": "plain"}

    check_shares(lambda count, drawn: views_of_shard(plain, "Plain")(photographs(count, 8, 8), drawn), on_rank)
    on_rank(3, 1)
    batch = views_of_shard(plain, "Plain")(photographs(7, 8, 8), generator())
    assert batch["name"] == "plain"
    # A view would keep all the rows in memory.
    assert batch["noisy"].untyped_storage().nbytes() == batch["noisy"].nbytes


@pytest.mark.parametrize("extra", [torch.zeros(()), torch.zeros(5, 6)], ids=["0-d", "other-rows"])
def test_a_batch_that_cannot_be_cut_is_refused(extra: Tensor, on_rank: Callable[[int, int], None]) -> None:
    def odd(images: Tensor, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        return images, extra

    assert views_of_shard(odd, "Odd")(photographs(6, 8, 8), generator())[1] is extra
    on_rank(2, 0)
    message = r"the batch that Odd transforms: a tensor of shape \(.*\) does not have 6 rows; .* a keyword rows"
    with pytest.raises(DataError, match=message):
        views_of_shard(odd, "Odd")(photographs(6, 8, 8), generator())


def test_a_transform_with_rows_may_share_a_tensor(on_rank: Callable[[int, int], None]) -> None:
    def knowing(images: Tensor, drawn: torch.Generator, *, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        return images[rows], torch.zeros(())

    on_rank(4, 2)
    images = photographs(9, 8, 8)
    batch = views_of_shard(knowing, "Knowing")(images, generator())
    assert torch.equal(batch[0], images[5:7])
    assert batch[1].shape == ()


def test_outputs_in_one_process_are_left_alone() -> None:
    made = torch.ones(())
    assert on_shards(lambda inputs: made, torch.ones(4, 2)) is made


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((torch.ones(4, 2), torch.ones(3)), torch.ones(2), r"evaluation inputs: a tensor of shape \(3,\) .* 4 rows"),
        (torch.ones(4, 2), torch.ones(()), r"evaluation outputs: a tensor of shape \(\) does not have 2 rows"),
    ],
    ids=["inputs", "outputs"],
)
def test_rows_that_do_not_fit_an_evaluation(
    inputs: Any, outputs: Tensor, message: str, on_rank: Callable[[int, int], None]
) -> None:
    on_rank(2, 1)
    with pytest.raises(DataError, match=message):
        on_shards(lambda _: outputs, inputs)
