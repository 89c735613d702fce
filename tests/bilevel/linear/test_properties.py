"""What must hold of every operator, provider and solver, whatever the numbers: properties under random draws."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel import CG, MINRES, Identity, Neumann, Params, Problem, SGDUpdate, Unrolled, hypergradient, linearize
from bilevel.hypergradients import System
from bilevel.linear import Dense, LinearOperator, Nystrom, Solver
from bilevel.linear.operators import MeanOperator, ScaledOperator, SumOperator, TikhonovOperator
from bilevel.linear.preconditioner import Diagonal, NystromPreconditioner
from bilevel.linear.solvers.escalating import Escalating
from bilevel.products import FiniteDifference, ForwardOverReverse, GaussNewton, HVPProvider, ReverseOverReverse
from bilevel.products.automatic import Automatic
from bilevel.products.micro_batch import MicroBatched
from tests.support.cases import DEFINITE, Case, dense, joined, vector, with_spectrum
from tests.support.problems.smooth import BATCHES, Smooth, variables
from tests.support.problems.unrolled_cases import Quadratic, relative_error, split

DRAWN = settings(max_examples=15, derandomize=True, deadline=None, database=None)
SEEDS = st.integers(0, 99)
NUMBERS = st.floats(-3.0, 3.0, allow_nan=False)

SHAPES = {"square": (2, 2), "scalar": ()}
Pair = tuple[LinearOperator, Tensor]
"""An operator on `SHAPES` and the matrix that it stands for."""


def shaped(x: Tensor) -> Params:
    return {"square": x[:4].reshape(2, 2), "scalar": x[4]}


def single(seed: int) -> Pair:
    matrix = with_spectrum([1.0, 2.0, 3.0, -4.0, 0.0], seed)
    return dense(matrix, shaped), matrix


def mean(parts: Sequence[Pair]) -> Pair:
    return MeanOperator([operator for operator, _ in parts]), sum((m for _, m in parts), torch.zeros(5, 5)) / len(parts)


def with_term(part: Pair, by_leaf: bool, tikhonov: float) -> Pair:
    diagonal = torch.tensor([0.0 if by_leaf else tikhonov] * 4 + [tikhonov], dtype=torch.float64)
    return TikhonovOperator(part[0], {"scalar": tikhonov} if by_leaf else tikhonov), part[1] + diagonal.diag()


TREES: st.SearchStrategy[Pair] = st.recursive(
    SEEDS.map(single),
    lambda part: st.one_of(
        st.lists(part, min_size=1, max_size=3).map(mean),
        st.tuples(part, part).map(lambda p: (SumOperator(p[0][0], p[1][0]), p[0][1] + p[1][1])),
        st.builds(lambda p, factor: (ScaledOperator(factor, p[0]), factor * p[1]), part, NUMBERS),
        st.builds(with_term, part, st.booleans(), NUMBERS),
    ),
    max_leaves=4,
)


def check_linear_and_symmetric(apply: Callable[[Tensor], Tensor], u: Tensor, v: Tensor, a: float, error: float) -> None:
    au, av = apply(u), apply(v)
    size = float(au.norm() + av.norm() + u.norm() + v.norm())
    assert float((apply(a * u + v) - (a * au + av)).norm()) <= error * size * (1.0 + abs(a))
    assert abs(float(u @ av - v @ au)) <= error * size * float(u.norm() + v.norm())


@settings(DRAWN, max_examples=40)
@given(pair=TREES, seed=SEEDS, a=NUMBERS)
def test_every_operator_is_its_matrix_and_so_linear_and_symmetric(pair: Pair, seed: int, a: float) -> None:
    operator, matrix = pair
    u, v = vector(5, seed), vector(5, seed + 100)
    size = 1.0 + float(torch.linalg.matrix_norm(matrix, 2))
    for product in (operator(shaped(u)), operator.sampled(shaped(u))[0]):
        torch.testing.assert_close(joined(product), matrix @ u, rtol=0.0, atol=1e-12 * size * float(u.norm()))
    check_linear_and_symmetric(lambda x: joined(operator(shaped(x))), u, v, a, 1e-12 * size)


class InPairs(Problem):
    """Outputs that the upper variables scale, under a loss in which samples meet; linear in y if asked for."""

    def __init__(self, *, linear: bool) -> None:
        self.linear = linear

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        z = batch @ torch.stack([lower["w"], lower["w"].flip(0) + lower["v"].sum()], dim=1)
        return (z if self.linear else torch.tanh(z)) * torch.exp(0.3 * upper["t"]) + upper["shift"]

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
        return torch.logsumexp(outputs @ outputs.T, dim=1).mean() + outputs.pow(4).mean()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return lower["w"].sum()


def exact_and_differences(budget: int) -> list[HVPProvider]:
    """Every provider that takes any objective; `budget` keeps the graphs of some batches and not of all."""
    return [
        *(ReverseOverReverse(), ReverseOverReverse(keep_graph=True), ForwardOverReverse(), Automatic()),
        *(ReverseOverReverse(keep_graph=True, memory_budget=bytes_) for bytes_ in (0, budget)),
        *(FiniteDifference(), FiniteDifference(central=False)),
    ]


@dataclass(frozen=True)
class Setting:
    problem: Problem
    providers: list[HVPProvider]


SETTINGS = {
    "coupled": Setting(Smooth(0.1), exact_and_differences(500)),
    "outputs": Setting(InPairs(linear=False), [*exact_and_differences(1000), MicroBatched(1), MicroBatched(3)]),
    "linear outputs": Setting(InPairs(linear=True), [ReverseOverReverse(), MicroBatched(9), GaussNewton()]),
}
UPPER, LOWER = variables()
EACH = [
    pytest.param(name, index, id=f"{name}-{'Automatic' if isinstance(hvp, Automatic) else hvp}")
    for name, setting in SETTINGS.items()
    for index, hvp in enumerate(setting.providers)
]


@cache
def system_of(name: str, index: int) -> System:
    problem = SETTINGS[name].problem
    tikhonov = 0.0 if problem.regularization_weight else 0.25
    return linearize(problem, UPPER, LOWER, BATCHES, hvp=SETTINGS[name].providers[index], tikhonov=tikhonov)


@cache
def second_derivatives(name: str) -> tuple[Tensor, Tensor]:
    """Hessian and cross term of the system, from torch's dense Hessian of the mean over the batches."""
    problem, n = SETTINGS[name].problem, joined(LOWER).numel()
    weight = problem.regularization_weight

    def value(z: Tensor) -> Tensor:
        x, y = split(z[n:], UPPER), split(z[:n], LOWER)
        total = torch.stack([problem.lower_objective(x, y, batch) for batch in BATCHES]).mean() / (weight or 1.0)
        penalty = problem.regularizer(x, y)
        return total if penalty is None else total + penalty

    full: Any = torch.autograd.functional.hessian(value, torch.cat([joined(LOWER), joined(UPPER)]))
    tikhonov = 0.0 if weight else 0.25
    return full[:n, :n] + tikhonov * torch.eye(n, dtype=torch.float64), full[n:, :n]


@pytest.mark.parametrize(("name", "index"), EACH)
@settings(DRAWN, max_examples=6)
@given(seed=SEEDS, a=NUMBERS)
def test_every_provider_gives_the_dense_products(name: str, index: int, seed: int, a: float) -> None:
    system, (hessian, cross) = system_of(name, index), second_derivatives(name)
    provider = SETTINGS[name].providers[index]
    error = 1e-11 if provider.exact else (1e-7 if provider == FiniteDifference() else 1e-4)
    u, v = vector(5, seed), vector(5, seed + 100)
    size = float(torch.linalg.matrix_norm(torch.cat([hessian, cross]), 2))
    for found, matrix in ((system.operator(split(u, LOWER)), hessian), (system.cross(split(u, LOWER)), -cross)):
        sign = -1.0 if matrix is not hessian else 1.0
        distance = float((joined(found) - sign * matrix @ u).norm())
        assert distance <= error * size * float(u.norm())
    check_linear_and_symmetric(lambda x: joined(system.operator(split(x, LOWER))), u, v, a, error * (1.0 + size))


GLOBAL: list[Solver] = [
    *(CG(6, rtol=None), CG(60, rtol=1e-8), CG(6, rtol=None, recycle=4), Neumann(7), MINRES(6, rtol=None), Dense()),
    *(CG(5, rtol=None, preconditioner=Diagonal(4)), CG(4, rtol=None, preconditioner=NystromPreconditioner(3))),
    *(Nystrom(rank=4), Nystrom(rank=4, max_refinements=3, rtol=None)),
]


@pytest.mark.parametrize("solver", GLOBAL, ids=str)
@DRAWN
@given(cuts=st.lists(st.integers(0, 9), max_size=4), seed=SEEDS, tikhonov=st.floats(0.01, 3.0))
def test_global_solvers_do_not_see_how_variables_are_split(
    solver: Solver, cuts: list[int], seed: int, tikhonov: float
) -> None:
    matrix = with_spectrum([tikhonov + value for value in (0.1, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0, 3.0, 5.0)], seed)
    shapes = tuple((b - a,) for a, b in itertools.pairwise([0, *sorted(cuts), 9]))
    whole = Case("whole", matrix, vector(9, seed), ((9,),), DEFINITE)
    parts = Case("parts", matrix, vector(9, seed), shapes, DEFINITE)
    one, other = (solver.solve(dense(matrix, case.split), case.b) for case in (whole, parts))
    assert relative_error(joined(other.value), joined(one.value)) <= 1e-8
    assert one.status is other.status
    # Where a tolerance ends the solve, the last digits may make it, or the check of its residual, a product longer.
    slack = 0 if getattr(solver, "rtol", None) is None else 1
    assert abs(one.iterations - other.iterations) <= slack
    assert abs(one.num_hvps - other.num_hvps) <= 2 * slack


SCALED: list[Solver] = [*GLOBAL, CG(4, rtol=None, layerwise=True), Escalating(CG(5, rtol=None)), Identity()]


@pytest.mark.parametrize("solver", SCALED, ids=str)
@DRAWN
@given(of_matrix=st.integers(-12, 12), of_right=st.integers(-280, 280), seed=SEEDS, indefinite=st.booleans())
def test_solutions_scale_with_the_system(
    solver: Solver, of_matrix: int, of_right: int, seed: int, indefinite: bool
) -> None:
    # (c A) x' = k b has x' = (k / c) x, whatever a solver stops at; `Identity` knows nothing of c.
    smallest = -0.5 if indefinite and isinstance(solver, (MINRES, Dense, Escalating)) else 0.1
    matrix = with_spectrum([smallest, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0, 3.0, 5.0], seed)
    c, k = 10.0**of_matrix, 10.0**of_right
    case = Case("case", matrix, vector(9, seed), ((3, 2), (3,)), DEFINITE)
    scaled = Case("scaled", c * matrix, vector(9, seed) * k, ((3, 2), (3,)), DEFINITE)
    one, other = (solver.solve(dense(made.matrix, made.split), made.b) for made in (case, scaled))
    back = joined(other.value) / k * (1.0 if isinstance(solver, Identity) else c)
    assert relative_error(back, joined(one.value)) <= 1e-8
    assert (one.status, one.iterations) == (other.status, other.iterations)
    assert other.tikhonov == pytest.approx(c * one.tikhonov, rel=1e-8)


@DRAWN
@given(
    seed=SEEDS,
    weight=st.sampled_from([0.0, 0.7]),
    rate=st.floats(0.01, 0.5),
    terms=st.integers(1, 9),
    earlier=st.integers(0, 3),
    recompute=st.booleans(),
)
def test_truncated_unrolling_from_an_optimum_is_the_neumann_series(
    seed: int, weight: float, rate: float, terms: int, earlier: int, recompute: bool
) -> None:
    problem = Quadratic(weight)
    problem.A = with_spectrum([0.2, 0.8, 1.0, 2.0, 3.0], seed)
    upper = {"x": vector(3, seed + 1), "scale": vector(1, seed + 2)[0]}
    lower = problem.optimum(upper)
    unrolled = hypergradient(
        *(problem, upper, lower),
        Unrolled(SGDUpdate(rate), steps=terms, recompute=recompute),
        upper_batch=None,
        lower_batches=[1.0] * (terms + earlier),
    )
    # The system is divided by the weight of the regularizer, so the step is multiplied by it.
    series = hypergradient(
        *(problem, upper, lower),
        Neumann(terms, rtol=None, scale=rate * (weight or 1.0)),
        upper_batch=None,
        lower_batches=[1.0],
    )
    assert relative_error(joined(unrolled.grad), joined(series.grad)) <= 1e-12
