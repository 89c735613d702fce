"""Every solver on every case and through every provider, against dense algebra."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, MINRES, Identity, Neumann, Params, Status, linearize
from bilevel.linear import Dense, Escalating, LinearOperator, Nystrom, Solution, Solver
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.cases import (
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
    assert solution.relative_change == pytest.approx(float((x - b).norm()), rel=1e-9, abs=1e-12)
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
    solution = solver_for(solver, 1e-9 if hvp.exact else 1e-4).solve(operator, case.b)
    if not hvp.exact and case.name in ("tiny operator", "zero operator"):
        # What differences make of an operator below their own rounding is noise, but still finite.
        assert all(torch.isfinite(leaf).all() for leaf in solution.value.values())
        return
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
    bad: Any = [1.0]
    with pytest.raises(TypeError, match="x0 must be a dict"):
        CG().solve(dense(case.matrix, case.split), case.b, x0=bad)
    with pytest.raises(TypeError, match="b must be a dict"):
        CG().solve(dense(case.matrix, case.split), bad)
    with pytest.raises(TypeError, match="operator must be"):
        CG().solve(bad, case.b)


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


def test_dense_state_serves_the_same_names_in_another_order() -> None:
    case = BY_NAME["indefinite"]

    def product(v: Params) -> Params:
        image = case.split(case.matrix @ joined({name: v[name] for name in case.b}))
        return {name: image[name] for name in v}

    operator, solver = Counting(product), Dense()
    state = solver.prepare(operator)
    solver.solve(operator, case.b, state=state)
    reordered = {name: case.b[name] for name in reversed(case.b)}
    solution = solver.solve(operator, reordered, state=state)
    assert list(solution.value) == list(reordered)
    assert (solution.status, solution.num_hvps) == (Status.CONVERGED, 1)
    exact = torch.linalg.solve(case.matrix, case.right)
    torch.testing.assert_close(joined({name: solution.value[name] for name in case.b}), exact)


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
    one, other = (solver.solve(dense(matrix, case.split), case.split(case.right.to(dtype) * f)) for f in (1.0, factor))
    assert torch.equal(joined(other.value), joined(one.value) * factor)
    assert one.status is other.status
    assert one.residual_norms == other.residual_norms or math.isnan(one.residual_norms[1])
    assert (one.cosine, one.relative_change) == (other.cosine, other.relative_change)


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
    assert (solution.status, solution.num_hvps, solution.relative_change, solution.cosine) == (
        Status.BUDGET,
        0,
        0.0,
        1.0,
    )
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
    assert [status.name for status in Status if not status.ok] == [
        *("NOT_CONVERGED", "NEGATIVE_CURVATURE", "DIVERGED", "NON_FINITE", "INCONSISTENT")
    ]


class _LateNaN(LinearOperator):
    """An operator whose products turn non-finite from one of them on."""

    def __init__(self, matrix: Tensor, first_bad: int) -> None:
        self.matrix, self.first_bad, self.made = matrix, first_bad, 0

    def __call__(self, vector: Params) -> Params:
        self.made += 1
        product = self.matrix @ vector["y"]
        return {"y": product * math.nan if self.made >= self.first_bad else product}


@pytest.mark.parametrize("solver", [CG(6, 1e-14), MINRES(6, 1e-14), Neumann(6, 1e-14, 0.1), Dense()], ids=repr)
def test_a_number_that_is_not_finite_is_called_so_whenever_it_comes(solver: Solver) -> None:
    matrix = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    b = {"y": torch.ones(6, dtype=torch.float64)}
    for first_bad in range(1, 8):
        solution = solver.solve(_LateNaN(matrix, first_bad), b)
        assert bool(solution.value["y"].isfinite().all())
        if solution.num_hvps >= first_bad:
            assert solution.status is Status.NON_FINITE, first_bad


def test_a_zero_given_as_first_iterate_does_not_silence_the_term() -> None:
    b = {"y": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    zero = {"y": torch.zeros(2, dtype=torch.float64)}
    solution = CG(5, 1e-6).solve(lambda v: {"y": -v["y"]}, b, x0=zero)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(solution.value["y"], b["y"])


def test_a_scale_from_an_easier_right_hand_side_is_taken_anew() -> None:
    diagonal = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 30.0], dtype=torch.float64)
    easy, hard = torch.ones(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    easy[-1] = 0.0
    solver, made = Neumann(2000, 1e-6), 0

    def operator(v: Params) -> Params:
        nonlocal made
        made += 1
        return {"y": diagonal * v["y"]}

    state = solver.prepare(operator)
    assert solver.solve(operator, {"y": easy}, state=state).status is Status.CONVERGED
    made = 0
    solution = solver.solve(operator, {"y": hard}, state=state)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.value["y"], hard / diagonal, rtol=1e-4, atol=0.0)
    assert solution.num_hvps == made


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        *((CG(rtol=0.1), 0.1), (CG(rtol=None), None), (CG(rtol="noise"), None), (MINRES(rtol=0.2), 0.2)),
        *((Neumann(rtol=None), None), (Nystrom(rtol=0.3), 0.3), (Dense(), 0.0), (Identity(), None)),
        (Escalating(CG(rtol=0.4)), 0.4),
    ],
    ids=repr,
)
def test_the_residual_that_a_solver_goes_to(solver: Solver, expected: float | None) -> None:
    assert solver.tolerance == expected
