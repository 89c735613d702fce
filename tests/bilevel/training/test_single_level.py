"""Plain training of one level: what a step does and records, and what one that is not finite leaves alone."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Level
from bilevel.training import BatchSource, Callback, NonFiniteError, SingleLevelTrainer, gradient_of


class Events(Callback):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.records.append(record)


def make(weight: Tensor, losses: list[Any], **options: Any) -> SingleLevelTrainer:
    """Each batch is a loss as a function of the weight; the rate is halved after every step."""
    variables = {"w": weight}
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=options.pop("momentum", 0.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    level = Level(variables, optimizer, losses, scheduler=scheduler)
    return SingleLevelTrainer(gradient_of(lambda loss: loss(weight), variables), level, len(losses), **options)


def test_a_step_descends_and_says_what_it_did() -> None:
    weight, events = torch.tensor([3.0, 4.0], requires_grad=True), Events()
    make(weight, [lambda w: 0.5 * w.square().sum(), lambda w: (0.0 * w).sum()], callbacks=[events]).run()
    first, second = events.records
    assert first == {"event": "train", "step": 1, "loss": 12.5, "lr": 0.1, "grad_norm": 5.0}
    # The second step had the next rate, and no gradient left over from the first.
    assert (second["step"], second["lr"], second["grad_norm"]) == (2, pytest.approx(0.05), 0.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([2.7, 3.6]))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(factor: float, where: str) -> None:
    weight = torch.tensor([0.0, 4.0], requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        # The root's derivative at 0 is infinite where its value is 0.
        return w.sum() * factor if where == "loss" else w.sqrt().sum() * (1.0 if factor > 1 else 0.0)

    trainer = make(weight, [loss], momentum=0.9)
    before = copy.deepcopy(trainer.state_dict()["levels"])
    with pytest.raises(NonFiniteError, match=r"step 1: loss .*no variable was changed. Lower the learning rate"):
        trainer.run()
    after = trainer.state_dict()["levels"]
    assert weight.tolist() == [0.0, 4.0]
    assert (after["train"]["optimizer"], after["train"]["scheduler"]) == (
        before["train"]["optimizer"],
        before["train"]["scheduler"],
    )


class Prepared(BatchSource):
    """Ones; notes what the weight was when it was asked to prepare."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.events = weight, list[tuple[str, float]]()

    def begin_stage(self, steps: int) -> None:
        return None

    def next(self) -> Tensor:
        self.events.append(("next", float(self.weight.detach())))
        return torch.ones(())

    def prepare(self) -> None:
        self.events.append(("prepare", float(self.weight.detach())))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        return None


def test_data_prepare_the_next_batch_before_a_step_is_made() -> None:
    """Once a step, after its gradient and before its update."""
    weight = torch.tensor(1.0, requires_grad=True)
    source = Prepared(weight)
    level = Level({"w": weight}, torch.optim.SGD([weight], 0.25), source)
    SingleLevelTrainer(gradient_of(lambda batch: weight * batch, {"w": weight}), level, 3).run()
    assert source.events == [
        *(("next", 1.0), ("prepare", 1.0)),
        *(("next", 0.75), ("prepare", 0.75)),
        *(("next", 0.5), ("prepare", 0.5)),
    ]
