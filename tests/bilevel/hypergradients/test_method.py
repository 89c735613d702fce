"""What all methods have in common: what stands for one, what a step leaves alone, and one of the user's own."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    AlternatingSchedule,
    Implicit,
    Level,
    Method,
    Neumann,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    SolverError,
    SolverWarning,
    Status,
    Trainer,
    Unrolled,
    check_hypergradient,
    hypergradient,
)
from bilevel.hypergradients import (
    SAMA,
    AdamUpdate,
    Hypergradient,
    LowerStep,
    MethodState,
    Proposal,
    UpperStep,
    as_method,
)
from bilevel.products import Automatic, ReverseOverReverse
from tests.support.by_hand import BATCHES, UPPER_BATCH, Smooth, smooth
from tests.support.cases import joined, vector
from tests.support.problems.closed_forms import proximal_point, quadratic, relative_error, run

NO_METHODS: list[tuple[Any, str]] = [
    ("cg", "got 'cg'"),
    (CG, "got the class CG"),
    (Implicit, "got the class Implicit"),
    (0.1, r"got 0\.1"),
    (SGDUpdate(0.1), r"got SGDUpdate\(lr=0\.1"),
]


def test_a_solver_stands_for_the_implicit_method_and_nothing_for_its_default() -> None:
    solver, method = Neumann(3), OneStep(0.1)
    found = as_method(solver)
    assert isinstance(found, Implicit)
    assert found.solver is solver
    assert as_method(method) is method
    default = as_method(None)
    assert isinstance(default, Implicit)
    assert default.solver == CG()


@pytest.mark.parametrize(("given", "shown"), NO_METHODS, ids=[shown for _, shown in NO_METHODS])
def test_what_is_no_method_is_refused_wherever_one_is_taken(given: Any, shown: str) -> None:
    problem, upper, lower = proximal_point()
    data, match = [None], rf"method must be a Method such as Implicit\(CG\(\)\).*or a solver such as CG\(\), {shown}"
    above, below = (Level(x, torch.optim.SGD(x.values(), lr=0.1), data) for x in (upper, lower))
    with pytest.raises(TypeError, match=match):
        as_method(given)
    with pytest.raises(TypeError, match=match):
        run(problem, upper, lower, given)
    with pytest.raises(TypeError, match=match):
        check_hypergradient(
            *(problem, upper, lower, given),
            upper_batch=None,
            lower_batches=data,
            lower_solver=lambda problem, upper, lower, batches: lower,
        )
    with pytest.raises(TypeError, match=match):
        Trainer(problem, above, below, AlternatingSchedule(1, 1, 1), given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "cg"}, TypeError, r"^Implicit: solver must be a solver such as CG\(\) or Neumann\(10\), got 'cg'$"),
        ({"solver": CG}, TypeError, "^Implicit: solver must be .* got the class CG$"),
        ({"solver": Implicit()}, TypeError, "^Implicit: solver must be"),
        ({"hvp": "exact"}, TypeError, "hvp must be"),
        ({"hvp": ReverseOverReverse}, TypeError, "hvp must be"),
        ({"damping": -1.0}, ValueError, r"^Implicit: damping must be a finite number >= 0, got -1\.0$"),
        ({"damping": math.inf}, ValueError, "^Implicit: damping must be"),
        ({"damping": "1"}, ValueError, "^Implicit: damping must be"),
        ({"tikhonov": -1.0}, ValueError, "tikhonov must be a finite number >= 0"),
        ({"tikhonov": {"w": math.nan}}, ValueError, r"tikhonov\['w'\] must be a finite number >= 0"),
        ({"hessian_batches": 0}, ValueError, "^Implicit: hessian_batches must be a whole number of at least 1, got 0$"),
        ({"hessian_batches": 2.0}, ValueError, "^Implicit: hessian_batches"),
        ({"aggregate": 1}, TypeError, "^Implicit: aggregate must be True or False, got 1$"),
        ({"warm_start": "yes"}, TypeError, "^Implicit: warm_start must be True or False, got 'yes'$"),
    ],
    ids=str,
)
def test_bad_options_of_the_implicit_method(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Implicit(**options)


def test_a_failure_is_in_words_and_none_where_nothing_went_wrong() -> None:
    problem, upper, lower = proximal_point()
    assert run(problem, upper, lower, CG(50)).failure is None
    missed = run(problem, upper, lower, CG(1, rtol=1e-12), on_failure="ignore")
    assert missed.failure is not None
    assert missed.solution is not None
    assert missed.failure.startswith(missed.solution.status.value)
    assert missed.failure.endswith(f"(relative residual {missed.solution.residual_norms[1]:.2e} after 1 iterations)")
    with pytest.warns(SolverWarning) as caught:
        warned = run(problem, upper, lower, CG(1, rtol=1e-12))
    assert str(caught[0].message) == warned.failure == missed.failure
    with pytest.raises(SolverError) as raised:
        run(problem, upper, lower, CG(1, rtol=1e-12), on_failure="raise")
    assert str(raised.value) == missed.failure
    assert raised.value.solution is not None
    assert raised.value.solution.status is Status.NOT_CONVERGED


METHODS: dict[str, Method] = {
    "implicit": Implicit(CG(3, None), damping=0.5),
    "implicit, auto, warm": Implicit(CG(3, None), hvp="auto", warm_start=True),
    "implicit, aggregate": Implicit(CG(3, None), aggregate=True, warm_start=True),
    "unrolled": Unrolled(steps=2),
    "unrolled, recomputed": Unrolled(steps=2, recompute=True),
    "one step": OneStep(),
    "SAMA": SAMA(),
    "penalty": Penalty(AdamUpdate(0.05), 10.0),
}


def same(one: Any, other: Any) -> bool:
    """Equal all the way down, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, LowerStep):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


class Separate(Smooth):
    """Nothing changes in it that a method could ask for twice."""

    curvature_depends_on_upper = False


def upper_step(position: int) -> UpperStep:
    """The step at a place in a stage of two, after two recorded steps of plain descent."""
    _, upper, lower = smooth()
    problem, update, steps = Separate(0.3), SGDUpdate(0.05), []
    for seed, batch in enumerate(BATCHES):
        steps.append(LowerStep(lower, update, {}, batch, seed, None, {}))
        y = {name: leaf.clone().requires_grad_() for name, leaf in lower.items()}
        slopes = torch.autograd.grad(problem.total(upper, y, [batch]), list(y.values()))
        lower = {name: leaf - 0.05 * slope for (name, leaf), slope in zip(lower.items(), slopes, strict=True)}
    return UpperStep(
        *(problem, upper, lower, UPPER_BATCH, tuple(BATCHES), tuple(steps)),
        lower_update=lambda: (AdamUpdate(0.1), AdamUpdate(0.1).init(lower)),
        lower_rate=0.05,
        upper_rate=0.1,
        position=position,
        count=2,
    )


def seen(step: UpperStep) -> list[Any]:
    """All that a method may look at of a step."""
    return [step.upper, step.lower, step.upper_batch, step.lower_batches, step.lower_steps]


@pytest.mark.parametrize("name", METHODS)
def test_a_proposal_writes_to_nothing_that_it_is_given(name: str) -> None:
    method, first, second = METHODS[name], upper_step(0), upper_step(1)
    versions = [leaf._version for leaf in (*first.upper.values(), *first.lower.values())]
    everything = copy.deepcopy(seen(first))
    prepared = method.prepare(first, {})
    opening = method.propose(first, {}, prepared)
    assert same(seen(first), everything)
    assert [leaf._version for leaf in (*first.upper.values(), *first.lower.values())] == versions
    assert all(leaf.grad is None and not leaf.requires_grad for leaf in (*first.upper.values(), *first.lower.values()))

    carried, everything = copy.deepcopy(opening.state), copy.deepcopy(seen(second))
    random = torch.get_rng_state()
    once = method.propose(second, opening.state, prepared)
    assert same(opening.state, carried)
    assert same(seen(second), everything)
    # A step that is undone and made again is the same step.
    torch.set_rng_state(random)
    again = method.propose(second, opening.state, prepared)
    assert same(once.gradient, again.gradient)
    assert same(once.state, again.state)
    assert torch.equal(once.loss, again.loss)
    assert not any(leaf.requires_grad for leaf in (once.loss, *once.gradient.values()))
    assert method.restarted(once.state) == ({"hvp": once.state["hvp"]} if "hvp" in once.state else {})


def test_what_each_method_carries() -> None:
    def carried(name: str, position: int = 1) -> set[str]:
        method, step = METHODS[name], upper_step(position)
        return set(method.propose(step, {}, method.prepare(step, {})).state)

    assert [carried(name) for name in METHODS] == [
        set(),
        {"start", "hvp"},
        {"start"},
        *[set()] * 4,
        {"z"},
    ]
    assert carried("implicit, aggregate", 0) == {"right", "rates"}


def test_a_method_asks_for_what_it_needs() -> None:
    assert [method.stored_batches for method in METHODS.values()] == [1, 1, 1, 0, 0, 1, 1, 1]
    assert [method.replayed_steps for method in METHODS.values()] == [0, 0, 0, 2, 2, 0, 0, 0]
    assert Unrolled().replayed_steps is None
    assert Implicit(hessian_batches=4).stored_batches == 4
    assert not any(method.fresh_batches for method in METHODS.values())
    assert Implicit(fresh_batches=True).fresh_batches
    assert Penalty(SGDUpdate(0.1), 1.0, lower_batches=5).stored_batches == 5


def test_the_choice_of_a_provider_is_carried_and_taken_up() -> None:
    step = upper_step(1)
    for chosen in ("ReverseOverReverse(keep_graph=None, memory_budget=None)", "ForwardOverReverse()"):
        method = Implicit(CG(3, None), hvp="auto")
        prepared = method.prepare(step, {"hvp": chosen})
        assert isinstance(prepared.hvp, Automatic)
        assert str(prepared.hvp.chosen) == chosen
        assert prepared.hvp.report == ()
        assert method.propose(step, {"hvp": chosen}, prepared).state == {"hvp": chosen}


class Recorded(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_an_interruption_goes_through_a_method(name: str) -> None:
    def watch() -> None:
        raise Recorded

    method, stopped = METHODS[name], replace(upper_step(1), watch=watch)
    with pytest.raises(Recorded):
        method.propose(stopped, {}, method.prepare(stopped, {}))


@dataclass(frozen=True)
class Diagonal(Method):
    """The inverse of the lower Hessian's diagonal in place of the inverse; by plain automatic differentiation."""

    def propose(self, step: UpperStep, state: MethodState, prepared: Any) -> Proposal:
        x = {name: leaf.detach().requires_grad_() for name, leaf in step.upper.items()}
        y = {name: leaf.detach().requires_grad_() for name, leaf in step.lower.items()}
        loss = step.problem.upper_objective(x, y, step.upper_batch)
        direct = gradients(loss, x, retain_graph=True)
        v = gradients(loss, y)
        g = gradients(step.problem.lower_objective(x, y, step.lower_batches[0]), y, create_graph=True)
        ones = torch.stack([leaf.sum() for leaf in g.values()]).sum()
        diagonal = gradients(ones, y, retain_graph=True)
        pull = torch.stack([(g[name] * v[name] / diagonal[name]).sum() for name in y]).sum()
        implicit = {name: -leaf for name, leaf in gradients(pull, x).items()}
        grad = {name: direct[name] + implicit[name] for name in x}
        result = Hypergradient(grad, direct, implicit, loss.detach(), None, math.nan)
        return Proposal(grad, loss.detach(), {"steps": state.get("steps", 0) + 1}, result)


def gradients(value: Tensor, wrt: Params, **options: Any) -> Params:
    found = torch.autograd.grad(value, list(wrt.values()), allow_unused=True, materialize_grads=True, **options)
    return dict(zip(wrt, found, strict=True))


class Elementwise(Problem):
    """``L = 1/2 sum d (y - sin x)^2``, whose Hessian is the diagonal d; ``F = 1/2 |y - t|^2``."""

    d, t = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64), vector(3, 5)

    def lower_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return 0.5 * (self.d * (lower["y"] - upper["x"].sin()).square()).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: object) -> Tensor:
        return 0.5 * (lower["y"] - self.t).square().sum()


def test_a_method_of_the_users_own_is_taken_like_any_other() -> None:
    problem, upper = Elementwise(), {"x": vector(3, 6)}
    lower = {"y": upper["x"].sin()}
    batches: dict[str, Any] = {"upper_batch": None, "lower_batches": [None]}
    found = hypergradient(problem, upper, lower, Diagonal(), **batches)
    expected = (lower["y"] - problem.t) * upper["x"].cos()
    torch.testing.assert_close(found.grad["x"], expected, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(
        found.grad, hypergradient(problem, upper, lower, CG(9, 1e-12), **batches).grad, rtol=1e-10, atol=0.0
    )
    report = check_hypergradient(
        *(problem, upper, {"y": torch.zeros(3, dtype=torch.float64)}, Diagonal()),
        **batches,
        lower_solver=lambda problem, upper, lower, batches: {"y": upper["x"].sin()},
    )
    assert report.agrees
    assert report.verdict.startswith("right")
    x, y = {"x": upper["x"].clone()}, {"y": lower["y"].clone()}
    above, below = (Level(z, torch.optim.SGD(z.values(), lr=0.1), [None]) for z in (x, y))
    trainer = Trainer(problem, above, below, AlternatingSchedule(2, 1, 1), Diagonal())
    trainer.advance()
    # The lower level is at its minimum, where its step goes nowhere.
    torch.testing.assert_close(x["x"], upper["x"] - 0.1 * expected, rtol=1e-13, atol=0.0)
    assert trainer.state_dict()["method"]["state"] == {"steps": 1}


def test_a_method_of_the_users_own_that_is_wrong_is_found_out() -> None:
    problem, upper, lower = quadratic()
    report = check_hypergradient(
        *(problem, upper, lower, Diagonal()),
        upper_batch=None,
        lower_batches=[None],
        lower_solver=lambda problem, upper, lower, batches: split_solution(problem, upper),
    )
    assert not report.agrees
    assert report.verdict.startswith("wrong")
    assert "nothing was solved" in report.verdict
    assert relative_error(joined(report.hypergradient.direct), joined(upper)) <= 1e-15


def split_solution(problem: Any, upper: Params) -> Params:
    y = problem.solution(upper)
    return {"head": y[:1].reshape(()), "body": y[1:].reshape(2, 2)}
