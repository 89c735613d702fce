"""Products on as many batches as their noise asks for, and the step that goes without one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bilevel import CG, Params, Status, tree
from bilevel.linear import (
    FunctionOperator,
    LinearOperator,
    MeanOperator,
    ScaledOperator,
    SumOperator,
    TikhonovOperator,
    WatchedOperator,
)
from bilevel.linear.account import Account
from bilevel.linear.conjugate_gradients import ConjugateGradients
from bilevel.linear.inexact import InexactProducts
from bilevel.linear.operators import KnownProduct, SampledOnce
from tests.bilevel.linear.test_recycling import SIZE, error, noisy_mean, random_right, spd, split
from tests.support.cases import dense, joined, with_spectrum


class Batches(LinearOperator):
    """A mean that notes which batches it was asked for."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.mean = MeanOperator([FunctionOperator(dense(m, split)) for m in matrices])
        self.asked: list[tuple[int, ...]] = []

    @property
    def batches(self) -> int:
        return self.mean.batches

    def __call__(self, vector: Params) -> Params:
        self.asked.append(tuple(range(self.batches)))
        return self.mean(vector)

    def sampled(self, vector: Params) -> tuple[Params, Tensor | None]:
        self.asked.append(tuple(range(self.batches)))
        return self.mean.sampled(vector)

    def on_batches(self, vector: Params, batches: Sequence[int]) -> Params:
        self.asked.append(tuple(batches))
        return self.mean.on_batches(vector, batches)


def noisy(count: int, spread: float) -> tuple[Batches, Tensor]:
    matrices = noisy_mean(count, spread)[1]
    return Batches(matrices), torch.stack(matrices).mean(dim=0)


def test_products_on_some_batches_pass_through_every_operator() -> None:
    operator, matrices = noisy_mean(6, 0.1)
    vector = random_right(1)[0]
    some = torch.stack([matrices[k] for k in (4, 1)]).mean(dim=0)
    whole = FunctionOperator(lambda x: x)
    watched: list[int] = []
    built = WatchedOperator(
        SampledOnce(TikhonovOperator(SumOperator(ScaledOperator(-0.5, operator), whole), 2.0)),
        lambda: watched.append(1),
    )
    assert built.batches == operator.batches == 6
    assert whole.batches == 1
    expected = -0.5 * some @ vector + 3.0 * vector
    for outer in (built, KnownProduct(built, split(vector), split(vector))):
        assert torch.allclose(joined(outer.on_batches(split(vector), [4, 1])), expected)
    assert watched == [1, 1]


@pytest.mark.parametrize("batches", [2, 5, 40])
def test_as_few_batches_as_take_half_of_what_is_left_of_the_tolerance(batches: int) -> None:
    operator = Batches([torch.eye(SIZE, dtype=torch.float64)] * batches)
    vector = split(random_right(1)[0])
    unit = tree.scale(1.0 / float(tree.norm(vector)), vector)
    for length in (1e-4, 0.03, 0.2, 1.0, 30.0):
        # The step is d'r / (curvature d'd), whatever the length of d.
        inexact = InexactProducts(deviation=0.7, curvature=2.0)
        inexact.product(operator, vector, tree.scale(2.0 * length, unit), 0.05)
        one = (0.7 * length) ** 2
        fits = [m for m in range(1, batches + 1) if one * (1 / m - 1 / batches) <= (0.7 * 0.05) ** 2 / 2]
        assert len(operator.asked[-1]) == fits[0]
        assert inexact.missed == pytest.approx(one * (1 / fits[0] - 1 / batches))
        # However many follow, together they stay within it, and another right-hand side begins anew.
        for _ in range(20):
            inexact.product(operator, vector, tree.scale(2.0 * length, unit), 0.05)
        assert inexact.missed <= (0.7 * 0.05) ** 2
        inexact.begin()
        inexact.product(operator, vector, tree.scale(2.0 * length, unit), 0.05)
        assert len(operator.asked[-1]) == fits[0]


def test_batches_take_turns() -> None:
    operator = Batches([torch.eye(SIZE, dtype=torch.float64)] * 5)
    inexact = InexactProducts(deviation=1.0, curvature=1.0)
    vector = split(random_right(1)[0])
    for _ in range(5):
        inexact.product(operator, vector, tree.scale(1.0 / float(tree.norm(vector)), vector), 1.3)
        inexact.begin()
    assert operator.asked == [(0, 1), (2, 3), (4, 0), (1, 2), (3, 4)]


@pytest.mark.parametrize("rtol", [0.02, "noise"])
def test_the_answer_is_as_good_and_takes_fewer_products(rtol: float | str) -> None:
    b = random_right(1)[0]
    operator, mean = noisy(16, 0.02)
    exact = CG(40, rtol).solve(operator, split(b))  # type: ignore[arg-type]
    operator.asked.clear()
    found = CG(40, rtol, inexact=True).solve(operator, split(b))  # type: ignore[arg-type]
    assert found.status is exact.status
    assert found.num_hvps == pytest.approx(sum(len(batches) for batches in operator.asked) / 16)
    assert found.num_hvps < 0.8 * exact.num_hvps
    assert operator.asked[0] == tuple(range(16))
    target = rtol if isinstance(rtol, float) else found.noise
    assert target is not None
    residual = float((b - mean @ joined(found.value)).norm() / b.norm())
    # The recursion's residual is within the tolerance, and what was left out adds half of it at most a product.
    assert residual < 2.0 * target
    assert error(found, mean, b) < 2.0 * max(error(exact, mean, b), target)


def test_batches_that_agree_are_asked_one_at_a_time() -> None:
    operator = Batches([spd()] * 4)
    b = random_right(1)[0]
    found = CG(60, 1e-8, inexact=True).solve(operator, split(b))
    assert found.status is Status.CONVERGED
    assert [len(batches) for batches in operator.asked] == [4] + [1] * (len(operator.asked) - 1)
    assert error(found, spd(), b) < 1e-6


def test_the_last_step_is_along_the_next_direction_by_the_largest_curvature() -> None:
    matrix, b = spd(), random_right(1)[0]
    x, r = torch.zeros_like(b), b.clone()
    d, curvatures, residuals = r.clone(), [], []
    for _ in range(3):
        alpha = (r @ r) / (d @ matrix @ d)
        curvatures.append(float(d @ matrix @ d / (d @ d)))
        after = r - alpha * matrix @ d
        x, d, r = x + alpha * d, after + (after @ after) / (r @ r) * d, after
        residuals.append(float(r.norm() / b.norm()))
    operator = dense(matrix, split)
    found = CG(3, None, inexact=True).solve(operator, split(b))
    assert found.num_hvps == len(operator.asked) == 3
    assert found.status is Status.BUDGET
    assert torch.allclose(joined(found.value), x + (d @ r) / (max(curvatures) * (d @ d)) * d, rtol=1e-10)
    last = 0.5 if residuals[-1] < 0.5 * residuals[-2] else residuals[-1] / residuals[-2]
    assert found.residual_norms[1] == pytest.approx(last * residuals[-1], rel=1e-8)
    # On the way, and worth it here: the steps of a definite matrix shrink the error whatever comes next.
    assert error(found, matrix, b) < error(CG(3, None).solve(operator, split(b)), matrix, b)


@pytest.mark.parametrize("rtol", [0.1, 0.03, 0.01])
def test_later_right_hand_sides_of_a_state_go_on_from_what_is_known(rtol: float) -> None:
    operator, mean = noisy(10, 0.01)
    solver = CG(60, rtol, memory=20, inexact=True)
    state = solver.prepare(operator)
    rights = random_right(6)
    # The last one is answered almost in full by what is remembered.
    for b in [*rights, rights[0] + 1e-3 * rights[1]]:
        found = solver.solve(operator, split(b), state=state)
        assert found.status is Status.CONVERGED
        assert float((b - mean @ joined(found.value)).norm() / b.norm()) < 3.0 * rtol
    assert sum(len(batches) for batches in operator.asked) < 0.8 * 10 * len(operator.asked)


def test_negative_curvature_of_some_batches_is_not_believed() -> None:
    """Two batches that are far from definite have a mean that is the identity but for one large eigenvalue."""
    part = with_spectrum([8.0] * (SIZE // 2) + [-8.0] * (SIZE // 2), seed=4)
    mean = torch.eye(SIZE, dtype=torch.float64)
    mean[0, 0] = 5.0
    operator = Batches([mean + part, mean - part])
    tolerant = InexactProducts(deviation=1e-9)
    b = random_right(1)[0]
    found = ConjugateGradients(Account(operator, split(b), 20, 1e-6), inexact=tolerant).solve(None, split(b), 1.0)
    assert any(len(batches) == 1 for batches in operator.asked)
    assert found.status is not Status.NEGATIVE_CURVATURE
    assert found.min_curvature is not None
    assert found.min_curvature > 0.0


def test_means_over_different_batches_have_none_in_common() -> None:
    one, other = noisy_mean(2, 0.1)[0], noisy_mean(3, 0.1)[0]
    assert SumOperator(one, other).batches == 1
    found = CG(40, 1e-3, inexact=True).solve(SumOperator(one, other), split(random_right(1)[0]))
    assert found.status is Status.CONVERGED


def test_negative_curvature_is_told_and_not_stepped_along() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(1.0, 4.0, SIZE, dtype=torch.float64)
    values[0] = -3.0
    operator = dense(basis @ torch.diag(values) @ basis.T, split)
    found = CG(40, 1e-8, inexact=True).solve(operator, split(random_right(1)[0]))
    assert found.status is Status.NEGATIVE_CURVATURE
    assert found.residual_norms[1] <= 1.0


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"layerwise=True .* inexact=True"):
        CG(layerwise=True, inexact=True)
    with pytest.raises(ValueError, match=r"recycle=3 answers later right-hand sides .* take memory"):
        CG(recycle=3, inexact=True)
    with pytest.raises(TypeError, match="CG: inexact must be True or False"):
        CG(inexact=1)  # type: ignore[arg-type]
