"""What a backward pass through a lower solution finds, keeps, records and says."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import CG, Implicit, Params, Problem, SolverError, SolverWarning, Status, linearize
from bilevel.hypergradients import LowerSolution, OnFailure, System, lower_solution
from bilevel.linear import Nystrom, Solver
from bilevel.lower import StaleSystemError
from bilevel.products import ReverseOverReverse
from tests.bilevel.hypergradients.lower_solution.fits import EXACT, TARGET, Network, RidgeFit, X, fitted, ridge_solution
from tests.support.cases import vector
from tests.support.problems.closed_forms import NO_BATCH, QuadraticBilevel, quadratic

LOG_WEIGHT = vector(5, 30)


def variable() -> Tensor:
    return LOG_WEIGHT.clone().requires_grad_()


def gradient_of(y: LowerSolution, x: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(y["y"].square().sum(), x, **options)[0]


def test_the_record_has_each_backward_pass() -> None:
    x = variable()
    y = fitted(x)
    assert y.record == []
    first = gradient_of(y, x, retain_graph=True)
    second = torch.autograd.grad(y["y"][0], x)[0]
    assert len(y.record) == 2
    for made in y.record:
        assert made.solution.status is Status.CONVERGED
        assert made.solution.num_hvps >= 4
        assert made.stationarity <= 1e-14
        assert (made.failure, made.warning, made.noise) == (None, None, None)
    exact = variable()
    torch.testing.assert_close(first, torch.autograd.grad(ridge_solution(exact).square().sum(), exact)[0])
    torch.testing.assert_close(second, torch.autograd.grad(ridge_solution(exact)[0], exact)[0])


@pytest.mark.parametrize("solver", [CG(50, rtol=1e-12, recycle=5), Nystrom(5)], ids=lambda s: type(s).__name__)
def test_several_backward_passes_share_what_the_solver_has_learned(solver: Solver) -> None:
    x = variable()
    y = fitted(x, solver)
    gradients = [gradient_of(y, x, retain_graph=True) for _ in range(2)]
    torch.testing.assert_close(gradients[0], gradients[1])
    counts = [made.solution.num_hvps for made in y.record]
    assert counts[1] < counts[0]


def test_a_second_pass_without_retain_graph_is_torchs_error() -> None:
    x = variable()
    y = fitted(x)
    gradient_of(y, x)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y["y"].sum().backward()


class Watched(RidgeFit):
    """Counts its evaluations, and tells when the graph of one is gone."""

    def __init__(self) -> None:
        self.count = 0

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        self.count += 1
        return super().lower_objective(upper, lower, batch)


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> list["weakref.ref[System]"]:
    """Every System that is made."""
    made: list[weakref.ref[System]] = []
    real = System.__init__

    def noted(self: System, *args: Any, **options: Any) -> None:
        made.append(weakref.ref(self))
        real(self, *args, **options)

    monkeypatch.setattr(System, "__init__", noted)
    return made


@pytest.mark.parametrize("keep_graph", [False, True])
def test_the_system_goes_with_the_graph(systems: list["weakref.ref[System]"], keep_graph: bool) -> None:
    x = variable()
    y = fitted(x, Implicit(EXACT, hvp=ReverseOverReverse(keep_graph=keep_graph)))  # type: ignore[arg-type]
    unused = fitted(x)
    gc.collect()
    gc.disable()
    try:
        gradient_of(y, x, retain_graph=True)
        assert [system() is None for system in systems] == [False, False]
        gradient_of(y, x)
        assert [system() is None for system in systems] == [True, False]
        del unused
        assert systems[1]() is None
    finally:
        gc.enable()


def test_nothing_is_evaluated_where_nothing_requires_gradients(systems: list["weakref.ref[System]"]) -> None:
    problem = Watched()
    plain = fitted(LOG_WEIGHT, problem=problem)
    with torch.no_grad():
        under_no_grad = fitted(variable(), problem=problem)
    for y in (plain, under_no_grad):
        assert not y["y"].requires_grad
        assert torch.equal(y["y"], ridge_solution(LOG_WEIGHT))
    assert (problem.count, systems) == (0, [])


def test_a_gradient_of_zeros_needs_no_product() -> None:
    x = variable()
    y = fitted(x)
    (0.0 * y["y"]).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert y.record[0].solution.num_hvps == 0


def test_a_failing_solve_warns_at_the_users_line() -> None:
    x = variable()
    y = fitted(x, CG(1, rtol=1e-12))
    with pytest.warns(SolverWarning, match="not converged") as caught:
        y["y"].sum().backward()
    assert caught[0].filename == __file__
    assert y.record[0].failure is not None
    assert str(caught[0].message) == y.record[0].failure
    assert x.grad is not None
    assert x.grad.any()


def test_a_failing_solve_raises_or_is_left_to_the_caller() -> None:
    x = variable()
    y = fitted(x, CG(1, rtol=1e-12), on_failure="raise")
    with pytest.raises(SolverError, match="not converged") as caught:
        y["y"].sum().backward()
    assert x.grad is None
    assert caught.value.solution is y.record[0].solution
    quiet = fitted(x, CG(1, rtol=1e-12), on_failure="ignore")
    quiet["y"].sum().backward()
    assert quiet.record[0].solution.status is Status.NOT_CONVERGED


def test_negative_curvature_comes_with_a_remedy() -> None:
    class Saddle(QuadraticBilevel):
        A = QuadraticBilevel.A - 1.5 * torch.eye(5, dtype=torch.float64)

    _, upper, lower = quadratic()
    x = {name: leaf.clone().requires_grad_() for name, leaf in upper.items()}
    y = lower_solution(Saddle(), x, lower, NO_BATCH, EXACT)
    with pytest.warns(SolverWarning, match="negative curvature.*raise tikhonov from 0 to about"):
        y["body"].sum().backward()


@pytest.mark.parametrize("on_failure", ["warn", "raise", "ignore"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_pass(on_failure: OnFailure, value: float) -> None:
    x = variable()
    y = fitted(x, on_failure=on_failure)
    weights = torch.tensor([1.0, value, 1.0, 1.0, 1.0], dtype=torch.float64)
    (y["y"] * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().all()
    (made,) = y.record
    assert (made.solution.status, made.solution.num_hvps) == (Status.NON_FINITE, 0)
    assert made.failure is not None
    assert "from above is not finite" in made.failure


def test_a_grad_scaler_finds_what_overflows_and_goes_on() -> None:
    x = LOG_WEIGHT.float().requires_grad_()
    start, optimizer = x.detach().clone(), torch.optim.SGD([x], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    batch, statuses = (X.float(), TARGET.float()), []
    for _ in range(5):
        lower = {"y": ridge_solution(x.detach().double()).float()}
        y = lower_solution(RidgeFit(), {"log_weight": x}, lower, [batch], CG(20, rtol=1e-4), on_failure="raise")
        loss = (X.float() @ y["y"] * 10.0 - TARGET.float()).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        statuses.append(y.record[0].solution.status)
        if statuses[-1] is Status.NON_FINITE:
            assert torch.equal(x.detach(), start)
    assert statuses[0] is Status.NON_FINITE
    assert statuses[-1] is Status.CONVERGED
    assert not torch.equal(x.detach(), start)


def test_a_cross_term_that_is_not_finite_is_a_failure() -> None:
    class Root(RidgeFit):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return super().lower_objective(upper, lower, batch) + (upper["root"].sqrt() * lower["y"].sum())

    x = {"log_weight": variable(), "root": torch.zeros((), dtype=torch.float64, requires_grad=True)}
    y = lower_solution(Root(), x, {"y": ridge_solution(LOG_WEIGHT)}, [(X, TARGET)], EXACT, on_failure="raise")
    with pytest.raises(SolverError, match="cross term"):
        y["y"].sum().backward()


def test_autocast_around_either_pass_does_not_reach_the_solve() -> None:
    x = LOG_WEIGHT.float().requires_grad_()
    lower, batch = {"y": ridge_solution(LOG_WEIGHT).float()}, (X.float(), TARGET.float())

    def gradient(enabled: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = lower_solution(RidgeFit(), {"log_weight": x}, lower, [batch], CG(20, rtol=1e-6))
            loss = y["y"].sum()
            (found,) = torch.autograd.grad(loss, x)
        assert found.dtype == torch.float32
        return found

    assert torch.equal(gradient(True), gradient(False))


def test_sparse_gradients_are_taken() -> None:
    x = vector(6, 31).reshape(3, 2).requires_grad_()

    class Near(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return (lower["table"] - upper["table"].exp()).square().sum()

    y = lower_solution(Near(), {"table": x}, {"table": x.detach().exp()}, NO_BATCH)
    nn.functional.embedding(torch.tensor([0, 2]), y["table"], sparse=True).sum().backward()
    expected = x.detach().exp() * torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(x.grad, expected)


# What changes between the two passes.


def network(hidden: bool = False) -> tuple[Network, Params, Params, Any]:
    problem = Network(hidden=hidden)
    shapes = {"0.weight": (4, 5), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,), "4.weight": (1, 4), "4.bias": (1,)}
    y = {name: vector(torch.Size(shape).numel(), 40).reshape(shape) for name, shape in shapes.items()}
    x = {name: (0.5 * leaf).requires_grad_() for name, leaf in y.items()}
    return problem, x, y, (X, TARGET)


def pulled(problem: Network, x: Params, y: Params, batch: Any, between: Any = None) -> Params:
    torch.manual_seed(11)
    solution = lower_solution(problem, x, y, [batch], EXACT, on_failure="raise")
    if between is not None:
        between()
    loss = torch.stack([leaf.sum() for leaf in solution.values()]).sum()
    return dict(zip(x, torch.autograd.grad(loss, list(x.values())), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_modes_buffers_and_seeds_are_those_of_the_forward_pass(training: bool) -> None:
    problem, x, y, batch = network()
    assert problem.net is not None
    problem.net.train(training)
    norm = problem.net[1]
    assert isinstance(norm, nn.BatchNorm1d)
    reference = pulled(problem, x, y, batch)
    running = norm.running_mean
    assert running is not None

    def disturb() -> None:
        assert problem.net is not None
        problem.net.train(not training)
        torch.manual_seed(12)
        torch.rand(5)
        with torch.no_grad():
            running.add_(3.0)

    found = pulled(problem, x, y, batch, disturb)
    assert all(torch.equal(found[name], reference[name]) for name in x)
    assert all(layer.training is not training for layer in problem.net.modules())
    assert norm.running_mean is running
    assert torch.equal(running, torch.full((4,), 3.0, dtype=torch.float64))
    # Masks count: another seed gives other gradients, in train mode.
    problem.net.train(training)
    again = pulled(problem, x, y, batch)
    assert all(torch.equal(again[name], reference[name]) for name in x) is training


def test_the_masks_are_those_of_one_linear_system() -> None:
    problem, x, y, batch = network()
    found = pulled(problem, x, y, batch)
    torch.manual_seed(11)
    system = linearize(problem, {name: leaf.detach() for name, leaf in x.items()}, y, [batch], solver=EXACT)
    solution = system.solve({name: torch.ones_like(leaf) for name, leaf in y.items()})
    expected = {name: -leaf for name, leaf in system.cross(solution.value).items()}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_buffers_of_modules_elsewhere_are_watched_from_the_first_product_on() -> None:
    problem, x, y, batch = network(hidden=True)
    module: nn.Module = problem.call.__closure__[0].cell_contents
    norm = module.eval()[1]  # type: ignore[index]
    solution = lower_solution(problem, x, y, [batch], EXACT)
    loss = solution["4.bias"].sum()
    loss.backward(retain_graph=True)
    norm.running_mean += 3.0
    with pytest.raises(StaleSystemError, match=r"buffer '1.running_mean'"):
        loss.backward()


def test_a_batch_that_was_written_to_is_noticed() -> None:
    x, inputs = variable(), X.clone()
    y = lower_solution(RidgeFit(), {"log_weight": x}, {"y": ridge_solution(x.detach())}, [(inputs, TARGET)], EXACT)
    inputs *= 2.0
    with pytest.raises(StaleSystemError, match=r"lower_batches\[0\], tensor 0 changed"):
        gradient_of(y, x)


def test_a_list_of_batches_may_be_filled_anew() -> None:
    x, batches = variable(), [(X, TARGET)]
    y = lower_solution(RidgeFit(), {"log_weight": x}, {"y": ridge_solution(x.detach())}, batches, EXACT)
    batches[0] = (2.0 * X, TARGET)
    assert torch.equal(gradient_of(y, x), gradient_of(fitted(x), x))


def test_variables_that_were_written_to_are_noticed_by_torch() -> None:
    x = variable()
    y = fitted(x)
    with torch.no_grad():
        x += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_of(y, x)
    x = variable()
    y = fitted(x)
    y["y"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_of(y, x)


def test_the_given_lower_variables_may_be_trained_on() -> None:
    x = variable()
    lower = {"y": ridge_solution(x.detach()).requires_grad_()}
    y = lower_solution(RidgeFit(), {"log_weight": x}, lower, [(X, TARGET)], EXACT)
    torch.optim.SGD(lower.values(), lr=0.1).zero_grad()
    with torch.no_grad():
        lower["y"] += 1.0
    assert torch.equal(gradient_of(y, x), gradient_of(fitted(x), x))
    assert lower["y"].grad is None
