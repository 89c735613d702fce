"""Every solver on every case and through every provider, against dense algebra."""

import math
from typing import Any

import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    CONSISTENT,
    DEFINITE,
    INCONSISTENT,
    INDEFINITE,
    NON_FINITE,
    Case,
    Counting,
    Quadratic,
    dense,
    joined,
    vector,
    with_spectrum,
)
from torch import Tensor

from bilevel import (
    CG,
    Dense,
    FiniteDifference,
    ForwardOverReverse,
    HVPProvider,
    Identity,
    Neumann,
    Params,
    ReverseOverReverse,
    Solution,
    Solver,
    Status,
    linearize,
)
from bilevel.solvers.neumann import ritz_values

PROVIDERS: dict[str, HVPProvider] = {
    "reverse": ReverseOverReverse(),
    "reverse, kept": ReverseOverReverse(keep_graph=True),
    "forward": ForwardOverReverse(),
    "central differences": FiniteDifference(),
    "one-sided differences": FiniteDifference(central=False),
}


def solver_for(name: str, rtol: float) -> Solver:
    return {
        "cg": CG(max_iterations=60, rtol=rtol),
        "layer-wise cg": CG(max_iterations=20, rtol=rtol, layerwise=True),
        "neumann": Neumann(max_iterations=120, rtol=rtol),
        "dense": Dense(),
        "identity": Identity(),
    }[name]


def provided(case: Case, hvp: HVPProvider) -> Counting:
    """The case's operator as the system of a quadratic problem makes it, counted."""
    y = {name: leaf.detach() for name, leaf in case.split(0.1 * vector(len(case.right), seed=7)).items()}
    system = linearize(Quadratic(case), {}, y, [1.0], hvp=hvp)
    return Counting(system.operator, exact=system.operator.exact)


def check_honest(case: Case, operator: Counting, solution: Solution, error: float) -> None:
    """What holds of any solution whatever: a true residual, a true count, and no success that is none."""
    assert solution.num_hvps == len(operator.asked)
    assert {n: t.shape for n, t in solution.value.items()} == {n: t.shape for n, t in case.b.items()}
    if case.kind == NON_FINITE:
        return
    assert all(torch.isfinite(leaf).all() for leaf in solution.value.values())
    true = case.relative_residual(solution.value)
    reported = solution.residual_norms[1]
    if not math.isnan(reported):
        size = 1.0 + float(torch.linalg.matrix_norm(case.matrix, 2) * (joined(solution.value) / case.length).norm())
        assert reported == pytest.approx(true, rel=0.15, abs=20 * error * size)
    if solution.status is Status.CONVERGED:
        assert true <= max(1e-9, 10 * error) * 1.2
    x, b = joined(solution.value) / case.length, case.right / case.length
    assert solution.departure == pytest.approx(float((x - b).norm()), rel=1e-9, abs=1e-12)
    assert solution.cosine == pytest.approx(float(x @ b / x.norm()), rel=1e-9, abs=1e-12)


def expected(solver: str, case: Case) -> set[Status]:
    if solver == "identity":
        return {Status.NON_FINITE if case.right.isnan().any() else Status.BUDGET}
    if case.kind == NON_FINITE:
        return {Status.NON_FINITE}
    if solver == "layer-wise cg":
        return set(Status) - {Status.NON_FINITE, Status.BUDGET}
    found = {
        DEFINITE: {Status.CONVERGED},
        CONSISTENT: {Status.CONVERGED},
        INCONSISTENT: {Status.INCONSISTENT},
        INDEFINITE: {Status.CONVERGED} if solver == "dense" else {Status.NEGATIVE_CURVATURE},
    }[case.kind]
    if solver == "neumann" and case.kind == INDEFINITE:
        return {Status.NEGATIVE_CURVATURE, Status.DIVERGED}
    if solver == "neumann" and case.name == "ill-conditioned":
        return {Status.NOT_CONVERGED}
    return found


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("solver", ["cg", "layer-wise cg", "neumann", "dense", "identity"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_answer_or_right_status(case: Case, solver: str, provider: str) -> None:
    hvp = PROVIDERS[provider]
    operator = provided(case, hvp)
    scale = float(torch.linalg.matrix_norm(case.matrix.nan_to_num(), 2))
    # Differences divide rounding of gradients of size one by a step of 6e-6 (1.5e-8 for one-sided ones).
    error = 2.3e-16 if hvp.exact else (1e-10 if provider.startswith("central") else 1e-7) / min(1.0, max(scale, 1e-6))
    if not hvp.exact and case.name in ("tiny operator", "zero operator"):
        pytest.skip("what differences make of an operator below their own rounding is noise")
    solution = solver_for(solver, 1e-9 if hvp.exact else 1e-4).solve(operator, case.b)
    if hvp.exact:
        check_honest(case, operator, solution, error)
        assert solution.status in expected(solver, case)
    else:
        check_status_under_noise(solver, case, solution)
    x = joined(solution.value) / case.length
    if solver == "identity" or case.kind == NON_FINITE:
        assert torch.equal(joined(solution.value).nan_to_num(7.0), case.right.nan_to_num(7.0))
    elif solution.status is Status.CONVERGED:
        exact = case.solution() / case.length
        conditioned = 1e6 if case.name == "ill-conditioned" else 10
        if hvp.exact:
            assert float((x - exact).norm()) <= 1e-9 * conditioned * float(exact.norm())
        else:
            assert float((case.matrix @ (x - exact)).norm()) <= 2e-3
    assert float(x.norm()) > 0.0 or x.isnan().any(), "a term was silenced"


def check_status_under_noise(solver: str, case: Case, solution: Solution) -> None:
    failing = case.kind in (INCONSISTENT, NON_FINITE) or (case.kind == INDEFINITE and solver != "dense")
    if solver == "identity" or solver == "layer-wise cg":
        return
    if failing:
        assert not solution.status.ok
    elif case.name != "ill-conditioned":
        assert solution.status.ok


@pytest.mark.parametrize("rtol", [None, 0.0, 1e-3])
def test_cg_solves_the_identity_in_one_step(rtol: float | None) -> None:
    case = BY_NAME["identity"]
    solution = CG(max_iterations=10, rtol=rtol).solve(dense(case.matrix, case.split), case.b)
    assert torch.equal(joined(solution.value), case.right)
    assert solution.iterations == 1
    assert solution.residual_norms == (1.0, 0.0)
    assert solution.min_curvature == pytest.approx(1.0, rel=1e-15)
    assert solution.departure == 0.0
    assert solution.cosine == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("solver", [CG, Neumann])
@pytest.mark.parametrize("name", ["well-conditioned", "ill-conditioned", "singular, consistent", "tiny operator"])
def test_iterations_past_convergence_do_no_harm(name: str, solver: type[CG] | type[Neumann]) -> None:
    case = BY_NAME[name]
    budget = 400 if solver is Neumann else 60
    solution = solver(max_iterations=budget, rtol=None).solve(dense(case.matrix, case.split), case.b)
    assert solution.status.ok
    if not (solver is Neumann and name == "ill-conditioned"):
        size = 1.0 + float(torch.linalg.matrix_norm(case.matrix, 2) * joined(solution.value).norm()) / case.length
        assert case.relative_residual(solution.value) < 2e-15 * size
        assert solution.status is Status.CONVERGED
    assert solution.num_hvps <= budget + 10


def textbook_cg(matrix: Tensor, b: Tensor, steps: int) -> list[Tensor]:
    """Hestenes and Stiefel's iterates."""
    x, r = torch.zeros_like(b), b.clone()
    d = r.clone()
    iterates = []
    for _ in range(steps):
        product = matrix @ d
        alpha = (r @ r) / (d @ product)
        x = x + alpha * d
        new = r - alpha * product
        d = new + (new @ new) / (r @ r) * d
        r = new
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_fixed_budget_makes_exactly_the_textbook_iterates(steps: int) -> None:
    case = BY_NAME["well-conditioned"]
    operator = dense(case.matrix, case.split)
    solution = CG(max_iterations=steps, rtol=None).solve(operator, case.b)
    torch.testing.assert_close(joined(solution.value), textbook_cg(case.matrix, case.right, steps)[-1])
    assert (solution.status, solution.iterations, solution.num_hvps) == (Status.BUDGET, steps, steps)
    directions = operator.asked
    quotients = [float(d @ case.matrix @ d / (d @ d)) for d in directions]
    assert solution.min_curvature == pytest.approx(min(quotients), rel=1e-10)


def layerwise_recursion(matrix: Tensor, b: Tensor, parts: list[slice], steps: int) -> Tensor:
    """The published recursion: step lengths and conjugation per tensor, the product of the whole."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(steps):
        product = matrix @ p
        new_x, new_r = x.clone(), r.clone()
        for part in parts:
            alpha = (r[part] @ r[part]) / (p[part] @ product[part])
            new_x[part] = x[part] + alpha * p[part]
            new_r[part] = r[part] - alpha * product[part]
        new_p = p.clone()
        for part in parts:
            new_p[part] = new_r[part] + (new_r[part] @ new_r[part]) / (r[part] @ r[part]) * p[part]
        x, r, p = new_x, new_r, new_p
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_layerwise_cg_is_the_published_recursion_with_a_true_residual(steps: int) -> None:
    case = Case("three leaves", BY_NAME["well-conditioned"].matrix, vector(8), ((3,), (2,), (3, 1)), DEFINITE)
    operator = dense(case.matrix, case.split)
    solution = CG(max_iterations=steps, rtol=None, layerwise=True).solve(operator, case.b)
    reference = layerwise_recursion(case.matrix, case.right, [slice(0, 3), slice(3, 5), slice(5, 8)], steps)
    torch.testing.assert_close(joined(solution.value), reference, rtol=1e-10, atol=1e-12)
    assert solution.residual_norms[1] == pytest.approx(case.relative_residual(solution.value), rel=1e-10)
    assert (solution.iterations, solution.num_hvps, solution.status) == (steps, steps + 1, Status.BUDGET)
    directions = operator.asked[:steps]
    smallest = min(float(d @ case.matrix @ d / (d @ d)) for d in directions)
    assert solution.min_curvature == pytest.approx(smallest, rel=1e-10)


def test_layerwise_cg_is_biased_on_a_coupled_system_and_says_so() -> None:
    # Eigenvalues near those of I + H/c in BiSSL, where the recursion does converge: to another point.
    matrix = with_spectrum([0.97, 1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.4])
    case = Case("coupled", matrix, vector(8), ((2, 2), (), (3,)), DEFINITE)
    exact = torch.linalg.solve(matrix, case.right)

    def error(layerwise: bool, rtol: float | None) -> tuple[float, Solution]:
        solver = CG(max_iterations=30, rtol=rtol, layerwise=layerwise)
        solution = solver.solve(dense(matrix, case.split), case.b)
        return float((joined(solution.value) - exact).norm() / exact.norm()), solution

    biased, solution = error(True, 1e-8)
    assert 1e-4 < biased < 0.2
    assert solution.status is Status.NOT_CONVERGED
    assert solution.residual_norms[1] > 1e-4
    assert error(True, None)[1].status is Status.BUDGET
    assert error(False, 1e-8)[0] < 1e-8


def test_layerwise_cg_is_exact_where_leaves_are_not_coupled() -> None:
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    matrix[:4, :4], matrix[4, 4] = with_spectrum([1.0, 2.0, 3.0, 4.0]), 5.0
    matrix[5:, 5:] = with_spectrum([0.5, 1.0, 10.0])
    case = Case("blocks", matrix, vector(8), ((2, 2), (), (3,)), DEFINITE)
    solution = CG(max_iterations=8, rtol=1e-10, layerwise=True).solve(dense(matrix, case.split), case.b)
    assert solution.status is Status.CONVERGED
    assert solution.iterations <= 4
    torch.testing.assert_close(joined(solution.value), torch.linalg.solve(matrix, case.right))


def test_layerwise_cg_with_one_leaf_is_cg() -> None:
    case = Case("one leaf", BY_NAME["well-conditioned"].matrix, vector(8), ((8,),), DEFINITE)
    for steps in (1, 3, 5):
        one, other = (
            CG(max_iterations=steps, rtol=None, layerwise=flag).solve(dense(case.matrix, case.split), case.b).value
            for flag in (False, True)
        )
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0.0)


def test_curvature_is_judged_over_the_whole_tree() -> None:
    # A leaf's share of d'Ad is negative here although A is definite.
    matrix = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    case = Case("shares", matrix, torch.tensor([1.0, -5.0], dtype=torch.float64), ((1,), (1,)), DEFINITE)
    assert float(case.right[0] * (matrix @ case.right)[0]) < 0.0
    solution = CG(max_iterations=1, rtol=None, layerwise=True).solve(dense(matrix, case.split), case.b)
    assert solution.status is Status.BUDGET
    assert solution.min_curvature is not None
    assert solution.min_curvature > 0.0


def test_cg_keeps_the_best_iterate_before_negative_curvature() -> None:
    case = BY_NAME["indefinite"]
    solution = CG(max_iterations=60, rtol=1e-10).solve(dense(case.matrix, case.split), case.b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.min_curvature is not None
    assert solution.min_curvature < 0.0
    made = textbook_cg(case.matrix, case.right, solution.iterations)
    residuals = [float((case.right - case.matrix @ x).norm()) for x in made]
    torch.testing.assert_close(joined(solution.value), made[residuals.index(min(residuals))])


@pytest.mark.parametrize("solver", [CG(), CG(layerwise=True), Neumann(), Neumann(scale=0.5)])
def test_a_breakdown_at_the_first_step_gives_b_and_its_residual(solver: Solver) -> None:
    case = BY_NAME["negative definite"]
    operator = dense(case.matrix, case.split)
    solution = solver.solve(operator, case.b)
    assert not solution.status.ok
    assert torch.equal(joined(solution.value), case.right)
    assert solution.residual_norms[1] == pytest.approx(case.relative_residual(case.b), rel=1e-12)
    assert solution.num_hvps == len(operator.asked)


def test_a_start_is_kept_at_a_breakdown_and_used_otherwise() -> None:
    case = BY_NAME["well-conditioned"]
    exact = case.split(torch.linalg.solve(case.matrix, case.right))
    reordered = {name: exact[name] for name in reversed(exact)}
    for solver in (CG(rtol=1e-8), Neumann(rtol=1e-8)):
        solution = solver.solve(dense(case.matrix, case.split), case.b, x0=reordered)
        assert solution.iterations == 0
        assert solution.residual_norms[0] < 1e-14
        assert list(solution.value) == list(case.b)
        torch.testing.assert_close(solution.value, exact)
    start = case.split(vector(8, seed=5))
    for solver in (CG(rtol=1e-8), Neumann(rtol=1e-8)):
        solution = solver.solve(dense(-case.matrix, case.split), case.b, x0=start)
        assert not solution.status.ok
        torch.testing.assert_close(solution.value, start)
        true = float((case.right + case.matrix @ joined(start)).norm() / case.right.norm())
        assert solution.residual_norms == pytest.approx((true, true), rel=1e-12)


def test_a_start_that_does_not_fit_is_refused() -> None:
    case = BY_NAME["well-conditioned"]
    with pytest.raises(ValueError, match="x0 must have the names and shapes of b"):
        CG().solve(dense(case.matrix, case.split), case.b, x0={"leaf0": torch.zeros(2)})
    with pytest.raises(TypeError, match="x0"):
        bad: Any = [1.0]
        CG().solve(dense(case.matrix, case.split), case.b, x0=bad)
    with pytest.raises(TypeError, match="operator must be"):
        not_callable: Any = 3
        CG().solve(not_callable, case.b)


@pytest.mark.parametrize("scale", [0.11, 0.3, 0.45])
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_leaves_exactly_the_power_of_its_step(terms: int, scale: float) -> None:
    case = BY_NAME["well-conditioned"]
    operator = dense(case.matrix, case.split)
    solution = Neumann(max_iterations=terms, scale=scale).solve(operator, case.b)
    step = torch.eye(8, dtype=torch.float64) - scale * case.matrix
    left = torch.linalg.matrix_power(step, terms) @ torch.linalg.solve(case.matrix, case.right)
    torch.testing.assert_close(torch.linalg.solve(case.matrix, case.right) - joined(solution.value), left)
    assert (solution.status, solution.num_hvps) == (Status.BUDGET, terms)


@pytest.mark.parametrize("terms", [1, 3, 8])
def test_neumann_equals_unrolling_from_the_optimum(terms: int) -> None:
    case, scale = BY_NAME["well-conditioned"], 0.3
    optimum = torch.linalg.solve(case.matrix, vector(8, seed=4))
    # dF/dx through the last steps y <- y - scale (A y - x), started at the optimum for x, is the truncated series.
    x = vector(8, seed=4).requires_grad_()
    y = optimum
    for _ in range(terms):
        y = y - scale * (case.matrix @ y - x)
    (unrolled,) = torch.autograd.grad(case.right @ y, x)
    solution = Neumann(max_iterations=terms, scale=scale).solve(dense(case.matrix, case.split), case.b)
    torch.testing.assert_close(joined(solution.value), unrolled, rtol=1e-12, atol=1e-12)


def test_neumann_detects_divergence_at_the_first_growth() -> None:
    # I + H/c with ||H||/c = 2 and the step 1 of the literature.
    matrix = torch.eye(6, dtype=torch.float64) + with_spectrum([2.0, 0.5, 0.1, 0.0, 0.0, -0.1])
    case = Case("step 1", matrix, vector(6), ((6,),), DEFINITE)
    solution = Neumann(max_iterations=50, scale=1.0).solve(dense(matrix, case.split), case.b)
    assert solution.status is Status.DIVERGED
    assert solution.iterations < 10
    series, term = torch.zeros_like(case.right), case.right
    residuals = []
    for _ in range(10):
        series, term = series + term, term - matrix @ term
        residuals.append((float((case.right - matrix @ series).norm() / case.right.norm()), series))
    best = min(residuals, key=lambda pair: pair[0])
    assert min(best[0], case.relative_residual(case.b)) == pytest.approx(solution.residual_norms[1], rel=1e-10)
    automatic = Neumann(max_iterations=80, rtol=1e-8).solve(dense(matrix, case.split), case.b)
    assert automatic.status is Status.CONVERGED


def test_neumann_keeps_its_scale_for_later_right_hand_sides() -> None:
    case = BY_NAME["well-conditioned"]
    operator, solver = dense(case.matrix, case.split), Neumann(max_iterations=4)
    state = solver.prepare(operator)
    first = solver.solve(operator, case.b, state=state)
    second = solver.solve(operator, case.split(vector(8, seed=9)), state=state)
    assert (first.num_hvps, second.num_hvps) == (9, 4)
    assert len(operator.asked) == 13
    assert 1.0 / state.value == pytest.approx(1.1 * 4.0, rel=0.02)


def test_ritz_values_of_a_full_krylov_space_are_the_eigenvalues() -> None:
    case = Case("small", with_spectrum([-1.0, 2.0, 5.0]), vector(3), ((3,),), INDEFINITE)
    operator = dense(case.matrix, case.split)
    assert ritz_values(operator, case.b, 8) == pytest.approx((-1.0, 2.0, 5.0))
    assert len(operator.asked) == 3
    eye = dense(torch.eye(3, dtype=torch.float64), case.split)
    assert ritz_values(eye, case.b, 8) == pytest.approx((1.0,))


def test_dense_decomposes_once_a_state_and_orders_nothing_by_chance() -> None:
    case = BY_NAME["indefinite"]
    operator, solver = dense(case.matrix, case.split), Dense()
    state = solver.prepare(operator)
    first = solver.solve(operator, case.b, state=state)
    second = solver.solve(operator, case.split(vector(8, seed=9)), state=state)
    assert (first.num_hvps, second.num_hvps) == (9, 1)
    torch.testing.assert_close(joined(second.value), torch.linalg.solve(case.matrix, vector(8, seed=9)))
    assert first.min_curvature == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="max_size=4"):
        Dense(max_size=4).solve(operator, case.b)


def test_dense_gives_the_least_squares_solution_or_b() -> None:
    case = BY_NAME["singular, inconsistent"]
    solution = Dense().solve(dense(case.matrix, case.split), case.b)
    torch.testing.assert_close(joined(solution.value), case.solution())
    null = torch.linalg.eigh(case.matrix).eigenvectors[:, 0]
    orthogonal = Dense().solve(dense(case.matrix, case.split), case.split(null))
    assert orthogonal.status is Status.INCONSISTENT
    torch.testing.assert_close(joined(orthogonal.value), null)


@pytest.mark.parametrize("solver", [CG(rtol=1e-5), CG(layerwise=True), Neumann(60), Dense(), Identity()])
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 2.0**-100), (torch.float32, 2.0**110), (torch.float64, 2.0**-800), (torch.float64, 2.0**900)],
)
def test_scale_equivariance_to_the_bit(solver: Solver, dtype: torch.dtype, factor: float) -> None:
    case = BY_NAME["well-conditioned"]
    matrix = case.matrix.to(dtype)
    one, other = (
        solver.solve(dense(matrix, case.split), case.split(case.right.to(dtype) * f)) for f in (1.0, factor)
    )
    assert torch.equal(joined(other.value), joined(one.value) * factor)
    assert one.status is other.status
    assert one.residual_norms == other.residual_norms or math.isnan(one.residual_norms[1])
    assert (one.cosine, one.departure) == (other.cosine, other.departure)


def test_right_hand_sides_at_the_end_of_the_range() -> None:
    case = BY_NAME["well-conditioned"]
    matrix = case.matrix.float()
    for size in (1e-30, 1e-44):
        b = (case.right * size / case.right.abs().max()).float()
        solution = CG(20, rtol=1e-5).solve(dense(matrix, case.split), case.split(b))
        assert solution.status is Status.CONVERGED
        reference = torch.linalg.solve(case.matrix, b.double())
        assert float((joined(solution.value).double() - reference).abs().max()) <= max(1e-4 * size, 3e-45)
    # A solution beyond the largest number is reported, not returned.
    huge = case.split((case.right * 1e38).float())
    solution = CG(20).solve(dense(1e-6 * matrix, case.split), huge)
    assert solution.status is Status.NON_FINITE
    assert torch.equal(joined(solution.value), joined(huge))


def test_identity_gives_b_bit_for_bit_whatever_its_range() -> None:
    b = {"wide": torch.tensor([1e38, 1e-44, -3.0]), "empty": torch.zeros(0), "scalar": torch.tensor(1.1)}
    solution = Identity().solve(lambda v: v, b)
    assert all(torch.equal(solution.value[name], leaf) for name, leaf in b.items())
    assert (solution.status, solution.num_hvps, solution.departure, solution.cosine) == (Status.BUDGET, 0, 0.0, 1.0)
    assert math.isnan(solution.residual_norms[1])


@pytest.mark.parametrize("solver", [CG(), CG(layerwise=True), Neumann(), Dense(), Identity()])
def test_zero_and_empty_right_hand_sides(solver: Solver) -> None:
    operator = Counting(lambda v: v)
    zeros: Params = {"a": torch.zeros(2, 2), "b": torch.zeros(())}
    for b in (zeros, {}, {"none": torch.zeros(0, 3)}):
        solution = solver.solve(operator, b)
        assert solution.status is Status.CONVERGED
        assert {n: t.shape for n, t in solution.value.items()} == {n: t.shape for n, t in b.items()}
        assert all(not leaf.any() for leaf in solution.value.values())
    assert not operator.asked


def test_leaves_of_different_dtypes() -> None:
    matrix = BY_NAME["well-conditioned"].matrix
    b: Params = {"single": vector(5).float(), "double": vector(3, seed=2)}

    def product(v: Params) -> Params:
        y = matrix @ torch.cat([v["single"].double(), v["double"]])
        return {"single": y[:5].float(), "double": y[5:]}

    exact = torch.linalg.solve(matrix, torch.cat([b["single"].double(), b["double"]]))
    for solver in (CG(30, rtol=1e-5), Neumann(100, rtol=1e-5), Dense()):
        solution = solver.solve(product, b)
        assert solution.status is Status.CONVERGED
        assert [leaf.dtype for leaf in solution.value.values()] == [torch.float32, torch.float64]
        torch.testing.assert_close(joined(solution.value).double(), exact, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("solver", [CG(30, rtol=1e-6), Neumann(100, rtol=1e-6)])
def test_an_operator_that_breaks_half_way_keeps_the_last_finite_iterate(solver: Solver) -> None:
    case = BY_NAME["well-conditioned"]
    calls = 0

    def product(v: Params) -> Params:
        nonlocal calls
        calls += 1
        return case.split(case.matrix @ joined(v) * (math.inf if calls == 8 else 1.0))

    solution = solver.solve(product, case.b)
    assert solution.status is Status.NON_FINITE
    assert all(torch.isfinite(leaf).all() for leaf in solution.value.values())
    assert solution.residual_norms[1] == pytest.approx(case.relative_residual(solution.value), rel=1e-6)
    assert 0.0 < solution.residual_norms[1] < 1.0


def test_an_inexact_operator_has_its_residual_measured() -> None:
    case = BY_NAME["well-conditioned"]
    drifts = iter(1e-5 * with_spectrum([1.0] * 4 + [-1.0] * 4, seed=seed) for seed in range(200))

    def product(v: Params) -> Params:
        return case.split((case.matrix + next(drifts)) @ joined(v))

    operator = Counting(product, exact=False)
    solution = CG(40, rtol=1e-9).solve(operator, case.b)
    assert solution.status is Status.NOT_CONVERGED
    assert solution.residual_norms[1] > 1e-7
    assert solution.num_hvps == len(operator.asked)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CG(max_iterations=0), "CG: max_iterations"),
        (lambda: CG(rtol=1.0), "CG: rtol"),
        (lambda: CG(rtol=-1.0), "CG: rtol"),
        (lambda: Neumann(max_iterations=-1), "Neumann: max_iterations"),
        (lambda: Neumann(scale=0.0), "Neumann: scale"),
        (lambda: Neumann(scale="big"), "Neumann: scale"),
        (lambda: Neumann(scale=math.nan), "Neumann: scale"),
    ],
)
def test_bad_options_are_refused_by_name(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_status_says_what_happened_and_what_to_do() -> None:
    for status in Status:
        headline = status.value.split(":")[0].replace("-", " ").replace(" ", "_").upper()
        assert headline == status.name
        assert status.ok == (status in (Status.CONVERGED, Status.BUDGET))
