"""How many passes a hypergradient makes, and that kept graphs give what passes of their own give."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Identity, Implicit, Neumann, Params, Problem, hypergradient, linearize, tree
from bilevel.linear import Solver, Status
from bilevel.products import ReverseOverReverse

KEPT = ReverseOverReverse(keep_graph=True)


class Coupled(Problem):
    """Smooth, with variables of two leaves a level; counts its passes."""

    def __init__(self) -> None:
        self.lower_passes = self.upper_passes = 0

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        self.lower_passes += 1
        fit = (batch @ lower["a"] - upper["x"].tanh().sum() * lower["b"]).square().mean()
        return fit + 0.5 * (upper["w"].exp() * lower["a"].square()).sum() + lower["b"].square()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        self.upper_passes += 1
        return (batch @ lower["a"] - lower["b"]).square().mean() + upper["x"].square().sum()


def setting() -> tuple[Coupled, Params, Params, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    upper, lower = {"x": normal(3), "w": normal(4)}, {"a": normal(4), "b": normal()}
    return Coupled(), upper, lower, [normal(6, 4) for _ in range(3)]


def made(problem: Coupled, solver: Solver, hvp: ReverseOverReverse, batches: int) -> Any:
    _, upper, lower, data = setting()
    method = Implicit(solver, hvp=hvp)
    return hypergradient(
        problem, upper, lower, method, upper_batch=data[0], lower_batches=data[:batches], on_failure="ignore"
    )


@pytest.mark.parametrize(
    ("solver", "hvp", "passes"),
    [
        (Identity(), KEPT, 1),
        (Identity(), ReverseOverReverse(keep_graph=False), 1),
        (Neumann(1, scale=0.1), KEPT, 1),
        (Neumann(1, scale=0.1), ReverseOverReverse(keep_graph=False), 2),
        (CG(4, None), KEPT, 1),
    ],
)
@pytest.mark.parametrize("batches", [1, 3])
def test_passes_a_batch(solver: Solver, hvp: ReverseOverReverse, passes: int, batches: int) -> None:
    problem = setting()[0]
    made(problem, solver, hvp, batches)
    problem.lower_passes = problem.upper_passes = 0
    made(problem, solver, hvp, batches)
    assert (problem.lower_passes, problem.upper_passes) == (passes * batches, 1)


@pytest.mark.parametrize("solver", [Identity(), Neumann(3, scale=0.1), CG(4, None)], ids=["identity", "neumann", "cg"])
@pytest.mark.parametrize("batches", [1, 3])
def test_kept_graphs_change_nothing(solver: Solver, batches: int) -> None:
    kept, recomputed = (made(setting()[0], solver, hvp, batches) for hvp in (KEPT, ReverseOverReverse()))
    for part in ("grad", "implicit"):
        ours, theirs = getattr(kept, part), getattr(recomputed, part)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    assert kept.stationarity == recomputed.stationarity
    assert kept.noise == recomputed.noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_all_graphs_together_are_those_of_each(dtype: torch.dtype) -> None:
    problem, upper, lower, data = setting()
    upper, lower = ({n: leaf.to(dtype) for n, leaf in level.items()} for level in (upper, lower))
    batches = [batch.to(dtype) for batch in data]
    together, alone = (linearize(problem, upper, lower, batches, hvp=hvp) for hvp in (KEPT, ReverseOverReverse()))
    for _ in range(2):
        product, expected = together.operator(lower), alone.operator(lower)
        assert all(torch.equal(product[name], expected[name]) for name in product)


def test_the_cross_term_sees_upper_variables_that_moved() -> None:
    class Bilinear(Coupled):
        curvature_depends_on_upper = False

        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (batch @ lower["a"]).square().mean() + (upper["w"].square() * lower["a"]).sum() + lower["b"].square()

    _, upper, lower, data = setting()
    system = linearize(Bilinear(), upper, lower, data[:1], hvp=KEPT)
    before = system.cross(lower)
    upper["w"].data.mul_(3.0)
    after = system.cross(lower)
    torch.testing.assert_close(after["w"], 3.0 * before["w"], rtol=1e-12, atol=0.0)


def test_one_term_from_a_start_takes_one_product() -> None:
    problem, upper, lower, data = setting()
    system = linearize(problem, upper, lower, data[:1], solver=Neumann(1, scale=0.1))
    b, x0 = {"a": torch.ones(4).double(), "b": torch.ones(()).double()}, tree.scale(0.3, lower)
    solution = system.solve(b, x0=x0)
    expected = tree.axpy(0.1, tree.sub(b, system.operator(x0)), x0)
    assert (solution.num_hvps, solution.iterations, solution.status) == (1, 1, Status.BUDGET)
    for name, leaf in expected.items():
        torch.testing.assert_close(solution.value[name], leaf, rtol=1e-12, atol=1e-14)
    start = float(tree.norm(tree.sub(b, system.operator(x0))) / tree.norm(b))
    assert solution.residual_norms[0] == pytest.approx(start)
    assert solution.residual_norms[1] != solution.residual_norms[1], "the last residual was not measured"
