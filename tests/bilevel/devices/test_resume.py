"""Trainings on a device that are stopped and resumed equal those that were not, to the bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bilevel import CG, AlternatingSchedule, Checkpointing, Level, Trainer
from bilevel.checkpoint import random_state, set_random_state
from bilevel.training import Callback
from tests.support.methods import METHODS, Kind
from tests.support.problems.device_networks import Moved, made
from tests.support.problems.small_net import Net, net_trainer


class Interrupt(Callback):
    """Stops in the middle of the third alternation."""

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        if record["alternation"] == 3 and record["event"] == "upper":
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Kernels that sum in one order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def seed(number: int) -> None:
    """All default generators, those of a GPU too."""
    torch.manual_seed(number)


def trained(folder: Path, kind: Kind, device: torch.device, *callbacks: Callback) -> Trainer:
    folder.mkdir(exist_ok=True)
    return net_trainer(
        folder,
        *callbacks,
        method=kind.method,
        lower_steps=kind.lower_steps,
        upper_steps=kind.upper_steps,
        adapts=kind.adapts,
        blocks=kind.blocks,
        device=device,
    )


def tensors(trainer: Trainer) -> list[Tensor]:
    """Variables of both levels, and the network's buffers."""
    found = [leaf for level in trainer.levels.values() for leaf in level.params.values()]
    return found + (list(trainer.problem.net.buffers()) if isinstance(trainer.problem, Net) else [])


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS.keys())
def test_every_method_resumes_to_the_bit(kind: Kind, tmp_path: Path, device: torch.device) -> None:
    """With dropout, whose masks the device's generator draws."""
    whole = trained(tmp_path / "whole", kind, device, Callback())
    seed(10)
    whole.run()
    drawn = torch.rand(3, device=device)
    first = trained(tmp_path / "broken", kind, device, Interrupt())
    seed(10)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    seed(12345)
    second = trained(tmp_path / "broken", kind, device, Callback())
    assert second.resume(tmp_path / "broken" / "checkpoints")
    assert second.progress > 0
    second.run()
    pairs = list(zip(tensors(second), tensors(whole), strict=True))
    assert all(one.device.type == device.type for one, _ in pairs)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(torch.rand(3, device=device), drawn)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_loader_resumes_to_the_bit(workers: int, tmp_path: Path, device: torch.device) -> None:
    """Its batches are pinned where there is a GPU, and copied while the step before is computed."""

    def run(alternations: int, folder: Path | None) -> Trainer:
        problem, upper, lower, batch = made("batch norm", device, torch.float32, Moved)
        data = TensorDataset(*(tensor.cpu() for tensor in batch))
        loader = DataLoader(data, 6, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda")
        trainer = Trainer(
            problem,
            Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [batch]),
            Level(lower, torch.optim.Adam(lower.values(), lr=1e-2), loader),
            AlternatingSchedule(alternations, 3, 2),
            CG(3, rtol=None),
            callbacks=[] if folder is None else [Checkpointing(folder)],
        )
        if folder is not None:
            trainer.resume(folder)
        trainer.run()
        return trainer

    seed(0)
    whole = run(4, None)
    seed(0)
    run(2, tmp_path)
    resumed = run(4, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(tensors(resumed), tensors(whole), strict=True))


def test_the_random_state_holds_the_devices_generators(device: torch.device) -> None:
    torch.rand(1, device=device)
    state = random_state()
    drawn = torch.rand(5, device=device), torch.rand(5)
    set_random_state(state)
    assert torch.equal(torch.rand(5, device=device), drawn[0])
    assert torch.equal(torch.rand(5), drawn[1])
