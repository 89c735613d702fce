"""Which schedules a level takes, how it steps and resumes them, and which it refuses when it is made."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, swa_utils
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from bilevel import AlternatingSchedule, Checkpointing, Level, Params, Trainer
from bilevel.hypergradients import from_optimizer
from bilevel.training import Callback, SingleLevelTrainer, gradient_of
from tests.bilevel.training.levels.making import Make, level, none
from tests.support.cases import vector
from tests.support.problems.closed_forms import quadratic

STEPS = 8
SCHEDULES: dict[str, Make] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: MultiplicativeLR(o, lambda step: 1.0 - step / 20),
    "step": lambda o: StepLR(o, 2),
    "milestones": lambda o: MultiStepLR(o, [2, 5]),
    "constant": lambda o: ConstantLR(o, total_iters=4),
    "linear": LinearLR,
    "exponential": lambda o: ExponentialLR(o, 0.8),
    "polynomial": lambda o: PolynomialLR(o, 7),
    "cosine": lambda o: CosineAnnealingLR(o, STEPS),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.1, 3),
    "cyclic by a function": lambda o: CyclicLR(o, 0.01, 0.1, 2, scale_fn=lambda x: 0.5**x, scale_mode="iterations"),
    "one cycle": lambda o: OneCycleLR(o, 0.1, STEPS),
    "in sequence": lambda o: SequentialLR(o, [LinearLR(o), LambdaLR(o, lambda step: 0.7**step)], [3]),
    "chained": lambda o: ChainedScheduler([LinearLR(o), ExponentialLR(o, 0.9)], o),
    "averaging": lambda o: swa_utils.SWALR(o, 0.01, 3),
}


class Rates(Callback):
    """The options that each step was made with."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.seen = optimizer, []

    def on_event(self, trainer: Any, record: Any) -> None:
        self.seen.append((record["lr"], self.optimizer.param_groups[0].get("momentum")))


def single(make: Make, folder: Path, *, steps: int = STEPS, callback: Make = none) -> SingleLevelTrainer:
    """Half a square around batches that differ, with checkpoints in `folder`."""
    weight = vector(3, 1).requires_grad_()
    optimizer = SGD([weight], 0.1, momentum=0.9)
    level = Level({"w": weight}, optimizer, [vector(3, k) for k in range(3)], scheduler=make(optimizer))
    derivatives = gradient_of(lambda batch: 0.5 * (weight - batch).square().sum(), {"w": weight})
    callbacks = [Rates(optimizer), callback(optimizer) or Callback(), Checkpointing(folder)]
    return SingleLevelTrainer(derivatives, level, steps, callbacks=callbacks)


def weight_of(trainer: SingleLevelTrainer) -> Tensor:
    return trainer.levels["train"].params["w"].detach()


def resumed_in_the_middle(make: Make, folder: Path, **options: Any) -> SingleLevelTrainer:
    first = single(make, folder, **options)
    assert not first.resume(folder)
    for _ in range(3):
        first.advance()
        for callback in first.callbacks:
            callback.on_progress(first)
    second = single(make, folder, **options)
    assert second.resume(folder)
    second.run()
    return second


def rates(trainer: SingleLevelTrainer) -> list[Any]:
    (seen,) = [callback.seen for callback in trainer.callbacks if isinstance(callback, Rates)]
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_stepped_once_a_step_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    make = SCHEDULES[name]
    whole = single(make, tmp_path / "whole")
    whole.run()
    assert len({lr for lr, _ in rates(whole)}) > 1
    # The same schedule by hand.
    other = SGD([torch.zeros(1)], 0.1, momentum=0.9)
    schedule, expected = make(other), []
    for _ in range(STEPS):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step()
    assert [lr for lr, _ in rates(whole)] == expected
    again = resumed_in_the_middle(make, tmp_path / "parts")
    assert rates(again) == rates(whole)[3:]
    assert torch.equal(weight_of(again), weight_of(whole))


class Plateau(Callback):
    """Lowers a learning rate where a metric has stopped to fall."""

    def __init__(self, scheduler: ReduceLROnPlateau, metric: Callable[[], float]) -> None:
        self.scheduler, self.metric = scheduler, metric

    def on_progress(self, trainer: Any) -> None:
        self.scheduler.step(self.metric())

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(dict(state))


def test_a_plateau_is_followed_by_a_callback_that_resumes_exactly(tmp_path: Path) -> None:
    def plateau(optimizer: Optimizer) -> Plateau:
        # The second metric that is no better is one too many.
        return Plateau(ReduceLROnPlateau(optimizer, factor=0.5, patience=1), lambda: 1.0)

    whole = single(none, tmp_path / "whole", callback=plateau)
    whole.run()
    assert [lr for lr, _ in rates(whole)] == [0.1] * 3 + [0.05] * 2 + [0.025] * 2 + [0.0125]
    again = resumed_in_the_middle(none, tmp_path / "parts", callback=plateau)
    assert rates(again) == rates(whole)[3:]
    assert torch.equal(weight_of(again), weight_of(whole))


def test_a_schedule_that_was_stepped_before_goes_on_from_there(tmp_path: Path) -> None:
    def made(optimizer: Optimizer) -> StepLR:
        schedule = StepLR(optimizer, 3, gamma=0.5)
        optimizer.step()
        schedule.step()
        return schedule

    trainer = single(made, tmp_path)
    trainer.run()
    assert [lr for lr, _ in rates(trainer)] == [0.1] * 2 + [0.05] * 3 + [0.025] * 3


class Own:
    """A schedule that is none of torch's and has no `optimizer`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.groups, self.count = optimizer.param_groups, 0

    def step(self) -> None:
        self.count += 1
        self.groups[0]["lr"] = 0.1 / (1 + self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_a_schedule_of_ones_own_is_taken(tmp_path: Path) -> None:
    trainer = single(Own, tmp_path)
    trainer.run()
    assert [lr for lr, _ in rates(trainer)] == [0.1 / (1 + k) for k in range(STEPS)]


def test_the_state_of_another_kind_of_schedule_is_refused(tmp_path: Path) -> None:
    saved = single(SCHEDULES["in sequence"], tmp_path).state_dict()
    parts = r"SequentialLR\(LinearLR, LambdaLR\)"
    for make, here in (
        (SCHEDULES["step"], "StepLR"),
        (none, "none"),
        (lambda o: SequentialLR(o, [ConstantLR(o), ExponentialLR(o, 0.9)], [3]), r"SequentialLR\(ConstantLR, Exp"),
    ):
        other = single(make, tmp_path)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=f"train: scheduler: the state has {parts}, this level {here}"):
            other.load_state_dict(saved)
        assert other.state_dict()["levels"]["train"]["scheduler"] == before["levels"]["train"]["scheduler"]


class NeedsEpoch(Own):
    def step(self, epoch: int, metric: float | None = None) -> None:  # type: ignore[override]
        raise AssertionError


class KeepsFunction(LRScheduler):
    def __init__(self, optimizer: Optimizer, function: Callable[[int], float]) -> None:
        self.function = function
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [self.function(self.last_epoch)]


def public(step: int) -> float:
    return 0.1


def other() -> Optimizer:
    return SGD([torch.zeros(1)], 0.5)


@pytest.mark.parametrize(
    ("schedule", "match"),
    [
        (ReduceLROnPlateau, "ReduceLROnPlateau.step needs 'metrics'.*leave it out here, and step it in a callback"),
        (NeedsEpoch, "NeedsEpoch.step needs 'epoch'"),
        (lambda o: StepLR(other(), 2), "this StepLR is of another optimizer, a SGD, .*from the level's own Adam"),
        (lambda o: SCHEDULES["in sequence"](other()), "this SequentialLR is of another optimizer"),
        (lambda o: SCHEDULES["chained"](other()), "this ChainedScheduler is of another optimizer"),
        (lambda o: OneCycleLR(SGD([torch.zeros(1)], 0.5, momentum=0.9), 0.1, 5), "this OneCycleLR is of another"),
        (
            lambda o: KeepsFunction(o, lambda step: 0.1),
            "state_dict of KeepsFunction holds something else.*leave functions",
        ),
        (lambda o: KeepsFunction(o, public), "state_dict of KeepsFunction holds something else"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_with_the_remedy(schedule: Make, match: str) -> None:
    with pytest.raises(ValueError, match=f"^Level: scheduler: .*{match}"):
        level(lambda p: Adam(p.values(), 0.1), schedule)


class Wrapped(Optimizer):
    """An optimizer around another one, whose groups are its own, as some libraries have it."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


def test_a_schedule_of_the_optimizer_within_a_wrapper_is_the_levels() -> None:
    inner: list[Optimizer] = []

    def wrapped(params: Params) -> Optimizer:
        inner.append(SGD(params.values(), 0.1))
        return Wrapped(inner[0])

    made = level(wrapped, lambda o: StepLR(inner[0], 1))
    made.descend({name: torch.ones_like(leaf) for name, leaf in made.params.items()}, 1.0)
    assert made.rate == pytest.approx(0.01)


def test_the_momentum_that_a_schedule_has_set_is_what_a_method_reads() -> None:
    made = level(lambda p: SGD(p.values(), 0.1, momentum=0.9), lambda o: OneCycleLR(o, 0.1, 10))
    assert from_optimizer(made.optimizer, made.params)[0].momentum == pytest.approx(0.95)  # type: ignore[attr-defined]
    gradient = {name: torch.ones_like(leaf) for name, leaf in made.params.items()}
    for _ in range(3):
        made.descend(gradient, 1.0)
    update = from_optimizer(made.optimizer, made.params)[0]
    group = made.optimizer.param_groups[0]
    assert (update.lr, update.momentum) == (group["lr"], group["momentum"])  # type: ignore[attr-defined]
    assert 0.85 <= group["momentum"] < 0.86


def bilevel(schedule: Make) -> Trainer:
    problem, upper, lower = quadratic()
    optimizer = SGD(lower.values(), 0.01, momentum=0.9)
    return Trainer(
        problem,
        Level(upper, SGD(upper.values(), 0.1), [None]),
        Level(lower, optimizer, [None], scheduler=schedule(optimizer)),
        AlternatingSchedule(2, 3, 1),
    )


def test_a_cycle_that_ends_before_the_training_is_refused_before_the_first_step(tmp_path: Path) -> None:
    short = bilevel(lambda o: OneCycleLR(o, 0.1, 5))
    with pytest.raises(
        ValueError, match=r"^lower: scheduler: OneCycleLR ends after 5 more steps .*and 6 are to be made"
    ):
        short.run()
    assert short.steps == {"upper": 0, "lower": 0}
    bilevel(lambda o: OneCycleLR(o, 0.1, 6)).run()
    single(SCHEDULES["one cycle"], tmp_path).run()
    longer = single(SCHEDULES["one cycle"], tmp_path, steps=STEPS + 1)
    assert longer.resume(tmp_path)
    with pytest.raises(
        ValueError, match=r"^train: scheduler: OneCycleLR ends after 0 more steps .*and 1 are to be made"
    ):
        longer.run()


NESTED: dict[str, tuple[int, Make]] = {
    "chained": (5, lambda o: ChainedScheduler([LinearLR(o), OneCycleLR(o, 0.1, 5)], o)),
    "first of a sequence": (3, lambda o: SequentialLR(o, [OneCycleLR(o, 0.1, 3), LinearLR(o)], [5])),
    "last of a sequence": (6, lambda o: SequentialLR(o, [LinearLR(o), OneCycleLR(o, 0.1, 4)], [2])),
    "in the middle": (6, lambda o: SequentialLR(o, [LinearLR(o), OneCycleLR(o, 0.1, 4), LinearLR(o)], [2, 8])),
    "chained, in a sequence": (
        2,
        lambda o: SequentialLR(o, [ChainedScheduler([OneCycleLR(o, 0.1, 2)], o), LinearLR(o)], [6]),
    ),
    "long enough for its part": (
        STEPS,
        lambda o: SequentialLR(o, [LinearLR(o), OneCycleLR(o, 0.1, 3), LinearLR(o)], [2, 6]),
    ),
    "first, long enough": (STEPS, lambda o: SequentialLR(o, [OneCycleLR(o, 0.1, 3), LinearLR(o)], [4])),
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_cycle_within_another_schedule_that_ends_early_is_refused_before_the_first_step(kind: str) -> None:
    """The number of steps that torch itself can make is the one that is accepted, also from a later step on."""
    most, schedule = NESTED[kind]
    for made in range(3):
        one = level(lambda p: SGD(p.values(), 0.1, momentum=0.9), schedule)
        assert one.scheduler is not None
        for _ in range(made):
            one.optimizer.step()
            one.scheduler.step()
        one.check_planned(most - made)
        if most < STEPS:
            with pytest.raises(ValueError, match=rf"OneCycleLR ends after {most - made} more .*before the next mile"):
                one.check_planned(most - made + 1)
        one.optimizer.step()
        for _ in range(most - made):
            one.scheduler.step()
        if most < STEPS:
            with pytest.raises(ValueError, match="Tried to step"):
                one.scheduler.step()
