"""Training above fixed points, roots and constrained lower levels: lower steps, whole runs, resuming, refusals."""

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    AlternatingSchedule,
    Implicit,
    Level,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    Trainer,
    Unrolled,
)
from bilevel.hypergradients import SAMA, Method
from bilevel.linear import GMRES
from bilevel.lower import L1, FixedPointProblem, NonNegative, ProximalMap, ProximalProblem, RootProblem, Simplex
from bilevel.training import Callback
from tests.support.kinds.problems import EXACT, Cubic, Equilibrium, Line, Penalised, draw, f64, iterated

HESSIAN = (lambda a: a.T @ a / 8.0 + 0.3 * torch.eye(6, dtype=a.dtype))(draw(8, 6, seed=0))
LINEAR, TARGET, MIXING = 2.0 * draw(6, seed=1), draw(6, seed=2), draw(6, 3, seed=3)


class Events(Callback):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.records.append(record)


def penalised(make_map: Callable[[Params], ProximalMap]) -> Penalised:
    return Penalised(HESSIAN, LINEAR, TARGET, make_map, MIXING)


def trained(
    problem: Problem,
    upper: Params,
    lower: Params,
    *,
    lower_lr: float,
    upper_lr: float = 0.0,
    schedule: tuple[int, int, int] = (1, 250, 1),
    method: Method | Any = EXACT,
    events: Events | None = None,
    batches: tuple[Any, ...] = (1.0,),
    **options: Any,
) -> Trainer:
    x, y = ({name: leaf.clone() for name, leaf in level.items()} for level in (upper, lower))
    return Trainer(
        problem,
        Level(x, torch.optim.SGD(x.values(), lr=upper_lr), [None]),
        Level(y, torch.optim.SGD(y.values(), lr=lower_lr, **options), list(batches)),
        AlternatingSchedule(*schedule),
        method,
        callbacks=[] if events is None else [events],
        on_failure="ignore",
    )


MAPS: dict[str, Callable[[Params], ProximalMap]] = {
    "lasso": lambda x: L1(0.5),
    "non-negative": lambda x: NonNegative(),
    "simplex": lambda x: Simplex(),
}
SGD: dict[str, dict[str, Any]] = {
    "plain": {"lower_lr": 0.3},
    "momentum": {"lower_lr": 0.1, "momentum": 0.8},
    "damped momentum": {"lower_lr": 0.2, "momentum": 0.7, "dampening": 0.4},
    "nesterov": {"lower_lr": 0.1, "momentum": 0.6, "nesterov": True},
}


@pytest.mark.parametrize("sgd", SGD)
@pytest.mark.parametrize("kind", MAPS)
def test_proximal_steps_end_at_the_solution_whatever_the_momentum(kind: str, sgd: str) -> None:
    problem, x = penalised(MAPS[kind]), {"x": f64(0.3, -0.2, 0.1)}
    expected = problem.solve(x, {"y": torch.zeros(6, dtype=torch.float64)})["y"]
    trainer = trained(problem, x, {"y": draw(6, seed=7)}, **SGD[sgd])
    trainer.run()
    assert torch.allclose(trainer.lower.params["y"], expected, atol=1e-10)
    assert torch.equal(trainer.lower.params["y"] == 0.0, expected == 0.0)
    assert not trainer.failures


def test_fixed_points_are_iterated_plainly_or_damped_and_the_loss_is_the_residual() -> None:
    problem, x, start = Equilibrium(), {"x": f64(0.4, -1.0, 0.7)}, {"y": draw(5, seed=4)}
    events = Events()
    plain = trained(problem, x, start, lower_lr=1.0, schedule=(1, 3, 0), events=events)
    plain.run()
    assert torch.allclose(plain.lower.params["y"], iterated(problem, x, start, [1.0], 3)["y"], atol=1e-15)
    losses = [record["loss"] for record in events.records if record["event"] == "lower"]
    ys = [iterated(problem, x, start, [1.0], count) for count in range(3)]
    assert losses == pytest.approx([float(problem.residual(x, y, 1.0)["y"].norm()) for y in ys], rel=1e-12)
    # y = x - 2 y needs damping: 1 - 0.3 (1 + 2) = 0.1 a step.
    line = trained(Line(-2.0), {"x": f64(3.0)}, {"y": f64(0.0)}, lower_lr=0.3, schedule=(1, 20, 1))
    line.run()
    assert line.lower.params["y"] == pytest.approx(1.0, abs=1e-14)
    root = trained(Cubic(), {"x": f64(2.0)}, {"y": f64(0.0)}, lower_lr=0.2, schedule=(1, 100, 1))
    root.run()
    assert root.lower.params["y"] == pytest.approx(1.0, abs=1e-12)
    assert not line.failures + root.failures


CASES: dict[str, tuple[Problem, Params, Params, dict[str, Any]]] = {
    "non-negative": (
        Penalised(HESSIAN, LINEAR, draw(6, seed=6), MAPS["non-negative"], MIXING),
        {"x": f64(0.3, -0.2, 0.1)},
        {"y": torch.zeros(6, dtype=torch.float64)},
        {"lower_lr": 0.3, "upper_lr": 0.3, "momentum": 0.3},
    ),
    "weight of a lasso": (
        Penalised(HESSIAN, LINEAR, 0.5 * TARGET, lambda x: L1(x["weight"].exp())),
        {"weight": torch.tensor(-2.0, dtype=torch.float64)},
        {"y": torch.zeros(6, dtype=torch.float64)},
        {"lower_lr": 0.3, "upper_lr": 0.3},
    ),
    "equilibrium": (
        Equilibrium(),
        {"x": f64(0.4, -1.0, 0.7)},
        {"y": torch.zeros(5, dtype=torch.float64)},
        {"lower_lr": 1.0, "upper_lr": 0.2},
    ),
    "root": (
        Cubic(),
        {"x": f64(2.0, -1.0)},
        {"y": torch.zeros(2, dtype=torch.float64)},
        {"lower_lr": 0.15, "upper_lr": 0.2},
    ),
}


def exact_gradient(problem: Problem, x: Params) -> Tensor:
    """dF/dx of the re-solved lower level by central differences."""

    def value(point: Tensor) -> float:
        upper = {next(iter(x)): point}
        if isinstance(problem, Penalised):
            lower = problem.solve(upper, {"y": torch.zeros(6, dtype=torch.float64)}, steps=300)
        elif isinstance(problem, Cubic):
            lower = problem.solve(upper)
        else:
            assert isinstance(problem, Equilibrium)
            lower = iterated(problem, upper, {"y": torch.zeros(5, dtype=torch.float64)}, [1.0], 200)
        return float(problem.upper_objective(upper, lower, None))

    (flat,) = x.values()
    steps = 1e-5 * torch.eye(flat.numel(), dtype=flat.dtype).reshape(-1, *flat.shape)
    return torch.tensor([(value(flat + h) - value(flat - h)) / 2e-5 for h in steps])


@pytest.mark.parametrize("kind", CASES)
def test_hypergradient_descent_ends_at_a_minimum_of_the_upper_level(kind: str) -> None:
    problem, x, y, rates = CASES[kind]
    trainer = trained(problem, x, y, **rates, schedule=(130, 12, 1))
    trainer.run()
    before, after = (float(exact_gradient(problem, point).norm()) for point in (x, trainer.upper.params))
    assert after < 1e-3 * before


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("stopped", [1, 3])
def test_a_resumed_training_is_the_same_bit_for_bit(kind: str, stopped: int) -> None:
    problem, x, y, rates = CASES[kind]
    options: dict[str, Any] = {**rates, "schedule": (5, 4, 2), "batches": (0.9, 1.1, 1.3)}
    whole_events, events = Events(), Events()
    whole = trained(problem, x, y, **options, events=whole_events)
    whole.run()
    first = trained(problem, x, y, **options, events=events)
    for _ in range(stopped):
        first.advance()
    second = trained(problem, x, y, **options, events=events)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run()
    for own, other in ((second.upper, whole.upper), (second.lower, whole.lower)):
        assert all(torch.equal(leaf, other.params[name]) for name, leaf in own.params.items())
    assert _told(events) == _told(whole_events)


def _told(events: Events) -> list[Mapping[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "waiting")} for r in events.records]


def test_changes_of_the_active_set_are_reported() -> None:
    problem = Penalised(HESSIAN, LINEAR, TARGET, lambda x: L1(x["weight"].exp()))
    weight, y, supports, events = torch.tensor(-3.0, dtype=torch.float64), torch.zeros(6), [], Events()
    trainer = trained(problem, {"weight": weight}, {"y": y.double()}, lower_lr=0.3, schedule=(6, 200, 1), events=events)
    for _ in range(6):
        trainer.advance()
        supports.append(trainer.lower.params["y"].sign())
        trainer.upper.params["weight"].data.add_(0.8)
    told = [record["active_changes"] for record in events.records if record["event"] == "upper"]
    # A number that becomes 0 changes one of its two distances from the kinks, by the side that it comes from.
    changed = [int((now - before).abs().sum()) for before, now in pairwise(supports)]
    assert told == [None, *changed]
    assert sum(changed) > 0


class Rows(ProximalProblem):
    """A non-negative least squares problem in two parts, for micro-batches."""

    step_size = 0.3

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return batch[:, :3] @ lower["y"] - upper["x"] * batch[:, 3]

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
        return 0.5 * outputs.square().mean()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return lower["y"].sum()

    def proximal_map(self, upper: Params) -> ProximalMap:
        return NonNegative()


def test_micro_batches_of_a_proximal_problem_are_those_of_its_smooth_part() -> None:
    rows, ends = draw(10, 4, seed=12), []
    for micro_batch in (None, 3):
        y: Params = {"y": torch.zeros(3, dtype=torch.float64)}
        lower = Level(y, torch.optim.SGD(y.values(), lr=0.3, momentum=0.5), [rows], micro_batch=micro_batch)
        x = {"x": torch.ones(1, dtype=torch.float64)}
        upper = Level(x, torch.optim.SGD(x.values(), lr=0.0), [None])
        Trainer(Rows(), upper, lower, AlternatingSchedule(1, 60, 0)).run()
        ends.append(y["y"])
    assert torch.allclose(ends[0], ends[1], rtol=1e-12)
    active = ends[0] == 0.0
    assert bool(active.any())
    assert not bool(active.all())


class Deaf(Line):
    """Has lower outputs, which a fixed point does not need."""

    def lower_outputs(self, upper: Params, lower: Params, batch: Any) -> Any:
        return lower["y"]


def refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def level(params: Params, optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Level:
    limits = {name: options.pop(name) for name in ("max_grad_norm", "micro_batch") if name in options}
    return Level(params, optimizer(list(params.values()), **options), [1.0], **limits)


def test_what_would_not_end_at_the_solution_is_refused_by_name() -> None:
    problem, x = penalised(MAPS["lasso"]), {"x": f64(0.3, -0.2, 0.1)}

    def trainer(lower: Level, problem: Problem = problem, method: Method | Any = EXACT) -> Trainer:
        upper = {name: leaf.clone() for name, leaf in x.items()}
        return Trainer(problem, level(upper, torch.optim.SGD, lr=0.1), lower, AlternatingSchedule(1, 1, 1), method)

    y: Params = {"y": torch.zeros(6, dtype=torch.float64)}
    for optimizer in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.AdamW):
        refused(lambda o=optimizer: trainer(level(y, o, lr=0.1)), rf"lower: {optimizer.__name__} scales every entry")
    refused(lambda: trainer(level(y, torch.optim.SGD, lr=0.1, max_grad_norm=1.0)), "lower: max_grad_norm=1 shortens")
    refused(lambda: trainer(level(y, torch.optim.SGD, lr=0.1, momentum=1.0)), "momentum=1 never forgets")
    two: Params = {"y": torch.zeros(6, dtype=torch.float64), "z": torch.zeros(2, dtype=torch.float64)}
    groups = torch.optim.SGD([{"params": [two["y"]]}, {"params": [two["z"]], "lr": 0.2}], lr=0.1)
    refused(lambda: trainer(Level(two, groups, [1.0])), "parameter groups differ in lr, momentum or dampening")
    one: Params = {"y": f64(0.0, 0.0, 0.0)}
    chunked = level(one, torch.optim.SGD, lr=0.1, micro_batch=2)
    refused(lambda: trainer(chunked, Deaf(0.5)), "lower: micro_batch=2 cuts the batch of a lower objective")
    refused(lambda: trainer(level(one, torch.optim.SGD, lr=0.1), Line(0.5), CG()), "CG needs a symmetric operator")
    for method in (Unrolled(), OneStep(0.1), SAMA(), Penalty(SGDUpdate(0.1), 10.0)):
        for which, variables in ((problem, y), (Line(0.5), one)):
            refused(
                lambda p=which, v=variables, m=method: trainer(level(v, torch.optim.SGD, lr=0.1), p, m),
                rf"{type(method).__name__} differentiates the smooth minimum",
            )


def test_any_optimizer_serves_a_fixed_point_and_the_default_method_is_gmres() -> None:
    x, y = {"x": f64(3.0)}, {"y": f64(0.0)}
    trainer = Trainer(
        Line(0.5),
        level(x, torch.optim.SGD, lr=0.0),
        level(y, torch.optim.Adam, lr=0.05),
        AlternatingSchedule(1, 900, 1),
    )
    trainer.run()
    assert y["y"] == pytest.approx(6.0, abs=1e-3)
    assert isinstance(trainer.method, Implicit)
    assert isinstance(trainer.method.solver, GMRES)
    assert trainer.solves == {"CONVERGED": 1}
    assert issubclass(FixedPointProblem, Problem)
    assert not RootProblem.symmetric


def test_a_schedule_that_parts_the_groups_rates_is_refused() -> None:
    """The map after a step has one length, and groups of other rates would end at the solution of another problem."""
    x, y = {"x": f64(0.3, -0.2, 0.1)}, {"y": torch.zeros(6, dtype=torch.float64)}
    y["z"] = torch.zeros(2, dtype=torch.float64)
    optimizer = torch.optim.SGD([{"params": [y["y"]]}, {"params": [y["z"]]}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1.0 / (step + 1)])

    class Both(Penalised):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return super().lower_objective(upper, lower, batch) + (lower["z"] - 2.0).square().sum()

    problem = Both(HESSIAN, LINEAR, TARGET, lambda upper: L1(0.1), MIXING)
    lower = Level(y, optimizer, [1.0], scheduler=schedule)
    trainer = Trainer(problem, level(x, torch.optim.SGD, lr=0.1), lower, AlternatingSchedule(1, 3, 0), EXACT)
    refused(trainer.run, "parameter groups differ in lr")
