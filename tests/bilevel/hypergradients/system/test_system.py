"""The system's scale, cross term, and implicit subsets, against dense second derivatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Identity, Implicit, Params, hypergradient, linearize
from bilevel.hypergradients import System
from bilevel.linear import Dense
from bilevel.products import FiniteDifference, ForwardOverReverse, ReverseOverReverse
from tests.support.cases import joined, vector
from tests.support.problems.smooth import BATCHES, Separable, Smooth, variables

EXACT = [ReverseOverReverse(), ReverseOverReverse(keep_graph=True), ForwardOverReverse()]


def split(flat: Tensor, like: Params) -> Params:
    parts = flat.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def second_derivatives(
    function: Callable[[Params, Params], Tensor], upper: Params, lower: Params
) -> tuple[Tensor, Tensor]:
    n, whole = joined(lower).numel(), torch.cat([joined(lower), joined(upper)]).detach()
    hessian = torch.autograd.functional.hessian(lambda z: function(split(z[n:], upper), split(z[:n], lower)), whole)
    assert isinstance(hessian, Tensor)
    return hessian[:n, :n], hessian[n:, :n]


def oracle(
    problem: Smooth, upper: Params, lower: Params, damping: float, batches: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """A without tikhonov, and the cross term, from the definition."""

    def mean_loss(x: Params, y: Params) -> Tensor:
        return torch.stack([problem.lower_objective(x, y, batch) for batch in batches]).mean()

    hessian, cross = second_derivatives(mean_loss, upper, lower)
    weight = problem.regularization_weight + damping
    if not problem.regularized or weight == 0.0:
        return hessian, cross

    def penalty(x: Params, y: Params) -> Tensor:
        value = problem.regularizer(x, y)
        assert value is not None
        return value

    hessian_r, cross_r = second_derivatives(penalty, upper, lower)
    return hessian / weight + hessian_r, cross / weight + cross_r


def matrix(system: System, lower: Params) -> Tensor:
    like = system.variables(lower)
    n = joined(like).numel()
    return torch.stack([joined(system.operator(split(row, like))) for row in torch.eye(n, dtype=torch.float64)], dim=1)


def cross_matrix(system: System, lower: Params, upper: Params | None = None) -> Tensor:
    like = system.variables(lower)
    n = joined(like).numel()
    rows = torch.eye(n, dtype=torch.float64)
    return torch.stack([joined(system.cross(split(row, like), upper)) for row in rows], dim=1)


@pytest.mark.parametrize("hvp", [*EXACT, FiniteDifference()], ids=str)
@pytest.mark.parametrize(
    ("weight", "damping", "regularized"),
    [(0.0, 0.0, False), (0.0, 0.0, True), (0.5, 0.0, True), (0.001, 10.0, True), (0.0, 2.0, True), (5.0, 0.0, False)],
)
def test_the_scale_of_the_system(weight: float, damping: float, regularized: bool, hvp: Any) -> None:
    problem, (upper, lower) = Smooth(weight, regularized=regularized), variables()
    system = linearize(problem, upper, lower, BATCHES, damping=damping, hvp=hvp)
    operator, cross = oracle(problem, upper, lower, damping, BATCHES)
    tolerance = 1e-12 if hvp.exact else 1e-7
    torch.testing.assert_close(matrix(system, lower), operator, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(cross_matrix(system, lower), cross, rtol=0.0, atol=tolerance)
    assert system.weight == (weight + damping if regularized and weight + damping > 0.0 else 1.0)


@pytest.mark.parametrize(
    ("tikhonov", "diagonal"), [(0.7, [0.7] * 5), ({"v": 0.7}, [0.0] * 3 + [0.7] * 2), ({}, [0.0] * 5)]
)
def test_tikhonov_is_in_the_operator_alone(tikhonov: Any, diagonal: list[float]) -> None:
    problem, (upper, lower) = Smooth(0.5), variables()
    system = linearize(problem, upper, lower, BATCHES[:1], tikhonov=tikhonov, damping=1.0)
    operator, cross = oracle(problem, upper, lower, 1.0, BATCHES[:1])
    expected = operator + torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    torch.testing.assert_close(matrix(system, lower), expected, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(cross_matrix(system, lower), cross, rtol=0.0, atol=1e-12)


def test_the_mean_over_batches_is_the_objective_on_their_union() -> None:
    problem, (upper, lower) = Smooth(0.5), variables()
    one = linearize(problem, upper, lower, [torch.cat(BATCHES)])
    many = linearize(problem, upper, lower, BATCHES)
    torch.testing.assert_close(matrix(many, lower), matrix(one, lower), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(cross_matrix(many, lower), cross_matrix(one, lower), rtol=0.0, atol=1e-12)
    assert many.stationarity() == pytest.approx(one.stationarity(), rel=1e-12)


@pytest.mark.parametrize("implicit", [["v"], ("v",), {"v"}, lambda name: name == "v", iter(["v", "v"])])
def test_implicit_subsets(implicit: Any) -> None:
    problem, (upper, lower) = Smooth(0.5), variables()
    system = linearize(problem, upper, lower, BATCHES, implicit=implicit)
    operator, cross = oracle(problem, upper, lower, 0.0, BATCHES)
    assert system.implicit == ("v",)
    torch.testing.assert_close(matrix(system, lower), operator[3:, 3:], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(cross_matrix(system, lower), cross[:, 3:], rtol=0.0, atol=1e-12)


def test_the_problem_names_its_implicit_variables_and_the_argument_overrides_it() -> None:
    class Partly(Smooth):
        def implicit(self, name: str) -> bool:
            return name == "w"

    upper, lower = variables()
    assert linearize(Partly(), upper, lower, BATCHES).implicit == ("w",)
    assert linearize(Partly(), upper, lower, BATCHES, implicit=["v", "w"]).implicit == ("w", "v")


def test_objectives_meet_the_lower_variables_in_their_own_order() -> None:
    seen: list[list[str]] = []

    class Positional(Smooth):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            seen.append(list(lower))
            return super().lower_objective(upper, lower, batch)

    upper, lower = variables()
    system = linearize(Positional(0.5), upper, lower, BATCHES, implicit=["v"])
    system.operator(system.variables(lower))
    system.cross(system.variables(lower))
    assert all(names == ["w", "v"] for names in seen)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"implicit": "w"}, TypeError, "implicit must be a sequence of names or a predicate, got the string 'w'"),
        ({"implicit": ["w", "u"]}, ValueError, r"implicit names \['u'\]"),
        ({"implicit": []}, ValueError, "implicit selects no lower variable"),
        ({"implicit": lambda name: False}, ValueError, "implicit selects no lower variable"),
        ({"damping": -1.0}, ValueError, "damping must be a finite number >= 0, got -1.0"),
        ({"damping": float("nan")}, ValueError, "damping"),
        ({"tikhonov": -1.0}, ValueError, "tikhonov must be"),
        ({"tikhonov": {"w": float("inf")}}, ValueError, r"tikhonov\['w'\]"),
        ({"tikhonov": {"u": 1.0}}, ValueError, r"tikhonov names \['u'\]"),
        ({"tikhonov": {"w": 1.0}, "implicit": ["v"]}, ValueError, r"tikhonov names \['w'\]"),
    ],
)
def test_bad_options_are_refused_by_name(options: Any, error: type[Exception], match: str) -> None:
    upper, lower = variables()
    with pytest.raises(error, match=match):
        linearize(Smooth(0.5), upper, lower, BATCHES, **options)


def test_bad_arguments_are_refused_by_name() -> None:
    upper, lower = variables()
    bad: Any
    for bad in (BATCHES[0], {"a": 1}, "batch", 3):
        with pytest.raises(TypeError, match="lower_batches must be a sequence"):
            linearize(Smooth(), upper, lower, bad)
    with pytest.raises(ValueError, match="lower_batches is empty"):
        linearize(Smooth(), upper, lower, [])
    bad = list(lower.values())
    with pytest.raises(TypeError, match="lower must be a dict"):
        linearize(Smooth(), upper, bad, BATCHES)
    with pytest.raises(TypeError, match=r"upper\['w'\]"):
        linearize(Smooth(), {"w": torch.ones(1, dtype=torch.int64)}, lower, BATCHES)
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="regularization_weight"):
            linearize(Smooth(weight), upper, lower, BATCHES)
    with pytest.raises(ValueError, match=r"damping=1\.0.*this problem has none"):
        linearize(Smooth(regularized=False), upper, lower, BATCHES, damping=1.0)


def test_objectives_must_return_scalars() -> None:
    class Vector(Smooth):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return batch @ lower["w"]

    class Number(Smooth):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Any:
            return 1.0

    upper, lower = variables()
    b = {name: torch.ones_like(leaf) for name, leaf in lower.items()}
    with pytest.raises(ValueError, match=r"lower_objective must return a 0-d tensor, got shape \(4,\)"):
        linearize(Vector(), upper, lower, BATCHES).solve(b)
    with pytest.raises(TypeError, match="lower_objective must return a 0-d tensor, got float"):
        linearize(Number(), upper, lower, BATCHES).solve(b)


def test_solve_takes_the_implicit_variables_in_any_order_and_no_others() -> None:
    upper, lower = variables()
    b = {"w": vector(3, 1), "v": vector(2, 2)}
    operator, _ = oracle(Smooth(0.5), upper, lower, 3.0, BATCHES)
    exact = torch.linalg.solve(operator, joined(b))
    for solver in (CG(50, rtol=1e-12), Dense()):
        for hvp in EXACT:
            system = linearize(Smooth(0.5), upper, lower, BATCHES, solver=solver, hvp=hvp, damping=3.0)
            for given_b in (b, {"v": b["v"], "w": b["w"]}):
                value = system.solve(given_b).value
                assert list(value) == ["w", "v"]
                torch.testing.assert_close(joined(value), exact, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="b must have the names and shapes of the implicit variables"):
        system.solve({"w": b["w"]})
    with pytest.raises(ValueError, match="b must have the names and shapes of the implicit variables"):
        system.solve({"w": b["w"], "v": vector(3, 2)})


def test_identity_in_a_proximal_problem_is_the_identity_bitwise() -> None:
    upper, lower = variables()
    b = {"w": vector(3, 1), "v": vector(2, 2)}
    value = linearize(Smooth(0.5), upper, lower, BATCHES, solver=Identity(), damping=3.0).solve(b).value
    assert all(torch.equal(value[name], b[name]) for name in b)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("hvp", EXACT, ids=str)
def test_cross_term_and_stationarity_are_at_the_current_upper_values(hvp: Any, linear: bool) -> None:
    problem, (upper, lower) = Separable(linear=linear), variables()
    system = linearize(problem, upper, lower, BATCHES, damping=1.0, hvp=hvp, solver=Dense())
    before = cross_matrix(system, lower)
    system.stationarity()
    with torch.no_grad():
        upper["w"].add_(1.0)
    _, cross = oracle(problem, upper, lower, 1.0, BATCHES)
    assert (before - cross).abs().max() > 0.1
    torch.testing.assert_close(cross_matrix(system, lower), cross, rtol=0.0, atol=1e-12)
    others = {name: leaf - 2.0 for name, leaf in upper.items()}
    _, elsewhere = oracle(problem, others, lower, 1.0, BATCHES)
    torch.testing.assert_close(cross_matrix(system, lower, others), elsewhere, rtol=0.0, atol=1e-12)
    for values in (upper, others):
        y = {name: leaf.clone().requires_grad_() for name, leaf in lower.items()}
        losses = torch.stack([problem.lower_objective(values, y, batch) for batch in BATCHES])
        total = losses.mean() + 0.5 * problem.regularizer(values, y)
        reference = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(y.values()))]).norm()
        assert system.stationarity(values) == pytest.approx(float(reference), rel=1e-12)
    with torch.no_grad():
        for name, leaf in upper.items():
            leaf.copy_(others[name])
    result = system.hypergradient(BATCHES[0])
    fresh = hypergradient(
        problem, others, lower, Implicit(Dense(), damping=1.0), upper_batch=BATCHES[0], lower_batches=BATCHES
    )
    torch.testing.assert_close(result.grad, fresh.grad, rtol=1e-12, atol=1e-12)


def test_stationarity_is_that_of_the_undamped_problem_over_the_implicit_variables() -> None:
    problem, (upper, lower) = Smooth(0.5), variables()
    y = {name: leaf.clone().requires_grad_() for name, leaf in lower.items()}
    penalty = problem.regularizer(upper, y)
    assert penalty is not None
    loss = torch.stack([problem.lower_objective(upper, y, batch) for batch in BATCHES]).mean() + 0.5 * penalty
    gradient = dict(zip(y, torch.autograd.grad(loss, list(y.values())), strict=True))
    for implicit in (["w", "v"], ["v"]):
        for hvp in (*EXACT, FiniteDifference()):
            system = linearize(problem, upper, lower, BATCHES, damping=9.0, implicit=implicit, hvp=hvp)
            reference = float(torch.cat([gradient[name] for name in implicit]).norm())
            assert system.stationarity() == pytest.approx(reference, rel=1e-12)
