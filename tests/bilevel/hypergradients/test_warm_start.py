"""Solves that start from the last one's solution: only where it helps, and at the price of one product."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    MINRES,
    AlternatingSchedule,
    Identity,
    Implicit,
    Level,
    Neumann,
    Params,
    Problem,
    Status,
    Trainer,
    linearize,
)
from bilevel.hypergradients import MethodState, Proposal, System, UpperStep
from bilevel.linear import ApproximateInverse, Dense, Escalating, Nystrom, NystromPreconditioner, Solver
from bilevel.training import Callback
from tests.support.cases import BY_NAME, Case, Counting, dense, joined, vector

CASE = BY_NAME["well-conditioned"]
ITERATIVE: list[Solver] = [
    CG(3, None),
    CG(20, 1e-8),
    CG(3, None, layerwise=True),
    CG(3, None, recycle=2),
    CG(3, None, preconditioner=NystromPreconditioner(3)),
    MINRES(3, None),
    MINRES(20, 1e-8),
    Neumann(3),
    Neumann(3, rtol=None, scale=0.2),
    Nystrom(4),
    Escalating(CG(20, 1e-8)),
]
WITHOUT_START: list[Solver] = [Dense(), Identity(), ApproximateInverse(lambda b: b), Escalating(Dense())]


def name_of(solver: Any) -> str:
    return str(solver).split(" at ")[0]


class Linear(Problem):
    """``L = 1/2 y'Ay - x'y`` and ``F = batch'y``: the right-hand side is the upper batch."""

    curvature_depends_on_upper = False

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        y = joined(lower)
        return 0.5 * y @ CASE.matrix @ y - joined(upper) @ y

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return batch @ joined(lower)


def counted_system(solver: Solver) -> tuple[System, Counting]:
    """A system whose operator takes note of what it is asked for."""
    torch.manual_seed(0)
    point = CASE.split(torch.zeros(8, dtype=torch.float64))
    system = linearize(Linear(), {"x": vector(8, 5)}, point, [None], solver=solver)
    system.operator = operator = dense(CASE.matrix, CASE.split)
    return system, operator


def near() -> Params:
    return CASE.split(CASE.solution() + 0.1 * vector(8, 3))


def far() -> Params:
    return CASE.split(CASE.solution() + 100.0 * vector(8, 3))


@pytest.mark.parametrize("solver", ITERATIVE, ids=name_of)
def test_a_product_that_is_known_is_not_made_again(solver: Solver) -> None:
    found = []
    for known in (False, True):
        torch.manual_seed(0)
        operator = dense(CASE.matrix, CASE.split)
        product = CASE.split(CASE.matrix @ joined(near())) if known else None
        solution = solver.solve(operator, CASE.b, x0=near(), x0_product=product)
        found.append((joined(solution.value), solution.num_hvps, solution.residual_norms, len(operator.asked)))
    (value, hvps, residuals, made), (value_known, hvps_known, residuals_known, made_known) = found
    assert torch.equal(value, value_known)
    assert (hvps, residuals) == (hvps_known, residuals_known)
    assert made_known == made - 1


@pytest.mark.parametrize("solver", ITERATIVE, ids=name_of)
def test_a_start_is_used_where_it_is_closer_than_zero(solver: Solver) -> None:
    plain = counted_system(solver)[0].solve(CASE.b, x0=near())
    system, operator = counted_system(solver)
    before = len(operator.asked)
    solution = system.solve(CASE.b, x0=near(), only_if_closer=True)
    assert torch.equal(joined(solution.value), joined(plain.value))
    assert solution.num_hvps == plain.num_hvps
    assert solution.residual_norms[0] < 1.0
    asked = operator.asked[before:]
    # The product that decided is the solve's first one, and is made once.
    assert torch.equal(asked[0], joined(near()))
    ratios = [vector / asked[0] for vector in asked[1:]]
    assert not any(torch.allclose(ratio, ratio[0].expand(8), rtol=1e-9) for ratio in ratios)


@pytest.mark.parametrize("solver", ITERATIVE, ids=name_of)
def test_a_start_that_is_farther_than_zero_costs_one_product_and_changes_nothing(solver: Solver) -> None:
    plain = counted_system(solver)[0].solve(CASE.b)
    system, operator = counted_system(solver)
    solution = system.solve(CASE.b, x0=far(), only_if_closer=True)
    assert torch.equal(joined(solution.value), joined(plain.value))
    assert solution.residual_norms == plain.residual_norms
    assert solution.num_hvps == plain.num_hvps + 1
    assert torch.equal(operator.asked[0], joined(far()))


@pytest.mark.parametrize("solver", WITHOUT_START, ids=name_of)
@pytest.mark.parametrize("start", [near, far])
def test_a_solver_without_use_for_a_start_makes_no_product_for_it(solver: Solver, start: Any) -> None:
    assert not solver.uses_start
    plain, asked = counted_system(solver)
    reference = plain.solve(CASE.b)
    system, operator = counted_system(solver)
    solution = system.solve(CASE.b, x0=start(), only_if_closer=True)
    assert torch.equal(joined(solution.value), joined(reference.value))
    assert solution.num_hvps == reference.num_hvps
    assert len(operator.asked) == len(asked.asked)


@pytest.mark.parametrize("solver", [CG(20, 1e-8), Escalating(CG(20, 1e-8)), Nystrom(4)], ids=name_of)
def test_the_number_of_products_is_that_of_the_operator(solver: Solver) -> None:
    for start in (near, far):
        operator = dense(CASE.matrix, CASE.split)
        system, _ = counted_system(solver)
        system.operator, system.state = operator, solver.prepare(operator)
        assert system.solve(CASE.b, x0=start(), only_if_closer=True).num_hvps == len(operator.asked)


def step_at(target: Tensor, *, position: int = 0, count: int = 2) -> UpperStep:
    lower = CASE.split(torch.zeros(8, dtype=torch.float64))
    return UpperStep(
        *(Linear(), {"x": vector(8, 5)}, lower, target, (None,)), upper_rate=0.1, position=position, count=count
    )


def propose(method: Implicit, target: Tensor, state: MethodState) -> Proposal:
    step = step_at(target)
    return method.propose(step, state, method.prepare(step, state))


def test_the_solution_is_carried_and_the_next_solve_starts_from_it() -> None:
    method = Implicit(CG(20, 1e-8), warm_start=True)
    first = propose(method, CASE.right, {})
    assert first.result is not None
    assert first.result.solution is not None
    torch.testing.assert_close(first.state["start"], first.result.solution.value, rtol=0.0, atol=0.0)
    again = propose(method, CASE.right, first.state)
    assert again.result is not None
    assert again.result.solution is not None
    assert again.result.solution.iterations == 0
    assert torch.equal(joined(again.gradient), joined(first.gradient))
    cold = propose(Implicit(CG(20, 1e-8)), CASE.right, first.state)
    assert cold.result is not None
    # A method without warm start neither takes nor keeps one.
    assert "start" not in cold.state


def test_a_start_for_the_opposite_right_hand_side_is_not_used() -> None:
    method = Implicit(CG(4, None), warm_start=True)
    first = propose(method, CASE.right, {})
    opposite = propose(method, -CASE.right, first.state)
    cold = propose(method, -CASE.right, {})
    assert opposite.result is not None
    assert cold.result is not None
    assert opposite.result.solution is not None
    assert cold.result.solution is not None
    assert torch.equal(joined(opposite.gradient), joined(cold.gradient))
    assert opposite.result.solution.num_hvps == cold.result.solution.num_hvps + 1


@pytest.mark.parametrize(
    ("solver", "status", "kept"),
    [(CG(1, 1e-12), Status.NOT_CONVERGED, True), (Neumann(5, None, 10.0), Status.DIVERGED, False)],
)
def test_what_a_breakdown_left_is_not_kept(solver: Solver, status: Status, kept: bool) -> None:
    good = propose(Implicit(CG(20, 1e-8), warm_start=True), CASE.right, {}).state
    for before in ({}, {"start": {name: -leaf for name, leaf in good["start"].items()}}):
        proposal = propose(Implicit(solver, warm_start=True), CASE.right, before)
        assert proposal.result is not None
        assert proposal.result.solution is not None
        assert proposal.result.solution.status is status
        assert ("start" in proposal.state) is kept


def test_the_next_solve_of_other_variables_starts_from_nothing() -> None:
    method = Implicit(CG(4, None), warm_start=True)
    state = {"start": {"others": vector(8, 3)}}
    cold, other = propose(method, CASE.right, {}), propose(method, CASE.right, state)
    assert torch.equal(joined(cold.gradient), joined(other.gradient))
    assert torch.equal(joined(other.state["start"]), joined(cold.state["start"]))


def test_an_aggregated_solve_carries_its_solution_in_the_units_of_one_step() -> None:
    """The sum over two steps of the same right-hand side at one rate is twice the solution; what is kept is one."""
    method = Implicit(CG(20, 1e-10), warm_start=True, aggregate=True)
    step, last = step_at(CASE.right), step_at(CASE.right, position=1)
    prepared = method.prepare(step, {})
    waiting = method.propose(step, {}, prepared)
    assert waiting.result is None
    made = method.propose(last, waiting.state, prepared)
    assert made.result is not None
    assert made.result.solution is not None
    assert made.norm_limit_scale == pytest.approx(2.0)
    torch.testing.assert_close(joined(made.result.solution.value), 2.0 * CASE.solution(), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(joined(made.state["start"]), CASE.solution(), rtol=1e-8, atol=0.0)
    # The next alternation's solve of the same sum starts at its solution.
    waiting = method.propose(step, made.state, prepared)
    assert torch.equal(joined(waiting.state["start"]), joined(made.state["start"]))
    again = method.propose(last, waiting.state, prepared)
    assert again.result is not None
    assert again.result.solution is not None
    assert again.result.solution.iterations == 0


class Resetting(Linear):
    """Starts the lower level anew in the alternations that are asked for."""

    def __init__(self, resets: tuple[int, ...] = ()) -> None:
        self.resets, self.alternation = resets, 0

    def reset_lower(self, upper: Params) -> Params | None:
        self.alternation += 1
        return CASE.split(torch.zeros(8, dtype=torch.float64)) if self.alternation in self.resets else None


@pytest.mark.parametrize("resets", [(), (2,)])
def test_a_trainer_carries_it_from_alternation_to_alternation_until_the_lower_level_starts_anew(
    resets: tuple[int, ...],
) -> None:
    x, y = {"x": vector(8, 5)}, CASE.split(torch.zeros(8, dtype=torch.float64))
    above = Level(x, torch.optim.SGD(x.values(), lr=0.1), [CASE.right])
    below = Level(y, torch.optim.SGD(y.values(), lr=0.1), [None])
    iterations: list[int] = []

    class Listener(Callback):
        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            if record["event"] == "upper":
                iterations.append(record["iterations"])

    method, schedule = Implicit(CG(20, 1e-8), warm_start=True), AlternatingSchedule(3, 1, 1)
    trainer = Trainer(Resetting(resets), above, below, schedule, method, callbacks=[Listener()])
    trainer.run()
    # The right-hand side stays, so that a solve that starts at its solution has nothing to do.
    assert [count > 0 for count in iterations] == [True, bool(resets), False]


def test_a_case_is_what_these_tests_take_it_for() -> None:
    """The near start is closer than zero, the far one is not."""
    case: Case = CASE
    norms = [float((case.right - case.matrix @ joined(start())).norm()) / case.length for start in (near, far)]
    assert norms[0] < 0.5
    assert norms[1] > 2.0
