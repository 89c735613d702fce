"""Hypergradients of constrained and penalised lower levels against closed forms, and what is said of bad points."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    CG,
    MINRES,
    Hypergradient,
    Implicit,
    Method,
    Neumann,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    SolverError,
    SolverWarning,
    Unrolled,
    check_hypergradient,
    hypergradient,
    linearize,
    ridge,
)
from bilevel.hypergradients import SAMA
from bilevel.linear import GMRES, AdjointIteration, Dense, Nystrom
from bilevel.lower import L1, Box, ByName, ElasticNet, GroupL1, LinearEqualities, NonNegative, ProximalMap, Simplex
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.kinds.problems import EXACT, Penalised, draw, f64

HESSIAN = (lambda a: a.T @ a / 8.0 + 0.3 * torch.eye(6, dtype=a.dtype))(draw(8, 6, seed=0))
LINEAR, TARGET, MIXING = 2.0 * draw(6, seed=1), draw(6, seed=2), draw(6, 3, seed=3)
START = {"y": torch.zeros(6, dtype=torch.float64)}
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
MATRIX = draw(2, 6, seed=4)


def at_solution(
    problem: Penalised, upper: Params, method: Method | Any = EXACT, batches: tuple[float, ...] = (1.0,), **options: Any
) -> tuple[Hypergradient, Tensor]:
    """The hypergradient at y*, without a flaw, and y*."""
    y = problem.solve(upper, START, batches)
    result = hypergradient(
        problem, upper, y, method, upper_batch=None, lower_batches=list(batches), on_failure="raise", **options
    )
    assert result.failure is None
    assert result.stationarity <= 1e-13
    return result, y["y"]


def test_the_lasso_on_its_support() -> None:
    problem = Penalised(HESSIAN, LINEAR, TARGET, lambda x: L1(x["weight"].exp()))
    upper = {"weight": torch.tensor(-0.7, dtype=torch.float64)}
    result, y = at_solution(problem, upper)
    support = y != 0.0
    assert 1 <= int(support.sum()) <= 5
    slopes = -torch.linalg.solve(HESSIAN[support][:, support], y[support].sign()) * upper["weight"].exp()
    assert result.grad["weight"] == pytest.approx(float((y - TARGET)[support] @ slopes), rel=1e-10)


def test_the_lasso_with_a_weight_for_each_entry() -> None:
    problem = Penalised(HESSIAN, LINEAR, TARGET, lambda x: L1(x["weights"]))
    weights = f64(0.1, 0.5, 0.9, 0.2, 0.7, 0.4)
    result, y = at_solution(problem, {"weights": weights})
    support = y != 0.0
    expected = torch.zeros_like(y)
    inverse = torch.linalg.inv(HESSIAN[support][:, support])
    expected[support] = -y[support].sign() * (inverse @ (y - TARGET)[support])
    assert torch.allclose(result.grad["weights"], expected, atol=1e-10)


def test_the_elastic_net_as_a_map_and_as_l1_beside_a_smooth_ridge() -> None:
    upper = {"l1": torch.tensor(0.4, dtype=torch.float64), "l2": torch.tensor(0.7, dtype=torch.float64)}

    class Smooth(Penalised):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return super().lower_objective(upper, lower, batch) + 0.5 * upper["l2"] * lower["y"].square().sum()

    as_map = Penalised(HESSIAN, LINEAR, TARGET, lambda x: ElasticNet(x["l1"], x["l2"]))
    smooth = Smooth(HESSIAN, LINEAR, TARGET, lambda x: L1(x["l1"]))
    smooth.step_size = 0.5 * smooth.step_size
    for problem in (as_map, smooth):
        result, y = at_solution(problem, upper)
        s = y != 0.0
        assert 1 <= int(s.sum()) <= 5
        damped = HESSIAN[s][:, s] + 0.7 * torch.eye(int(s.sum()), dtype=y.dtype)
        back = torch.linalg.solve(damped, (y - TARGET)[s])
        assert result.grad["l1"] == pytest.approx(float(-back @ y[s].sign()), rel=1e-10)
        assert result.grad["l2"] == pytest.approx(float(-back @ y[s]), rel=1e-10)


def test_the_group_lasso() -> None:
    problem = Penalised(HESSIAN, LINEAR, TARGET, lambda x: GroupL1(x["weight"], LABELS))
    result, y = at_solution(problem, {"weight": torch.tensor(1.3, dtype=torch.float64)})
    norms = torch.stack([y[torch.eq(LABELS, g)].norm() for g in range(3)])
    assert 1 <= int((norms > 0.0).sum()) <= 2
    s = y != 0.0
    # h's Hessian on a group that is not 0 is weight (I - u u') / |y_g|, with u = y_g / |y_g|.
    hessian, slopes = HESSIAN.clone(), torch.zeros_like(y)
    for g in range(3):
        of = torch.eq(LABELS, g)
        if norms[g] > 0.0:
            u = y[of] / norms[g]
            slopes[of] = u
            hessian[of.nonzero(), of.nonzero().T] += 1.3 * (torch.eye(2, dtype=y.dtype) - torch.outer(u, u)) / norms[g]
    expected = -(y - TARGET)[s] @ torch.linalg.solve(hessian[s][:, s], slopes[s])
    assert result.grad["weight"] == pytest.approx(float(expected), rel=1e-10)


def on_free(free: Tensor, y: Tensor) -> Tensor:
    """dF/dx of y_free = H_ff^-1 (...)_f with x in the linear term."""
    w = torch.zeros_like(y)
    w[free] = torch.linalg.solve(HESSIAN[free][:, free], (y - TARGET)[free])
    return MIXING.T @ w


@pytest.mark.parametrize("one", [NonNegative(), Box(low=0.0), Box(0.0, 0.4), Box(-0.3, f64(0.1, 0.2, 1, 1, 1, 1))])
def test_bounds_with_some_of_them_active(one: ProximalMap) -> None:
    problem = Penalised(HESSIAN, LINEAR, TARGET, lambda x: one, MIXING)
    result, y = at_solution(problem, {"x": f64(0.3, -0.2, 0.1)})
    free = problem.proximal_map({}).distances({"y": y}, 1.0)["y"].reshape(-1, 6).abs().min(0).values > 1e-9
    assert 1 <= int(free.sum()) <= 5
    assert torch.allclose(result.grad["x"], on_free(free, y), atol=1e-10)


def test_the_textbook_case_with_one_bound_active() -> None:
    hessian, upper = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64), {"x": f64(2.0, -1.0)}
    eye = torch.eye(2, dtype=torch.float64)
    bounded = Penalised(hessian, f64(0.0, 0.0), f64(4.0, 4.0), lambda x: NonNegative(), eye)
    y = {"y": f64(1.0, 0.0)}
    for method in (EXACT, Dense(), AdjointIteration(400, rtol=1e-12)):
        result = hypergradient(bounded, upper, y, method, upper_batch=None, lower_batches=[1.0], on_failure="raise")
        assert torch.allclose(result.grad["x"], f64(-1.5, 0.0), atol=1e-10)

    class Smooth(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return bounded.lower_objective(upper, lower, batch)

        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return bounded.upper_objective(upper, lower, batch)

    smooth = hypergradient(Smooth(), upper, y, CG(9, 1e-12), upper_batch=None, lower_batches=[1.0])
    assert torch.allclose(smooth.grad["x"], f64(-2.0 / 3.0, -5.0 / 3.0), atol=1e-10), "what ignores the bound gives"


def test_a_bound_that_depends_on_x() -> None:
    problem = Penalised(HESSIAN, LINEAR, TARGET, lambda x: Box(low=x["low"]))
    low = torch.full((6,), 0.2, dtype=torch.float64)
    result, y = at_solution(problem, {"low": low})
    active = y == low
    assert 1 <= int(active.sum()) <= 5
    free = ~active
    response = -torch.linalg.solve(HESSIAN[free][:, free], HESSIAN[free][:, active])
    expected = torch.zeros_like(y)
    expected[active] = (y - TARGET)[active] + response.T @ (y - TARGET)[free]
    assert torch.allclose(result.grad["low"], expected, atol=1e-10)


def test_a_simplex_with_faces_active() -> None:
    problem = Penalised(HESSIAN, LINEAR, TARGET, lambda x: Simplex(x["radius"]), MIXING)
    result, y = at_solution(problem, {"x": f64(0.3, -0.2, 0.1), "radius": torch.tensor(1.5, dtype=torch.float64)})
    s = y > 0.0
    count = int(s.sum())
    assert 2 <= count <= 5
    # The KKT system on the support: H_ss y + mu 1 = (c + B x)_s, 1'y = r.
    kkt = torch.zeros(count + 1, count + 1, dtype=y.dtype)
    kkt[:count, :count], kkt[-1, :count], kkt[:count, -1] = HESSIAN[s][:, s], 1.0, 1.0
    back = torch.linalg.solve(kkt, torch.cat([(y - TARGET)[s], f64(0.0)]))
    assert torch.allclose(result.grad["x"], MIXING[s].T @ back[:count], atol=1e-10)
    assert result.grad["radius"] == pytest.approx(float(back[-1]), rel=1e-9)


def test_linear_equalities_by_their_kkt_system() -> None:
    problem = Penalised(HESSIAN, LINEAR, TARGET, lambda x: LinearEqualities(MATRIX, x["right"]), MIXING)
    upper = {"x": f64(0.3, -0.2, 0.1), "right": f64(0.5, -1.0)}
    result, y = at_solution(problem, upper)
    kkt = torch.zeros(8, 8, dtype=y.dtype)
    kkt[:6, :6], kkt[6:, :6], kkt[:6, 6:] = HESSIAN, MATRIX, MATRIX.T
    exact = torch.linalg.solve(kkt, torch.cat([LINEAR + MIXING @ upper["x"], upper["right"]]))
    assert torch.allclose(y, exact[:6], atol=1e-12)
    back = torch.linalg.solve(kkt, torch.cat([y - TARGET, f64(0.0, 0.0)]))
    assert torch.allclose(result.grad["x"], MIXING.T @ back[:6], atol=1e-10)
    assert torch.allclose(result.grad["right"], back[6:], atol=1e-10)


def lasso(mixing: Tensor | None = MIXING) -> Penalised:
    return Penalised(HESSIAN, LINEAR, TARGET, lambda x: L1(x["weight"].exp()), mixing)


UPPER = {"x": f64(0.3, -0.2, 0.1), "weight": torch.tensor(-0.7, dtype=torch.float64)}


def test_several_batches_have_the_mean_objective_before_the_map() -> None:
    batches = (0.4, 1.0, 1.9)
    result, y = at_solution(lasso(), UPPER, batches=batches)
    whole, same = at_solution(lasso(), UPPER, batches=(1.1,))
    assert torch.allclose(y, same, atol=1e-14)
    for name in UPPER:
        assert torch.allclose(result.grad[name], whole.grad[name], atol=1e-10)
    assert result.noise is not None
    assert result.noise > 0.0


@pytest.mark.parametrize("step", [0.1, 0.5, 1.7])
def test_the_step_size_does_not_matter(step: float) -> None:
    problem = lasso()
    reference, _ = at_solution(problem, UPPER)
    problem.step_size *= step
    result, _ = at_solution(problem, UPPER)
    for name in UPPER:
        assert torch.allclose(result.grad[name], reference.grad[name], atol=1e-9)


@pytest.mark.parametrize("hvp", [ForwardOverReverse(), FiniteDifference(), ReverseOverReverse(keep_graph=True), "auto"])
def test_products_of_the_smooth_part_come_from_any_provider(hvp: HVPProvider | str) -> None:
    reference, _ = at_solution(lasso(), UPPER)
    result, _ = at_solution(lasso(), UPPER, Implicit(GMRES(60, rtol=1e-9), hvp=hvp))  # type: ignore[arg-type]
    for name in UPPER:
        assert torch.allclose(result.grad[name], reference.grad[name], atol=1e-6)


def test_a_regularizer_with_its_weight_is_of_the_smooth_part() -> None:
    class Ridged(Penalised):
        regularization_weight = 0.6

        def regularizer(self, upper: Params, lower: Params) -> Tensor:
            return ridge(lower)

    ridged = Ridged(HESSIAN, LINEAR, TARGET, lambda x: L1(x["weight"].exp()), MIXING)
    ridged.step_size *= 0.5
    shifted = HESSIAN + 0.6 * torch.eye(6, dtype=torch.float64)
    plain = Penalised(shifted, LINEAR, TARGET, lambda x: L1(x["weight"].exp()), MIXING)
    by_weight, by_hand = at_solution(ridged, UPPER)[0], at_solution(plain, UPPER)[0]
    for name in UPPER:
        assert torch.allclose(by_weight.grad[name], by_hand.grad[name], atol=1e-10)


def test_tikhonov_is_added_to_the_whole_operator() -> None:
    problem = lasso()
    y = problem.solve(UPPER, START)
    plain, raised = (linearize(problem, UPPER, y, [1.0], tikhonov=t) for t in (0.0, 0.25))
    v = {"y": draw(6, seed=9)}
    assert torch.allclose(raised.operator(v)["y"], plain.operator(v)["y"] + 0.25 * v["y"], atol=1e-14)
    assert not plain.operator.symmetric


def test_the_system_is_the_transposed_jacobian_of_the_residual() -> None:
    problem = lasso()
    y = {"y": problem.solve(UPPER, START)["y"] + 1e-3}
    system = linearize(problem, UPPER, y, [1.0])
    jacobian = torch.autograd.functional.jacobian(lambda p: problem.residual(UPPER, {"y": p}, 1.0)["y"], y["y"])
    of_x = torch.autograd.functional.jacobian(lambda x: problem.residual({**UPPER, "x": x}, y, 1.0)["y"], UPPER["x"])
    v = draw(6, seed=9)
    assert isinstance(jacobian, Tensor)
    assert isinstance(of_x, Tensor)
    assert torch.allclose(system.operator({"y": v})["y"], jacobian.T @ v, atol=1e-12)
    assert torch.allclose(system.cross({"y": v})["x"], of_x.T @ v, atol=1e-12)
    assert torch.allclose(system.gradient()["y"], problem.residual(UPPER, y, 1.0)["y"], atol=1e-15)


class Pair(Penalised):
    """A second lower variable z beside y, coupled to it by the smooth part."""

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        both = super().lower_objective(upper, lower, batch)
        return both + 0.5 * lower["z"].square().sum() - 0.3 * (lower["z"] * lower["y"][:2]).sum()


def test_variables_that_are_held_fixed_do_not_respond_and_are_not_judged() -> None:
    problem = Pair(HESSIAN, LINEAR, TARGET, lambda x: ByName({"y": L1(x["weight"].exp()), "z": NonNegative()}), MIXING)
    lower = {**START, "z": f64(0.0, 0.0)}
    for _ in range(4000):
        lower = {**problem.fixed_point_map(UPPER, lower, torch.tensor(1.0)), "z": lower["z"]}
    result = hypergradient(
        *(problem, UPPER, lower, Implicit(EXACT, implicit=["y"])),
        upper_batch=None,
        lower_batches=[1.0],
        on_failure="raise",
    )
    alone, _ = at_solution(lasso(), UPPER)
    for name in UPPER:
        assert torch.allclose(result.grad[name], alone.grad[name], atol=1e-9)
    coupling = Pair(HESSIAN, LINEAR, TARGET, lambda x: LinearEqualities(torch.ones(1, 8), 0.0), MIXING)
    with pytest.raises(ValueError, match=r"implicit leaves out \['z'\]"):
        linearize(coupling, {"x": UPPER["x"]}, lower, [1.0], implicit=["y"])


def test_a_y_that_is_no_fixed_point_is_flagged_by_the_norm_of_the_residual() -> None:
    problem = lasso()
    y = problem.solve(UPPER, START)
    off = {"y": y["y"] + 0.1}
    options: dict[str, Any] = {"upper_batch": None, "lower_batches": [1.0]}
    with pytest.warns(SolverWarning, match=r"no solution: y is no fixed point.*\|\|y - T\(x, y\)\||"):
        result = hypergradient(problem, UPPER, off, EXACT, **options)
    assert result.stationarity == pytest.approx(float(problem.residual(UPPER, off, 1.0)["y"].norm()), rel=1e-12)
    with pytest.raises(SolverError, match="no solution"):
        hypergradient(problem, UPPER, off, EXACT, **options, on_failure="raise")
    with pytest.warns(SolverWarning, match="no solution"):
        hypergradient(problem, UPPER, START, EXACT, **options)


@pytest.mark.parametrize("miss", [0.0, 1e-7])
def test_a_degenerate_active_set_is_flagged(miss: float) -> None:
    """The entry of y whose gradient is exactly the weight of the penalty."""
    eye = torch.eye(2, dtype=torch.float64)
    problem = Penalised(eye, f64(0.5, 2.0), f64(4.0, 4.0), lambda x: L1(x["weight"]))
    upper, y = {"weight": torch.tensor(0.5, dtype=torch.float64)}, {"y": f64(0.0, 1.5 + miss)}
    with pytest.warns(SolverWarning, match=r"degenerate: 1 entries .*least distance 0.0e\+00"):
        hypergradient(problem, upper, y, EXACT, upper_batch=None, lower_batches=[1.0])
    # As far from the kink as ten times the residual is not, and one that is known to be there is well.
    apart = Penalised(eye, f64(0.5 - 1e-4, 2.0), f64(4.0, 4.0), lambda x: L1(x["weight"]))
    result = hypergradient(apart, upper, y, EXACT, upper_batch=None, lower_batches=[1.0], on_failure="raise")
    assert result.grad["weight"] == pytest.approx(2.5 - miss, rel=1e-9)


def test_the_support_is_read_from_the_image_not_from_y() -> None:
    """A y whose zeros are not exact, as other solvers leave them."""
    problem = lasso(None)
    upper = {"weight": UPPER["weight"]}
    reference, y = at_solution(problem, upper)
    nearly = {"y": y + 1e-12 * draw(6, seed=11)}
    assert bool((nearly["y"] != 0.0).all())
    result = hypergradient(problem, upper, nearly, EXACT, upper_batch=None, lower_batches=[1.0], on_failure="raise")
    assert torch.allclose(result.grad["weight"], reference.grad["weight"], rtol=1e-9)
    assert result.active_set is not None
    assert torch.equal(result.active_set, reference.active_set)  # type: ignore[arg-type]


def test_central_differences_agree() -> None:
    def solver(problem: Problem, upper: Params, lower: Params, batches: Any) -> Params:
        assert isinstance(problem, Penalised)
        return problem.solve(upper, lower, batches, steps=1500)

    for problem, upper in (
        (lasso(), UPPER),
        (Penalised(HESSIAN, LINEAR, TARGET, lambda x: Simplex(), MIXING), {"x": UPPER["x"]}),
    ):
        report = check_hypergradient(
            *(problem, upper, START),
            upper_batch=None,
            lower_batches=[1.0],
            lower_solver=solver,
            directions=2,
            tolerance=1e-7,
        )
        assert report.agrees, report.verdict

    lazy = check_hypergradient(
        *(lasso(), UPPER, START),
        upper_batch=None,
        lower_batches=[1.0],
        lower_solver=lambda problem, upper, lower, batches: solver(problem, upper, lower, batches) and lower,
        tolerance=1e-7,
    )
    assert lazy.verdict.startswith("not solved")


@pytest.mark.parametrize("solver", [CG(), MINRES(), Neumann(), Neumann(scale=1.0), Nystrom()], ids=repr)
def test_symmetric_solvers_are_refused_at_once(solver: Any) -> None:
    with pytest.raises(ValueError, match=r"needs a symmetric operator.*GMRES"):
        linearize(lasso(), UPPER, START, [1.0], solver=solver)


@pytest.mark.parametrize(
    "method", [Unrolled(SGDUpdate(0.1)), OneStep(0.1), SAMA(SGDUpdate(0.1)), Penalty(SGDUpdate(0.1), 10.0)]
)
def test_methods_of_smooth_minima_are_refused(method: Method) -> None:
    options: dict[str, Any] = {"upper_batch": None, "lower_batches": [1.0]}
    with pytest.raises(
        ValueError, match=rf"{type(method).__name__} differentiates the smooth minimum.*Implicit\(GMRES"
    ):
        hypergradient(lasso(), UPPER, START, method, **options)
    with pytest.raises(ValueError, match="smooth minimum"):
        check_hypergradient(lasso(), UPPER, START, method, **options, lower_solver=lambda *a: START)


def test_what_makes_no_sense_is_refused_by_name() -> None:
    problem = lasso()
    with pytest.raises(ValueError, match=r"damping=0.5.*proximal problem"):
        linearize(problem, UPPER, START, [1.0], damping=0.5)
    problem.curvature_depends_on_upper = False
    with pytest.raises(ValueError, match="curvature_depends_on_upper = False"):
        linearize(problem, UPPER, START, [1.0])
    problem = lasso()
    for step in (0.0, -1.0, None, "0.1"):
        problem.step_size = step  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"Penalised.step_size must be a positive number"):
            linearize(problem, UPPER, START, [1.0])
    wrong: Any = list
    with pytest.raises(TypeError, match=r"proximal_map\(upper\) must be a ProximalMap"):
        linearize(Penalised(HESSIAN, LINEAR, TARGET, wrong), UPPER, START, [1.0])
    with pytest.raises(ValueError, match=r"the map gave \(3, 6\)"):
        linearize(Penalised(HESSIAN, LINEAR, TARGET, lambda x: L1(torch.ones(3, 1))), UPPER, START, [1.0])


def test_the_default_method_serves() -> None:
    result = hypergradient(
        *(lasso(), UPPER, lasso().solve(UPPER, START)), upper_batch=None, lower_batches=[1.0], on_failure="raise"
    )
    exact, _ = at_solution(lasso(), UPPER)
    for name in UPPER:
        assert torch.allclose(result.grad[name], exact.grad[name], rtol=1e-2)
    assert replace(result, active_set=None).active_changes is None
