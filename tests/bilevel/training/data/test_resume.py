"""A training on DataLoaders that is stopped anywhere and resumed ends as one that is not, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bilevel import CG, Implicit, Level, OneStep, Trainer, Unrolled
from bilevel.checkpoint import load_checkpoint
from bilevel.interruption import Interrupted, Interruption
from bilevel.training import Callback, LoaderSource, SingleLevelTrainer, gradient_of
from tests.bilevel.training.data.data_sets import Own
from tests.bilevel.training.trainer.test_resume import metrics
from tests.support.problems.small_net import DATA, Bell, Net, net_trainer


class Augmented(Dataset[Tensor]):
    """Points with noise of the default generator."""

    def __init__(self, size: int = 20) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return DATA[index] + 0.1 * torch.randn(4)


class AugmentedStream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        points = Augmented()
        return (points[index] for index in torch.randperm(20).tolist())


def loaders(kind: str) -> dict[str, Any]:
    workers: dict[str, Any] = {} if kind in ("no workers", "stream") else {"num_workers": 2}
    workers |= {"persistent_workers": True} if kind == "persistent workers" else {}
    points = AugmentedStream() if kind == "stream" else Augmented()
    shuffle = None if kind == "stream" else True
    return {
        "upper_data": DataLoader(Augmented(10), batch_size=4, shuffle=True, **workers),
        "lower_data": DataLoader(points, batch_size=6, shuffle=shuffle, drop_last=True, **workers),
    }


METHODS: dict[str, dict[str, Any]] = {
    "implicit": {"method": Implicit(CG(3, rtol=None), damping=2.0, hessian_batches=2)},
    "fresh": {"method": Implicit(CG(3, rtol=None), damping=2.0, hessian_batches=2, fresh_batches=True)},
    "recycled": {"method": Implicit(CG(3, rtol=None, recycle=5), damping=2.0, hessian_batches=5)},
    "unrolled": {"method": Unrolled(), "upper_steps": 1, "adapts": False},
    "one step": {"method": OneStep(lower_batches=2)},
}


def made(folder: Path, kind: str, method: str, *extra: Callback) -> Trainer:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(9)
    trainer = net_trainer(folder, *extra, **METHODS[method], **loaders(kind))
    torch.manual_seed(10)
    return trainer


def resumed(folder: Path, kind: str, method: str) -> Trainer:
    """In a fresh trainer, after draws that no other run has made."""
    trainer = made(folder, kind, method)
    torch.manual_seed(12345)
    found = load_checkpoint(folder / "checkpoints")
    assert found is not None
    trainer.load_state_dict(found[1])
    return trainer


def assert_same(one: Trainer, other: Trainer, *folders: Path) -> None:
    for level in ("upper", "lower"):
        ours, theirs = one.levels[level].params, other.levels[level].params
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), level
    assert isinstance(one.problem, Net)
    assert isinstance(other.problem, Net)
    assert all(map(torch.equal, one.problem.net.buffers(), other.problem.net.buffers()))
    assert metrics(folders[0]) == metrics(folders[1])
    assert (one.steps, one.solves) == (other.steps, other.solves)


# Evaluations: in the lower stage, in a solve, between upper steps, in later alternations; others follow each.
CASES = [
    ("no workers", "implicit", (2, 5, 8, 14)),
    ("two workers", "implicit", (2, 8)),
    ("persistent workers", "implicit", (5, 14)),
    ("stream", "implicit", (2, 8)),
    ("no workers", "fresh", (2, 5, 8, 14)),
    ("two workers", "fresh", (5,)),
    ("stream", "fresh", (8,)),
    ("no workers", "recycled", (5, 8)),
    ("no workers", "unrolled", (2, 5)),
    ("no workers", "one step", (5, 14)),
]


@pytest.mark.parametrize(("kind", "method", "stops"), CASES)
def test_stopped_anywhere_is_not_stopped(tmp_path: Path, kind: str, method: str, stops: tuple[int, ...]) -> None:
    whole = made(tmp_path / "whole", kind, method)
    whole.run()
    end = torch.get_rng_state()
    for first in stops:
        folder = tmp_path / str(first)
        trainer = made(folder, kind, method)
        for number in (first, 7):
            Bell(trainer.problem, number)  # type: ignore[arg-type]
            with Interruption(), pytest.raises(Interrupted):
                trainer.run()
            trainer = resumed(folder, kind, method)
        trainer.run()
        assert_same(trainer, whole, folder, tmp_path / "whole")
        assert torch.equal(torch.get_rng_state(), end)


@pytest.mark.parametrize("kind", ["no workers", "two workers", "persistent workers"])
def test_the_same_trainer_may_go_on_after_a_stop(tmp_path: Path, kind: str) -> None:
    whole, broken = (made(tmp_path / name, kind, "implicit") for name in ("whole", "broken"))
    whole.run()
    torch.manual_seed(10)
    for number in (5, 6):
        Bell(broken.problem, number)  # type: ignore[arg-type]
        with Interruption(), pytest.raises(Interrupted):
            broken.run()
    broken.run()
    assert_same(broken, whole, tmp_path / "broken", tmp_path / "whole")


def test_workers_change_no_number(tmp_path: Path) -> None:
    trainers = {}
    for kind in ("no workers", "two workers", "persistent workers"):
        trainers[kind] = made(tmp_path / kind, kind, "implicit")
        trainers[kind].run()
        assert_same(trainers[kind], trainers["no workers"], tmp_path / kind, tmp_path / "no workers")


def test_a_loader_trains_as_its_batches_do(tmp_path: Path) -> None:
    by_loader = made(tmp_path / "loader", "no workers", "implicit")
    seeds = {name: level.data.state_dict()["seed"] for name, level in by_loader.levels.items()}
    by_loader.run()
    end = torch.get_rng_state()
    lists = {}
    for name, number in (("upper", 12), ("lower", 12)):
        source = LoaderSource(loaders("no workers")[f"{name}_data"], seed=seeds[name])
        lists[f"{name}_data"] = [source.next() for _ in range(number)]
    (tmp_path / "list").mkdir()
    torch.manual_seed(9)
    by_list = net_trainer(tmp_path / "list", **METHODS["implicit"], **lists)
    torch.manual_seed(10)
    by_list.run()
    assert_same(by_list, by_loader, tmp_path / "list", tmp_path / "loader")
    assert torch.equal(torch.get_rng_state(), end)


def single(steps: int, data: Any) -> tuple[SingleLevelTrainer, Tensor]:
    weight = torch.zeros(4, requires_grad=True)
    params = {"w": weight}
    level = Level(params, torch.optim.SGD(params.values(), lr=0.1, momentum=0.9), data)
    return SingleLevelTrainer(gradient_of(lambda batch: (batch - weight).square().mean(), params), level, steps), weight


@pytest.mark.parametrize("kind", ["no workers", "two workers", "persistent workers", "stream"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_plain_training_resumes_too(kind: str, stop: int) -> None:
    torch.manual_seed(3)
    whole, expected = single(8, loaders(kind)["lower_data"])
    whole.run()
    torch.manual_seed(3)
    first, _ = single(stop, loaders(kind)["lower_data"])
    first.run()
    torch.manual_seed(77)
    second, weight = single(8, loaders(kind)["lower_data"])
    second.load_state_dict(first.state_dict())
    second.run()
    assert torch.equal(weight, expected)
    assert second.state_dict()["data"] == whole.state_dict()["data"]


def test_a_training_whose_data_draw_on_their_own_says_so_when_resumed() -> None:
    def make(steps: int) -> SingleLevelTrainer:
        weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        level = Level({"w": weight}, torch.optim.SGD([weight], lr=0.1), DataLoader(Own(), batch_size=3, shuffle=True))
        return SingleLevelTrainer(gradient_of(lambda batch: (batch - weight).mean(), {"w": weight}), level, steps)

    first = make(5)
    first.run()
    second = make(9)
    second.load_state_dict(first.state_dict())
    with pytest.warns(
        UserWarning, match="LoaderSource: the order of the batches is not that of the run before"
    ) as said:
        second.run()
    assert len(said) == 1
