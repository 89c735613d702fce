"""The controlled study's models: their steps are the library's hypergradients, and their risks the closed form."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.disagreement.model import (
    RATES,
    SIZE,
    Draws,
    Setting,
    conjugate_gradients,
    direction_of,
    draw,
    largest_curvature,
    times,
    train,
)
from benchmarks.disagreement.settings import BASE
from bilevel import CG, Identity, Implicit, Problem, hypergradient, proximal
from bilevel.linear import Dense, Solver

SETTING = Setting(proximity=0.4, damping=0.7, gamma=0.3, labels=25, hessian_rows=30)


class Stage(Problem):
    """The bilevel problem of one draw, as it would be written for the library."""

    def __init__(self, draws: Draws, seed: int) -> None:
        self.draws, self.seed = draws, seed
        self.regularization_weight = draws.setting.proximity

    def lower_objective(self, upper, lower, batch):
        offset = lower["y"] - self.draws.a[self.seed]
        return 0.5 * offset @ batch @ offset

    def upper_objective(self, upper, lower, batch):
        return self._labels(lower["y"]) + self.draws.setting.gamma * self._labels(upper["x"])

    def regularizer(self, upper, lower):
        return proximal(upper, lower, {"y": "x"})

    def _labels(self, y: Tensor) -> Tensor:
        return 0.5 * y @ self.draws.S_train[self.seed] @ y - self.draws.g_train[self.seed] @ y


@pytest.mark.parametrize(("arm", "solver"), [("identity", Identity()), ("CG(3)", CG(3, None)), ("solve", Dense())])
def test_a_step_is_along_the_librarys_hypergradient(arm: str, solver: Solver) -> None:
    draws, seed = draw(SETTING, 3), 1
    x = draws.a + 0.1
    y = draws.lower(x, x)
    p = direction_of(arm, draws.system(2))(draws.gradient(y)) + SETTING.gamma * draws.gradient(x)
    assert draws.H_rows is not None
    found = hypergradient(
        Stage(draws, seed),
        {"x": x[seed].clone()},
        {"y": y[seed].clone()},
        Implicit(solver, damping=SETTING.damping),
        upper_batch=None,
        lower_batches=[draws.H_rows[2, seed]],
        on_failure="ignore",
    )
    torch.testing.assert_close(found.grad["x"], p[seed])


def test_the_lower_level_is_solved_or_descends_to_its_solution() -> None:
    draws = draw(SETTING, 2)
    x, y = draws.w, draws.a
    solution = draws.lower(x, y)
    torch.testing.assert_close(draws.stationarity(x, solution), torch.zeros(2, dtype=torch.float64))
    few = draw(replace(SETTING, lower_steps=3), 2)
    rate, weight = 1.0 / (few.h.max() + SETTING.proximity), SETTING.proximity
    stepped = y
    for _ in range(3):
        stepped = stepped - rate * (few.h * (stepped - few.a) + weight * (stepped - x))
    torch.testing.assert_close(few.lower(x, y), stepped)


def test_the_risk_is_that_of_new_data() -> None:
    draws = draw(replace(SETTING, noise=0.5), 1)
    y = draws.a
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400_000, SIZE, dtype=torch.float64, generator=generator) * draws.s.sqrt()
    errors = rows @ (y - draws.w)[0] + 0.5 * torch.randn(len(rows), dtype=torch.float64, generator=generator)
    above_noise = 0.5 * errors.square().mean() - 0.125
    assert float(above_noise) == pytest.approx(float(draws.risk(y)), rel=0.05)


def test_gradient_and_validation_loss_are_of_the_drawn_labels() -> None:
    draws = draw(SETTING, 2)
    y = draws.a.clone().requires_grad_()
    (slope,) = torch.autograd.grad(draws.validation(y).sum(), y)
    torch.testing.assert_close(slope, times(draws.S_val, draws.a) - draws.g_val)
    assert not torch.equal(draws.S_train, draws.S_val)


def test_a_seeds_draws_do_not_depend_on_the_others() -> None:
    together, alone = draw(SETTING, 3, first=5), draw(SETTING, 1, first=7)
    for name in ("a", "w", "S_train", "g_train", "S_val", "g_val"):
        torch.testing.assert_close(getattr(together, name)[2:], getattr(alone, name), rtol=0.0, atol=0.0)
    assert together.H_rows is not None
    assert alone.H_rows is not None
    torch.testing.assert_close(together.H_rows[:, 2:], alone.H_rows, rtol=0.0, atol=0.0)


def test_conjugate_gradients_end_at_the_solution_and_stay_there() -> None:
    A = draw(SETTING, 3).system(0)
    v = torch.randn(2, 3, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = conjugate_gradients(A, v, 3 * SIZE)
    torch.testing.assert_close(times(A, found), v)


@pytest.mark.parametrize("arm", ["fine-tuning", "identity", "solve"])
def test_rates_are_within_what_converges(arm: str) -> None:
    draws = draw(replace(BASE, gamma=0.0), 2)
    mobility = torch.diag(draws.setting.proximity / (draws.h + draws.setting.proximity))
    identity = torch.eye(SIZE, dtype=torch.float64)
    p = identity if arm != "solve" else torch.linalg.inv(draws.system(0))
    move = (identity if arm == "fine-tuning" else mobility) @ p @ draws.S_train
    L = largest_curvature(draws, arm)[:, None, None]
    grows = [float(torch.linalg.eigvals(identity - rate / L * move).abs().max()) for rate in (max(RATES), 2.01)]
    assert grows[0] < 1.0 + 1e-9
    assert grows[1] > 1.005


def test_each_arm_is_best_where_the_tasks_disagree_as_it_takes_for_granted() -> None:
    """With variances (1 + h/lambda)^-p of the disagreement: p = 0 fine-tuning, 1 x = v, 2 the solve."""
    for power, best in enumerate(("fine-tuning", "identity", "solve")):
        draws = draw(replace(BASE, matched=True, flatness=float(power)), 60)
        risks = {arm: float(train(draws, arm).risk.mean()) for arm in ("fine-tuning", "identity", "solve")}
        assert min(risks, key=risks.__getitem__) == best


def test_a_training_that_diverges_is_not_chosen() -> None:
    draws = draw(replace(BASE, labels=10, noise=3.0, disagreement=0.1, alternations=400), 20)
    found = train(draws, "solve")
    assert bool(torch.isfinite(found.risk).all())
    assert bool((found.fall >= 0.0).all())
