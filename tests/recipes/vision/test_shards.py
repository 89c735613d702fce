"""Each rank's rows of a batch: the shares put together are the batch of one process, and so are gathered outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import distributed
from bilevel.tree import tensors_in
from recipes.vision import shards as shares
from recipes.vision.errors import DataError
from recipes.vision.shards import Rows, SharedTransform, evaluated_rows, of_all_ranks, on_shards
from tests.support.recipes.view_reference import generator, photographs

WORLDS = (1, 2, 3, 4)


@pytest.fixture
def on_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one of several, as far as numbers go."""

    def pretend(world: int, rank: int) -> None:
        for module in (distributed, shares):
            monkeypatch.setattr(module, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "rank", lambda: rank)

    return pretend


def plain(images: Tensor, drawn: torch.Generator) -> dict[str, Any]:
    """Knows of no shares."""
    noise = torch.rand(images.shape, generator=drawn)
    return {"noisy": images / 255 + noise, "pair": (noise, [images.flip(0)]), "name": "plain"}


def knowing(images: Tensor, drawn: torch.Generator, *, rows: slice = slice(None), count: int = -1) -> Tensor:
    """Is given its own rows, and draws for all."""
    noise = torch.rand(len(images) if count < 0 else count, 3, 8, 8, generator=drawn)
    return images / 255 + noise[rows]


def masked(images: Tensor, drawn: torch.Generator, rows: slice, count: int) -> dict[str, Tensor]:
    """As a masked autoencoder: which patches are hidden travels with the batch."""
    hidden = torch.rand(count, 16, generator=drawn).argsort(dim=1)[rows]
    return {"images": images, "hidden": hidden}


def unchanged(images: Tensor, drawn: torch.Generator) -> Tensor:
    return images


TRANSFORMS: dict[str, SharedTransform] = {
    "plain": SharedTransform(plain, "Plain"),
    "knowing": SharedTransform(knowing, "Knowing"),
    "masked": SharedTransform(masked, "Masked"),
    "unchanged": SharedTransform(unchanged, "Unchanged", changes_nothing=True),
}


def made(transform: SharedTransform, count: int, drawn: torch.Generator) -> Any:
    """As a training makes it: only the rows that the transform asks for are there."""
    return transform(count, photographs(count, 8, 8)[transform.rows(count)], drawn)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_shares_make_up_the_batch(name: str, on_rank: Callable[[int, int], None]) -> None:
    """Of any number of ranks, one after another, they are the whole batch bit by bit; so are later draws."""
    for count in range(1, 10):
        on_rank(1, 0)
        alone = generator(count)
        whole = list(tensors_in(made(TRANSFORMS[name], count, alone)))
        for world in WORLDS:
            parts: list[list[Tensor]] = []
            for rank in range(world):
                on_rank(world, rank)
                drawn = generator(count)
                parts.append(list(tensors_in(made(TRANSFORMS[name], count, drawn))))
                assert torch.equal(drawn.get_state(), alone.get_state()) or name == "unchanged"
            # Sizes of shares, by hand: the first ranks have one more.
            assert [len(part[0]) for part in parts] == [len(range(rank, count, world)) for rank in range(world)]
            for tensor, *rows in zip(whole, *parts, strict=True):
                assert {part.dtype for part in rows} == {tensor.dtype}
                assert {part.shape[1:] for part in rows} == {tensor.shape[1:]}
                assert torch.equal(torch.cat(rows), tensor)


@pytest.mark.parametrize(
    ("name", "asked"),
    [("plain", slice(0, 7)), ("knowing", slice(3, 5)), ("masked", slice(3, 5)), ("unchanged", slice(3, 5))],
)
def test_only_rows_that_are_used_are_asked_for(name: str, asked: slice, on_rank: Callable[[int, int], None]) -> None:
    on_rank(3, 1)
    assert TRANSFORMS[name].rows(7) == asked
    on_rank(1, 0)
    assert TRANSFORMS[name].rows(7) == slice(0, 7)


def test_a_share_that_is_cut_keeps_no_whole_batch_in_memory(on_rank: Callable[[int, int], None]) -> None:
    on_rank(3, 1)
    batch = made(TRANSFORMS["plain"], 7, generator())
    assert batch["name"] == "plain"
    assert batch["noisy"].untyped_storage().nbytes() == batch["noisy"].nbytes


@pytest.mark.parametrize("extra", [torch.zeros(()), torch.zeros(5, 6)], ids=["0-d", "other-rows"])
def test_a_batch_that_cannot_be_cut_is_refused(extra: Tensor, on_rank: Callable[[int, int], None]) -> None:
    def odd(images: Tensor, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        return images, extra

    transform = SharedTransform(odd, "Odd")
    assert made(transform, 6, generator())[1] is extra
    on_rank(2, 0)
    message = (
        r"the batch that Odd transforms: a tensor of shape \(.*\) does not have 6 rows; .* keywords rows and count"
    )
    with pytest.raises(DataError, match=message):
        made(transform, 6, generator())


def test_a_transform_with_rows_may_share_a_tensor(on_rank: Callable[[int, int], None]) -> None:
    def sharing(images: Tensor, drawn: torch.Generator, *, rows: slice, count: int) -> tuple[Tensor, Tensor]:
        assert count == 9
        return images, torch.zeros(())

    on_rank(4, 2)
    batch = made(SharedTransform(sharing, "Sharing"), 9, generator())
    assert torch.equal(batch[0], photographs(9, 8, 8)[5:7])
    assert batch[1].shape == ()


def test_a_keyword_alone_is_not_enough(on_rank: Callable[[int, int], None]) -> None:
    def half(images: Tensor, drawn: torch.Generator, rows: slice = slice(None)) -> Tensor:
        assert rows == slice(None)
        return images

    on_rank(3, 2)
    transform = SharedTransform(half, "Half")
    assert not transform.takes_rows
    assert torch.equal(made(transform, 7, generator()), photographs(7, 8, 8)[5:])


@pytest.mark.parametrize(
    ("count", "rank", "expected"), [(5, 0, slice(0, 2)), (5, 2, slice(4, 5)), (3, 1, slice(1, 2)), (2, 1, slice(0, 2))]
)
def test_rows_of_an_evaluation(count: int, rank: int, expected: slice, on_rank: Callable[[int, int], None]) -> None:
    """Fewer than ranks, and every rank computes all of them."""
    on_rank(3, rank)
    assert evaluated_rows(count) == expected
    on_rank(1, 0)
    assert evaluated_rows(count) == slice(0, count)


def test_outputs_in_one_process_are_left_alone() -> None:
    made = torch.ones(())
    assert on_shards(lambda inputs: made, Rows(torch.ones(4, 2), 4)) is made
    assert of_all_ranks(made, 4) is made


@pytest.mark.parametrize("outputs", [torch.ones(()), torch.ones(4), torch.ones(3, 2)])
def test_rows_that_do_not_fit_an_evaluation(outputs: Tensor, on_rank: Callable[[int, int], None]) -> None:
    on_rank(2, 1)
    with pytest.raises(DataError, match=r"evaluation outputs: a tensor of shape \(.*\) does not have 2 rows"):
        on_shards(lambda _: outputs, Rows(torch.ones(2, 2), 4))
    with pytest.raises(DataError, match=r"evaluation targets: a tensor"):
        of_all_ranks(outputs, 4, "evaluation targets")
