"""Worker processes: that they end, what is said when one fails, and several ranks."""

import multiprocessing
import os
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from bilevel import Level
from bilevel.distributed import on_first_rank, rank, world_size
from bilevel.training import LoaderSource, SingleLevelTrainer, gradient_of
from tests.bilevel.training.data.data_sets import Points, Stream, drawn, loader, points_of
from tests.support.own_process import in_own_process
from tests.support.rank_processes import on_ranks


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def training(data: Any, steps: int) -> SingleLevelTrainer:
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    level = Level({"w": weight}, torch.optim.SGD([weight], lr=0.1), data)
    return SingleLevelTrainer(gradient_of(lambda batch: (batch - weight).square().mean(), {"w": weight}), level, steps)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dataset", [Points(40), Stream(40)])
def test_workers_end_with_the_run_and_with_the_source(dataset: Any, persistent: bool) -> None:
    before = children()
    made = loader(dataset, num_workers=2, persistent_workers=persistent)
    trainer = training(made, 4)
    trainer.advance()
    assert len(children() - before) == 2
    trainer.run()
    assert children() == before
    trainer.advance()
    assert len(children() - before) == 2
    del trainer
    assert children() == before


def test_workers_end_with_a_run_that_fails() -> None:
    before = children()
    # Of another shape than the variable.
    trainer = training(loader(Points(40), num_workers=2, collate_fn=torch.cat), 4)
    with pytest.raises(RuntimeError, match="size of tensor"):
        trainer.run()
    assert children() == before


class Broken(Points):
    """Fails at point 7."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 7:
            raise LookupError("image 7 cannot be read")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_dataset_comes_through_and_names_the_batch(workers: int) -> None:
    source = LoaderSource(loader(Broken(), shuffle=False, num_workers=workers), seed=0)
    before = torch.get_rng_state()
    drawn(source, 2)
    for _ in range(2):
        with pytest.raises(LookupError, match="image 7 cannot be read") as caught:
            source.next()
        assert caught.value.__notes__ == ["LoaderSource: while drawing batch 2 of the DataLoader's pass 0 (from 0)"]
        assert ("in DataLoader worker process" in str(caught.value)) == (workers > 0)
    assert source.state_dict()["drawn"] == 2
    assert torch.equal(torch.get_rng_state(), before)


class Killed(Points):
    """The worker that loads point 7 is killed, once, when the batches before have come."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.mark, self.come = folder / "killed", folder / "come"

    def __getitem__(self, index: int) -> Tensor:
        if index == 7 and not self.mark.exists():
            self.mark.touch()
            while not self.come.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def draw_while_a_worker_is_killed(folder: str, persistent: str) -> None:
    """Point 7 is in batch 2. Torch's handler raises wherever this process is: in a draw, or before it."""
    options = {"shuffle": False, "num_workers": 2, "persistent_workers": persistent == "True"}
    straight = drawn(LoaderSource(loader(**options), seed=0), 6)
    source = LoaderSource(loader(Killed(Path(folder)), **options), seed=0)
    batches: list[Any] = []
    while len(batches) < 6:
        try:
            if len(batches) == 2:
                (Path(folder) / "come").touch()
            batches += drawn(source, 1)
        except RuntimeError as error:
            print(error)
    assert batches == straight


@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_worker_is_named_and_its_batch_can_be_drawn_again(tmp_path: Path, persistent: bool) -> None:
    # Not here: the signal that a worker has ended may come late, and torch's handler would raise inside pytest.
    code, said, errors = in_own_process(draw_while_a_worker_is_killed, str(tmp_path), str(persistent))
    assert code == 0, errors
    named = re.compile(r"DataLoader worker \(pid\(?s?\)? .*\) (is killed by signal|exited unexpectedly)")
    # A second one is the draw's, where the handler raised before it.
    assert len(said.splitlines()) in (1, 2), said
    assert all(named.match(line) for line in said.splitlines()), said


def test_workers_that_are_spawned_draw_the_same() -> None:
    straight = drawn(LoaderSource(loader(), seed=0), 5)
    spawned = loader(num_workers=1, multiprocessing_context="spawn", persistent_workers=True)
    assert drawn(LoaderSource(spawned, seed=0), 5) == straight


def seed_by_hand(worker: int) -> None:
    torch.manual_seed(worker)


def test_a_workers_own_beginning_is_made_and_reseeded() -> None:
    straight = drawn(LoaderSource(loader(), seed=0), 5)
    assert drawn(LoaderSource(loader(num_workers=2, worker_init_fn=seed_by_hand), seed=0), 5) == straight


def test_pinned_batches() -> None:
    with warnings.catch_warnings():
        # Of torch, where there is no accelerator.
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")
        source = LoaderSource(loader(pin_memory=True), seed=0)
        batch = source.next()
    assert batch.is_pinned() == torch.cuda.is_available()
    assert batch.tolist() == drawn(LoaderSource(loader(), seed=0), 1)[0]


def shares() -> dict[str, Any]:
    """What a rank draws of a set that is cut by a DistributedSampler, straight and resumed from rank 0's state."""
    # Ranks need not be seeded alike.
    torch.manual_seed(rank())

    def made() -> LoaderSource:
        points = Points(16)
        return LoaderSource(DataLoader(points, batch_size=2, sampler=DistributedSampler(points)))

    straight, other = made(), made()
    batches = drawn(straight, 3)
    other.load_state_dict(on_first_rank(straight.state_dict))
    alike = LoaderSource(loader())
    return {
        "seed": straight.seed,
        "batches": batches + drawn(straight, 9),
        "resumed": drawn(other, 9),
        "alike": drawn(alike, 4),
        "world": world_size(),
    }


def test_ranks_draw_their_shares_and_resume_from_the_first_ones_state(tmp_path: Path) -> None:
    for world, found in on_ranks(shares, tmp_path).items():
        assert {rank["world"] for rank in found} == {world}
        assert len({rank["seed"] for rank in found}) == 1
        each = 16 // 2 // world
        for first in (0, each):
            points = [point for rank in found for point in points_of(rank["batches"][first : first + each])]
            assert sorted(points) == list(range(16))
        assert all(rank["resumed"] == rank["batches"][3:] for rank in found)
        # Without a sampler that cuts it, all see the same points, and each draws for itself.
        points = [points_of(rank["alike"]) for rank in found]
        assert all(other == points[0] for other in points)
        assert all(other["alike"] != found[0]["alike"] for other in found[1:])
