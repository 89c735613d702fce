"""Conjugate gradients that keep their directions, stop at the noise of the batches, and read nothing on the way."""

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bilevel import CG, Params, Status
from bilevel.linear import LinearOperator, Solution
from bilevel.linear.account import Account
from bilevel.linear.conjugate_gradients import ConjugateGradients
from bilevel.linear.operators import FunctionOperator, MeanOperator, ScaledOperator, SumOperator, TikhonovOperator
from bilevel.linear.preconditioner import Diagonal
from bilevel.linear.recycling import Directions
from tests.support.cases import CASES, Case, Counting, dense, joined, with_spectrum
from tests.support.solver_checks import check_ritz_range

SIZE = 40


def spd(seed: int = 0, *, low: float = 1.0, high: float = 30.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.logspace(math.log10(low), math.log10(high), SIZE, dtype=torch.float64)) @ basis.T


def split(vector: Tensor) -> Params:
    return {"a": vector[:15].reshape(3, 5), "b": vector[15:]}


def random_right(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(count)]


def error(solution: Solution, matrix: Tensor, b: Tensor) -> float:
    exact = torch.linalg.solve(matrix, b)
    return float((joined(solution.value) - exact).norm() / exact.norm())


def test_every_right_hand_side_is_solved_and_later_ones_cost_less() -> None:
    matrix = spd()
    operator = dense(matrix, split)
    solver, fresh = CG(60, 1e-8, recycle=60), CG(60, 1e-8)
    state = solver.prepare(operator)
    spent, plain = [], []
    for b in random_right(4):
        before = len(operator.asked)
        solution = solver.solve(operator, split(b), state=state)
        spent.append(len(operator.asked) - before)
        plain.append(fresh.solve(operator, split(b)).num_hvps)
        assert solution.status is Status.CONVERGED
        assert solution.num_hvps == spent[-1]
        assert error(solution, matrix, b) < 1e-7
    # Every direction searched reduces what is left, so that the whole space, 40 directions, is the most ever
    # paid, and one product a solve that measures what rounding left.
    assert spent[0] <= plain[0]
    assert sum(spent) <= SIZE + 4 < sum(plain)


def test_what_lies_in_the_kept_span_takes_no_product() -> None:
    matrix = spd()
    operator = dense(matrix, split)
    solver = CG(60, 1e-8, recycle=60)
    state = solver.prepare(operator)
    first = random_right(1)[0]
    one = solver.solve(operator, split(first), state=state)
    again = solver.solve(operator, split(-3.0 * first), state=state)
    assert (again.num_hvps, again.iterations, again.status) == (0, 0, Status.CONVERGED)
    assert torch.allclose(joined(again.value), -3.0 * joined(one.value), rtol=1e-9)
    assert again.residual_norms[0] == pytest.approx(1.0)
    assert again.ritz_range == one.ritz_range
    assert again.min_curvature == one.min_curvature


def test_the_residual_without_products_is_the_true_one() -> None:
    matrix, (first, second) = spd(), random_right(2)
    operator = dense(matrix, split)
    solver = CG(10, 1e-2, recycle=60)
    state = solver.prepare(operator)
    solver.solve(operator, split(first), state=state)
    mixed = first + 0.02 * second
    solution = CG(10, 0.5).solve(operator, split(mixed), state=state)
    true = float((mixed - matrix @ joined(solution.value)).norm() / mixed.norm())
    assert solution.num_hvps == 0
    assert solution.residual_norms[1] == pytest.approx(true, rel=1e-6)


def test_the_limit_on_kept_directions_holds() -> None:
    matrix = spd()
    operator = dense(matrix, split)
    solver = CG(60, 1e-8, recycle=5)
    state = solver.prepare(operator)
    for b in random_right(3):
        solution = solver.solve(operator, split(b), state=state)
        assert len(state.directions) == 5
        assert error(solution, matrix, b) < 1e-7


def test_a_first_iterate_and_a_preconditioner_are_compatible() -> None:
    matrix = spd() + torch.diag(torch.linspace(0.0, 200.0, SIZE, dtype=torch.float64))
    operator = dense(matrix, split)
    solver = CG(80, 1e-8, preconditioner=Diagonal(probes=20), recycle=80)
    state = solver.prepare(operator)
    start = split(random_right(1, seed=7)[0])
    for b in random_right(3):
        assert error(solver.solve(operator, split(b), x0=start, state=state), matrix, b) < 1e-7


def test_kept_estimates_lie_among_the_eigenvalues() -> None:
    matrix = spd()
    operator = dense(matrix, split)
    solver = CG(10, 1e-3, recycle=30)
    state = solver.prepare(operator)
    for b in random_right(5):
        case = Case("kept", matrix, b, ((3, 5), (25,)), "definite")
        check_ritz_range(case, solver.solve(operator, split(b), state=state), 1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recycle": -1}, "CG: recycle must be a whole number of at least 0, got -1"),
        ({"recycle": 2.0}, "CG: recycle must be a whole number"),
        ({"recycle": 2, "layerwise": True}, "layerwise=True has no conjugate directions to recycle .* but recycle=2"),
        ({"rtol": 1.5}, "rtol must be a finite number"),
    ],
    ids=["negative", "fraction", "layerwise", "rtol"],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CG(**options)


def noisy_mean(count: int, spread: float) -> tuple[MeanOperator, list[Tensor]]:
    generator = torch.Generator().manual_seed(count)
    matrices = []
    for _ in range(count):
        noise = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        matrices.append(spd() + spread * (noise + noise.T))
    return MeanOperator([FunctionOperator(dense(m, split)) for m in matrices]), matrices


def test_the_noise_is_the_standard_error_of_the_product() -> None:
    operator, matrices = noisy_mean(6, 0.05)
    b = random_right(1)[0]
    products = torch.stack([m @ b for m in matrices])
    # Over the batches, each coordinate's variance of the mean is s^2 / n with the unbiased s^2.
    standard_error = float((products.var(dim=0, correction=1).sum() / len(matrices)).sqrt())
    mean, measured = operator.sampled(split(b))
    assert torch.allclose(joined(mean), products.mean(dim=0))
    assert measured == pytest.approx(standard_error, rel=1e-10)
    regular = FunctionOperator(lambda vector: vector)
    built = TikhonovOperator(SumOperator(ScaledOperator(-0.5, operator), regular), 2.0)
    total, scaled = built.sampled(split(b))
    assert scaled == pytest.approx(0.5 * standard_error, rel=1e-10)
    assert torch.allclose(joined(total), joined(built(split(b))))
    assert MeanOperator([operator.operators[0]]).sampled(split(b))[1] is None


def test_no_product_is_spent_below_the_noise() -> None:
    b = random_right(1)[0]
    used = {}
    for spread in (0.2, 0.002):
        operator, matrices = noisy_mean(5, spread)
        solution = CG(40, "noise").solve(operator, split(b))
        noise = solution.noise
        assert noise is not None
        assert solution.status is Status.AT_THE_NOISE
        assert solution.residual_norms[1] <= noise
        # The last iterate but one was not yet there.
        assert len(solution.residual_curve) == 1 or solution.residual_curve[-2] > noise
        used[spread] = solution.num_hvps
        mean = torch.stack(matrices).mean(dim=0)
        assert error(solution, mean, b) < 30 * noise
    assert used[0.2] < used[0.002] < 40


def test_the_noise_is_measured_once_a_state() -> None:
    operator, _ = noisy_mean(5, 0.05)
    solver = CG(40, "noise", recycle=40)
    state = solver.prepare(operator)
    found = [solver.solve(operator, split(b), state=state) for b in random_right(3)]
    assert len({solution.noise for solution in found}) == 1
    assert all(solution.residual_norms[1] <= (found[0].noise or 0.0) for solution in found)


def test_a_solve_that_stopped_at_the_noise_says_so_and_one_lost_in_it_too() -> None:
    b, direction = split(random_right(1)[0]), with_spectrum([float(k) for k in range(SIZE)], seed=2)
    for spread, expected in ((0.01, Status.AT_THE_NOISE), (50.0, Status.LOST_IN_THE_NOISE)):
        # Two batches whose mean is the same definite matrix, however far they are apart.
        pair = [spd() + spread * direction, spd() - spread * direction]
        operator = MeanOperator([FunctionOperator(dense(matrix, split)) for matrix in pair])
        solution = CG(40, "noise").solve(operator, b)
        assert solution.status is expected
        assert solution.status.ok
        assert solution.noise is not None
        # Zero is within the noise exactly where the noise exceeds the right-hand side.
        assert (solution.noise >= 1.0) == (expected is Status.LOST_IN_THE_NOISE)
        assert "noise" in solution.status.value
        # The same system solved to a number has nothing to do with the noise.
        assert CG(200, 0.99).solve(operator, b).status not in (Status.AT_THE_NOISE, Status.LOST_IN_THE_NOISE)


def test_a_budget_that_ends_above_the_noise_is_not_at_it() -> None:
    operator, _ = noisy_mean(5, 1e-6)
    solution = CG(2, "noise").solve(operator, split(random_right(1)[0]))
    assert solution.status is Status.NOT_CONVERGED
    assert solution.noise is not None
    assert solution.residual_norms[1] > solution.noise


def test_noise_needs_a_mean() -> None:
    with pytest.raises(ValueError, match='rtol="noise" needs an operator that is a mean over two batches or more'):
        CG(5, "noise").solve(dense(spd(), split), split(random_right(1)[0]))


def run(operator: LinearOperator, b: Params, iterations: int, *, watched: bool) -> Solution:
    """As CG(iterations, rtol=None) runs it, after the scaling to a norm between 1 and 2."""
    account = Account(operator, b, iterations, None)
    with torch.no_grad():
        return ConjugateGradients(account, watched=watched).solve(None, b, 1.0)


@pytest.mark.parametrize("iterations", [1, 3, 12])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reading_at_the_end_changes_nothing(case: Case, iterations: int) -> None:
    if not bool(case.right.isfinite().all()):
        pytest.skip("refused before any iteration")
    b = case.split(case.right / case.length)
    seen = run(dense(case.matrix, case.split), b, iterations, watched=True)
    blind = run(dense(case.matrix, case.split), b, iterations, watched=False)
    assert blind.status is seen.status
    assert blind.iterations == seen.iterations
    assert blind.residual_curve == seen.residual_curve
    assert blind.residual_norms == pytest.approx(seen.residual_norms, nan_ok=True)
    assert blind.min_curvature == seen.min_curvature
    assert blind.ritz_range == pytest.approx(seen.ritz_range)
    assert torch.equal(joined(blind.value), joined(seen.value))


def synchronisations(iterations: int) -> int:
    """Scalars that a solve with this budget brings to the host."""
    matrix, b = spd(high=1e4), split(random_right(1)[0])
    operator = Counting(lambda vector: split(matrix @ joined(vector)))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        solution = run(operator, b, iterations, watched=False)
    assert solution.iterations == iterations
    return sum(event.count for event in recorded.key_averages() if event.key == "aten::_local_scalar_dense")


def test_a_fixed_budget_reads_nothing_between_its_products() -> None:
    # A row of readings comes back at the end in one transfer (tolist copies a CPU tensor without a read per scalar).
    assert synchronisations(12) == synchronisations(4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_noise_rule_does_not_depend_on_the_units(scale: float) -> None:
    operator, _ = noisy_mean(4, 0.02)
    b = split(random_right(1)[0])
    plain = CG(40, "noise").solve(operator, b)
    scaled = CG(40, "noise").solve(ScaledOperator(scale, operator), b)
    assert scaled.noise == pytest.approx(plain.noise, rel=1e-6)
    assert scaled.iterations == plain.iterations
    torch.testing.assert_close(joined(scaled.value) * scale, joined(plain.value), rtol=1e-6, atol=0.0)


def test_batches_that_agree_ask_for_rounding_and_get_it() -> None:
    matrix = spd()
    operator = MeanOperator([FunctionOperator(dense(matrix, split)) for _ in range(3)])
    solution = CG(60, "noise").solve(operator, split(random_right(1)[0]))
    assert solution.status is Status.CONVERGED
    assert error(solution, matrix, random_right(1)[0]) < 1e-12


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "read at the end"])
def test_a_breakdown_after_a_projection_that_was_of_no_use_gives_b(watched: bool) -> None:
    operator = dense(torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)), lambda v: {"a": v})
    solver = CG(5, 1e-8, recycle=5) if watched else CG(5, None, recycle=5)
    state = solver.prepare(operator)
    first = {"a": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)}
    last = {"a": torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)}
    assert solver.solve(operator, first, state=state).status is Status.CONVERGED
    for _ in range(2):
        solution = solver.solve(operator, last, state=state)
        assert solution.status is Status.NEGATIVE_CURVATURE
        assert torch.equal(solution.value["a"], last["a"])
    assert len(state.directions) == 1


def test_directions_of_a_broken_run_are_not_kept_where_nothing_is_read_on_the_way() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, -1.0, 1.0], dtype=torch.float64))
    b = {"a": torch.ones(4, dtype=torch.float64) / 2}
    kept = []
    for watched in (True, False):
        directions = Directions(10)
        account = Account(dense(matrix, lambda v: {"a": v}), b, 4, None)
        with torch.no_grad():
            ConjugateGradients(account, directions=directions, watched=watched).solve(None, b, 1.0)
        kept.append(len(directions))
    assert kept[0] == kept[1] < 4
