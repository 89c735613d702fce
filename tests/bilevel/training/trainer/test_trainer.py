"""The alternating loop against one written out by hand."""

import itertools
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, AlternatingSchedule, BatchStack, Implicit, Level, Params, Trainer
from bilevel.linear import Dense
from bilevel.products import ReverseOverReverse
from bilevel.training import BatchSource, Callback, NonFiniteError, SingleLevelTrainer, gradient_of
from tests.support.cases import joined
from tests.support.problems.small_net import DATA, Net
from tests.support.problems.two_heads import (
    DAMPING,
    GAMMA,
    LAMBDA,
    LIMIT,
    LOWER_BATCHES,
    LOWER_MOMENTUM,
    LOWER_RATE,
    SCHEDULE,
    UPPER_BATCHES,
    UPPER_MOMENTUM,
    UPPER_RATE,
    K,
    TwoHeads,
    implicit,
    inverse,
    make,
    variables,
)


class ByHand:
    """Algorithm 1, written out: SGD with momentum, 1/k learning rates, the formulas of the quadratic problem."""

    def __init__(self) -> None:
        upper, lower = variables()
        self.x, self.y = joined(upper), joined(lower)
        self.momentum = {"x": torch.zeros(5, dtype=torch.float64), "y": torch.zeros(5, dtype=torch.float64)}
        self.steps = {"x": 0, "y": 0}

    def descend(self, name: str, gradient: Tensor, rate: float, decay: float) -> None:
        norm = gradient.norm()
        if norm > LIMIT:
            gradient = gradient * (LIMIT / norm)
        self.momentum[name] = decay * self.momentum[name] + gradient
        rate = rate / (1 + self.steps[name])
        setattr(self, name, getattr(self, name) - rate * self.momentum[name])
        self.steps[name] += 1

    def lower_step(self, batch: tuple[Tensor, Tensor]) -> None:
        pull = torch.cat([self.y[:3] - self.x[:3], torch.zeros(2, dtype=torch.float64)])
        self.descend("y", batch[0] @ self.y - batch[1] + LAMBDA * pull, LOWER_RATE, LOWER_MOMENTUM)

    def upper_step(self, stored: list[tuple[Tensor, Tensor]], target: Tensor) -> None:
        hessian = torch.stack([matrix[:3, :3] for matrix, _ in stored]).mean(dim=0)
        scale = self.x[3:].sum()

        def parts(backbone: Tensor) -> tuple[Tensor, Tensor]:
            error = backbone * scale - target
            return error * scale, (error @ backbone) + 0.2 * self.x[3:]

        v, head = parts(self.y[:3])
        own, own_head = parts(self.x[:3])
        system = torch.eye(3, dtype=torch.float64) + hessian / (LAMBDA + DAMPING)
        gradient = torch.cat([torch.linalg.solve(system, v) + GAMMA * own, head + GAMMA * own_head])
        self.descend("x", gradient, UPPER_RATE, UPPER_MOMENTUM)

    def run(self, trainer: Trainer, check: Any, *, fresh: bool = False) -> None:
        lower_data, upper_data = itertools.cycle(LOWER_BATCHES), itertools.cycle(UPPER_BATCHES)
        for t in range(1, SCHEDULE.alternations + 1):
            batches = [next(lower_data) for _ in range(SCHEDULE.lower_steps)]
            for batch in batches:
                self.lower_step(batch)
            if t % 2 == 0:
                self.x[:3] = 0.75 * self.x[:3] + 0.25 * self.y[:3]
            stored = [next(lower_data) for _ in range(K)] if fresh else batches[:K]
            for _ in range(SCHEDULE.upper_steps):
                self.upper_step(stored, next(upper_data))
            trainer.advance()
            check()


@pytest.mark.parametrize("fresh", [False, True], ids=["first batches", "fresh batches"])
@pytest.mark.parametrize("solver", [Dense(), CG(20, rtol=1e-14)], ids=["dense", "cg"])
def test_algorithm_1_step_for_step(solver: Any, fresh: bool) -> None:
    trainer = make(method=implicit(solver, fresh_batches=fresh))
    for level in trainer.levels.values():
        level.scheduler = torch.optim.lr_scheduler.LambdaLR(level.optimizer, inverse)
    reference = ByHand()

    def check() -> None:
        torch.testing.assert_close(joined(trainer.upper.params), reference.x, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(joined(trainer.lower.params), reference.y, rtol=1e-11, atol=1e-12)

    check()
    reference.run(trainer, check, fresh=fresh)
    assert (trainer.progress, trainer.steps) == (5, {"lower": 20, "upper": 15})
    assert float((reference.x - joined(variables()[0])).norm()) > 0.1


def test_a_curvature_that_depends_on_the_upper_variables_is_linearized_at_every_step() -> None:
    class Dependent(TwoHeads):
        curvature_depends_on_upper = True

    one, other = make(), make(Dependent())
    one.run()
    other.run()
    torch.testing.assert_close(joined(other.upper.params), joined(one.upper.params), rtol=1e-12, atol=0.0)


class Listener(Callback):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def on_run_start(self, trainer: Any) -> None:
        self.log.append("start")

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.log.append((record["event"], record["alternation"], record["step"]))

    def on_progress(self, trainer: Any) -> None:
        self.log.append(("end", trainer.progress))

    def on_run_end(self, trainer: Any) -> None:
        self.log.append("stop")


class Hooked(TwoHeads):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def after_lower_step(self, upper: Params, lower: Params, step: int) -> None:
        self.log.append(("after lower", step, lower["backbone"].clone()))

    def after_upper_step(self, upper: Params, lower: Params, batch: Any, step: int) -> None:
        assert any(batch is one for one in UPPER_BATCHES)
        self.log.append(("after upper", step))

    def reset_lower(self, upper: Params) -> Params | None:
        self.log.append("reset")
        return None


def test_hooks_and_events_come_in_order() -> None:
    log: list[Any] = []
    schedule = AlternatingSchedule(2, 2, 1, 2, 0.5, {"backbone": "backbone"})
    trainer = make(Hooked(log), schedule=schedule, callbacks=[Listener(log)])
    trainer.run()
    moved = [entry[2] for entry in log if entry[0] == "after lower"]
    assert not torch.equal(moved[0], moved[1]), "the hook sees the variables after the step"
    assert [entry[:2] if entry[0] == "after lower" else entry for entry in log] == [
        *("start", "reset"),
        *(("after lower", 1), ("lower", 1, 1), ("after lower", 2), ("lower", 1, 2)),
        *(("after upper", 1), ("upper", 1, 1), ("alternation", 1, 1), ("end", 1)),
        *("reset", ("after lower", 3), ("lower", 2, 3), ("after lower", 4), ("lower", 2, 4)),
        *(("adaptation", 2, 4), ("after upper", 2), ("upper", 2, 2), ("alternation", 2, 2), ("end", 2)),
        "stop",
    ]


def test_callbacks_hear_of_the_end_after_an_error_too() -> None:
    log: list[Any] = []
    bad = [(LOWER_BATCHES[0][0], torch.full((5,), math.nan, dtype=torch.float64))]
    with pytest.raises(NonFiniteError):
        make(lower_data=bad, callbacks=[Listener(log)]).run()
    assert log == ["start", "stop"]


def test_reset_lower_restarts_the_lower_level() -> None:
    class Restarting(TwoHeads):
        def reset_lower(self, upper: Params) -> Params:
            return {"backbone": upper["backbone"], "head": torch.ones(2, dtype=torch.float64)}

    schedule = AlternatingSchedule(3, 1, 0)
    trainer = make(Restarting(), schedule=schedule, limit=None)
    for _ in range(3):
        trainer.advance()
        matrix, linear = LOWER_BATCHES[trainer.steps["lower"] - 1]
        start = torch.cat([trainer.upper.params["backbone"], torch.ones(2, dtype=torch.float64)])
        # The proximal term is 0 at the restart, and so is the momentum.
        expected = start - LOWER_RATE * (matrix @ start - linear)
        torch.testing.assert_close(joined(trainer.lower.params), expected, rtol=1e-13, atol=0.0)


def test_records_carry_the_numbers_of_the_step() -> None:
    records: list[dict[str, Any]] = []

    class Keep(Callback):
        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            records.append(dict(record))

    trainer = make(callbacks=[Keep()], schedule=AlternatingSchedule(1, 1, 1))
    problem, (upper, lower) = TwoHeads(), variables()
    trainer.run()
    first, step, last = records
    y = {name: leaf.clone().requires_grad_() for name, leaf in lower.items()}
    loss = problem.lower_objective(upper, y, LOWER_BATCHES[0])
    total = loss + LAMBDA * problem.regularizer(upper, y)
    norm = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(y.values()))]).norm()
    assert first == {
        **{"event": "lower", "step": 1, "alternation": 1, "lr": LOWER_RATE},
        **{"loss": pytest.approx(float(loss.detach())), "grad_norm": pytest.approx(float(norm))},
    }
    assert (step["status"], step["num_hvps"], step["iterations"]) == ("CONVERGED", 4, 1)
    assert step["residual"] < 1e-14
    assert 0.0 < step["relative_change"] < 1.0
    assert 0.9 < step["cosine"] <= 1.0
    assert step["min_curvature"] > 1.0
    assert step["stationarity"] > 0.0
    assert last["seconds"] > 0.0
    assert 0.0 <= last["waiting"] <= 1.0
    json.dumps(records, allow_nan=False)


def test_lower_steps_may_be_fewer_than_hessian_batches() -> None:
    loaded: list[Tensor] = []

    def load(indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        loaded.append(indices)
        return LOWER_BATCHES[int(indices[0])]

    trainer = make(lower_data=BatchStack(7, 1, load, seed=0), schedule=AlternatingSchedule(2, 1, 1))
    trainer.run()
    assert len(loaded) == 2 * K
    assert len({int(indices[0]) for indices in loaded[:K]}) == K
    assert len({int(indices[0]) for indices in loaded[K:]}) == K


@pytest.mark.parametrize("lower_steps", [0, 1, 4])
def test_fresh_batches_are_those_after_the_steps_and_the_stage_announces_them(lower_steps: int) -> None:
    loaded: list[int] = []
    seen: list[list[int]] = []

    def load(indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        loaded.append(int(indices[0]))
        return LOWER_BATCHES[int(indices[0])]

    class Seen(Callback):
        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            if record["event"] == "upper":
                found = trainer._now.stored
                seen.append([next(i for i, batch in enumerate(LOWER_BATCHES) if batch is one) for one in found])

    announced: list[int] = []
    stack = BatchStack(7, 1, load, seed=0)
    begin = stack.begin_stage
    stack.begin_stage = lambda steps: (announced.append(steps), begin(steps))[1]  # type: ignore[method-assign]
    schedule = AlternatingSchedule(2, lower_steps, 2)
    make(None, implicit(fresh_batches=True), lower_data=stack, schedule=schedule, callbacks=[Seen()]).run()
    each = lower_steps + K
    assert announced == [each, each]
    assert len(loaded) == 2 * each
    stages = [loaded[:each], loaded[each:]]
    # Both upper steps see the same ones, none of which a lower step of the stage has seen.
    assert seen == [stage[lower_steps:] for stage in stages for _ in range(2)]
    assert all(len(set(stage)) == each for stage in stages)


def test_without_upper_steps_no_fresh_batch_is_drawn() -> None:
    loaded: list[int] = []

    def load(indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        loaded.append(int(indices[0]))
        return LOWER_BATCHES[int(indices[0])]

    stack = BatchStack(7, 1, load, seed=0)
    make(None, implicit(fresh_batches=True), lower_data=stack, schedule=AlternatingSchedule(2, 3, 0)).run()
    assert len(loaded) == 6


def test_trained_variables_may_be_a_modules_own_parameters() -> None:
    problem = Net()
    lower: Params = dict(problem.net.named_parameters())
    upper = {name: p.detach().clone() for name, p in lower.items()}
    before = {name: p.detach().clone() for name, p in lower.items()}
    trainer = Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [DATA]),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.1), [DATA]),
        AlternatingSchedule(2, 2, 2),
        Implicit(CG(2, rtol=None), hvp=ReverseOverReverse(keep_graph=True), damping=1.0),
    )
    trainer.run()
    assert all(not torch.equal(lower[name], before[name]) for name in ("0.weight", "4.bias"))
    assert all(p is lower[name] for name, p in problem.net.named_parameters())
    # Four lower steps and their targets; no pass of the upper level counts.
    assert int(problem.net.get_buffer("1.num_batches_tracked")) == 8


def test_the_share_of_time_spent_waiting_for_data_is_known() -> None:
    class Slow(BatchSource):
        def begin_stage(self, steps: int) -> None:
            return None

        def next(self) -> Tensor:
            time.sleep(0.02)
            return torch.ones(2)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            return None

    weight = torch.zeros(2, requires_grad=True)
    level = Level({"w": weight}, torch.optim.SGD([weight], lr=0.1), Slow())
    training = SingleLevelTrainer(gradient_of(lambda batch: ((weight - batch) ** 2).sum(), {"w": weight}), level, 5)
    training.run()
    assert level.waited == training.waited >= 5 * 0.02
    assert 0.0 < training.waiting <= 1.0
