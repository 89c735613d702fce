"""`check_hypergradient` passes what is right and catches every planted defect, on three problems."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Identity, Implicit, Params, Problem, check_hypergradient, hypergradient, proximal


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator), torch.randn(rows, generator=generator)


class Ridge(Problem):
    """Per-feature log-weights, with a direct part."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        X, t = batch
        return 0.5 * (X @ lower["y"] - t).square().mean() + 0.5 * (upper["x"].exp() * lower["y"].square()).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        X, t = batch
        return 0.5 * (X @ lower["y"] - t).square().mean() + 0.1 * upper["x"].sin().sum()


class Proximal(Problem):
    """Not quadratic, pulled to x (iMAML, BiSSL)."""

    regularization_weight = 0.7

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        X, t = batch
        return torch.nn.functional.softplus(-t.sign() * (X @ lower["y"])).mean() + 0.05 * lower["y"].pow(4).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        X, t = batch
        return (X @ lower["y"] - t).square().mean() + 0.3 * (upper["x"] * lower["y"]).sum()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower, {"y": "x"})


class Weighting(Problem):
    """Sample weights; the coupling is in the loss, and x has more entries than there are directions."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        X, t, rows = batch
        losses = torch.log(torch.cosh(X @ lower["y"] - t))
        return (upper["x"][rows].sigmoid() * losses).mean() + 0.1 * lower["y"].square().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        X, t = batch
        return (X @ lower["y"] - t).square().mean() + 0.02 * upper["x"].square().mean()


def newton(problem: Problem, upper: Params, lower: Params, batches: Sequence[Any]) -> Params:
    def objective(y: Tensor) -> Tensor:
        losses = [problem.lower_objective(upper, {"y": y}, batch) for batch in batches]
        penalty = problem.regularizer(upper, {"y": y})
        total = torch.stack(losses).mean()
        return total if penalty is None else total + problem.regularization_weight * penalty

    y = lower["y"]
    for _ in range(30):
        gradient = torch.func.grad(objective)(y)
        y = y - torch.linalg.solve(torch.func.hessian(objective)(y), gradient)
        if gradient.norm() < 1e-14:
            break
    return {"y": y}


@dataclass
class Setting:
    problem: Problem
    upper: Params
    lower: Params
    upper_batch: Any
    lower_batches: list[Any]

    def options(self) -> dict[str, Any]:
        return {"upper_batch": self.upper_batch, "lower_batches": self.lower_batches, "lower_solver": newton}


def setting(name: str) -> Setting:
    X, t = data(40, 5, 0)
    halves: list[Any] = [(X[:15], t[:15]), (X[15:30], t[15:30])]
    x = 0.3 * data(1, 5, 3)[0][0]
    if name == "weighting":
        halves = [(X[:15], t[:15], torch.arange(15)), (X[15:30], t[15:30], torch.arange(15, 30))]
        x = 0.5 * data(1, 30, 4)[0][0]
    problem = {"ridge": Ridge, "proximal": Proximal, "weighting": Weighting}[name]()
    return Setting(problem, {"x": x}, {"y": torch.zeros(5)}, (X[30:], t[30:]), halves)


NAMES = ("ridge", "proximal", "weighting")


@pytest.mark.parametrize("name", NAMES)
def test_a_right_hypergradient_passes(name: str) -> None:
    s = setting(name)
    report = check_hypergradient(s.problem, s.upper, s.lower, **s.options())
    assert report.relative_error < 1e-5
    assert report.uncertainty < 1e-5
    assert report.agrees
    assert report.verdict.startswith("right")
    assert len(report.measured) == 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("defect", ["identity", "sign", "direct", "one batch"])
def test_every_planted_defect_is_caught(name: str, defect: str) -> None:
    s = setting(name)
    right = check_hypergradient(s.problem, s.upper, s.lower, **s.options()).hypergradient
    solver, gradient = None, None
    if defect == "identity":
        solver = Identity()
    elif defect == "sign":
        gradient = {"x": right.direct["x"] - right.implicit["x"]}
    elif defect == "direct":
        gradient = right.implicit
    else:
        y = newton(s.problem, s.upper, s.lower, s.lower_batches)
        # That one batch is far from both may be said too.
        half = {"upper_batch": s.upper_batch, "lower_batches": s.lower_batches[:1]}
        gradient = hypergradient(s.problem, s.upper, y, CG(100, 1e-12), **half, on_failure="ignore").grad
    report = check_hypergradient(s.problem, s.upper, s.lower, solver, gradient=gradient, **s.options())
    assert not report.agrees
    assert report.relative_error > 1e-3
    assert report.verdict.startswith("wrong")
    words = {"identity": "makes no product", "sign": "wrong sign", "direct": "direct part is missing"}
    assert words.get(defect, "differs") in report.verdict


def test_damping_is_checked_against_the_damped_problem() -> None:
    s = setting("proximal")
    report = check_hypergradient(s.problem, s.upper, s.lower, Implicit(CG(200, 1e-10), damping=2.0), **s.options())
    assert report.agrees
    assert report.relative_error < 1e-5
    assert "damped problem" in report.verdict
    assert report.undamped_error is not None
    assert report.undamped_error > 1e-2


def test_a_badly_solved_lower_level_is_not_called_right() -> None:
    s = setting("proximal")
    generator = torch.Generator().manual_seed(0)

    def sloppy(problem: Problem, upper: Params, lower: Params, batches: Sequence[Any]) -> Params:
        solved = newton(problem, upper, lower, batches)["y"]
        return {"y": solved + 1e-3 * torch.randn(solved.shape, generator=generator)}

    options = {**s.options(), "lower_solver": sloppy}
    assert not check_hypergradient(s.problem, s.upper, s.lower, **options).agrees


def test_the_step_finds_its_own_size() -> None:
    s = setting("ridge")
    small = {"x": s.upper["x"] - 6.0}
    report = check_hypergradient(s.problem, small, s.lower, **s.options())
    assert report.agrees
    assert report.steps[0] > report.steps[1] > 0.0


def test_the_report_prints_its_numbers() -> None:
    s = setting("ridge")
    text = str(check_hypergradient(s.problem, s.upper, s.lower, directions=2, **s.options()))
    assert len(re.findall(r"^ +\d  [+-]", text, re.MULTILINE)) == 2
    assert "relative error" in text


class RawWeight(Problem):
    """The ridge weight itself is the upper variable: a step of its size makes the lower problem indefinite."""

    def __init__(self) -> None:
        (self.X, self.t), (self.X_val, self.t_val) = data(20, 30, 5), data(15, 30, 6)

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return 0.5 * (self.X @ lower["y"] - self.t).square().mean() + 0.5 * upper["w"] * lower["y"].square().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return 0.5 * (self.X_val @ lower["y"] - self.t_val).square().mean()


def exactly(problem: Any, upper: Params, lower: Params, batches: Sequence[Any]) -> Params:
    H = problem.X.T @ problem.X / 20 + upper["w"] * torch.eye(30)
    return {"y": torch.linalg.solve(H, problem.X.T @ problem.t / 20)}


@pytest.mark.parametrize("weight", [1e-5, 1e-4, 1e-3, 1e-2, 1.0])
def test_a_weight_that_must_stay_positive(weight: float) -> None:
    problem, upper, lower = RawWeight(), {"w": torch.tensor(weight)}, {"y": torch.zeros(30)}
    options: dict[str, Any] = {
        "upper_batch": None,
        "lower_batches": [None],
        "lower_solver": exactly,
        "method": CG(2000, 1e-12),
    }
    right = check_hypergradient(problem, upper, lower, **options)
    assert right.agrees
    assert right.relative_error < 1e-5
    assert right.verdict.startswith("right")
    # The derivative of the closed form, by hand: dF/dw = -v' H^-1 y.
    y, H = exactly(problem, upper, lower, [])["y"], problem.X.T @ problem.X / 20 + weight * torch.eye(30)
    v = problem.X_val.T @ (problem.X_val @ y - problem.t_val) / 15
    assert right.measured[0] == pytest.approx(-float(v @ torch.linalg.solve(H, y)), rel=1e-4)
    off = check_hypergradient(problem, upper, lower, gradient={"w": 1.01 * right.hypergradient.grad["w"]}, **options)
    assert off.verdict.startswith("wrong")
    assert off.relative_error == pytest.approx(0.01, rel=1e-2)


class Wave(Problem):
    """y* = sin(k x)."""

    def __init__(self, wavenumber: float) -> None:
        self.wavenumber = wavenumber

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return 0.5 * (lower["y"] - torch.sin(self.wavenumber * upper["x"])).square()

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return lower["y"]


def check_wave(wavenumber: float, x: Tensor) -> tuple[Any, int]:
    """The check's report, and how often it solved the lower problem."""
    solves = [0]

    def solve(problem: Problem, upper: Params, lower: Params, batches: Sequence[Any]) -> Params:
        solves[0] += 1
        return {"y": torch.sin(wavenumber * upper["x"])}

    options: dict[str, Any] = {"upper_batch": None, "lower_batches": [None], "lower_solver": solve}
    return check_hypergradient(Wave(wavenumber), {"x": x}, {"y": torch.zeros_like(x)}, **options), solves[0]


@pytest.mark.parametrize(
    ("wavenumber", "x"), [(1.0, 0.0), (1e3, 0.0), (1e3, 3e-4), (1e6, 3e-4), (1e3, 1.0), (1.0, 1e-12), (1e3, 100.0)]
)
def test_steps_far_from_the_scale_of_the_function(wavenumber: float, x: float) -> None:
    report, _ = check_wave(wavenumber, torch.tensor(x))
    assert report.verdict.startswith("right")
    assert report.measured[0] == pytest.approx(wavenumber * math.cos(wavenumber * x), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_no_step_resolves_is_undecided(dtype: torch.dtype) -> None:
    report, _ = check_wave(1e8, torch.tensor(1.0, dtype=dtype))
    assert not report.agrees
    assert report.verdict.startswith("undecided")


def test_a_smooth_function_takes_few_solves() -> None:
    assert check_wave(1.0, torch.tensor(0.7))[1] <= 1 + 2 * 6
    assert check_wave(1.0, torch.tensor(0.7, dtype=torch.float32))[1] <= 1 + 2 * 6


def test_a_direction_without_effect_is_measured_beside_the_others() -> None:
    class Idle(Wave):
        def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return 0.5 * (lower["y"] - torch.sin(upper["x"][1] + 1e-30 * upper["x"][0])).square()

    report = check_hypergradient(
        Idle(1.0),
        {"x": torch.tensor([0.4, 0.5])},
        {"y": torch.tensor(0.0)},
        upper_batch=None,
        lower_batches=[None],
        lower_solver=lambda problem, upper, lower, batches: {"y": torch.sin(upper["x"][1] + 1e-30 * upper["x"][0])},
    )
    assert report.agrees
    assert report.measured == pytest.approx((0.0, math.cos(0.5)), abs=1e-8)


class ByProperty(Proximal):
    def __init__(self) -> None:
        self.t = 1.0

    @property
    def regularization_weight(self) -> float:  # type: ignore[override]
        return 0.7


@dataclass(frozen=True)
class ByField(Proximal):
    t: float = 1.0
    regularization_weight: float = 0.7


class ByAttribute(Proximal):
    def __init__(self) -> None:
        self.t, self.regularization_weight = 1.0, 0.7

    def lower_outputs(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return batch[0] @ lower["y"]

    def reset_lower(self, upper: Params) -> Params:
        return {"y": upper["x"]}


@pytest.mark.parametrize("kind", [ByProperty, ByField, ByAttribute])
def test_the_damped_problem_is_the_users_but_for_its_weight(kind: type[Any]) -> None:
    s, problem, weights = setting("proximal"), kind(), set[float]()

    def solve(problem: Any, upper: Params, lower: Params, batches: Sequence[Any]) -> Params:
        assert isinstance(problem, kind)
        assert problem.t == 1.0
        if isinstance(problem, ByAttribute):
            assert problem.lower_outputs(upper, lower, batches[0]).shape == (15,)
            assert problem.reset_lower(upper) == {"y": upper["x"]}
        assert [len(chunk[0]) for chunk in problem.split_batch(batches[0], 8)] == [8, 7]
        weights.add(problem.regularization_weight)
        return newton(problem, upper, lower, batches)

    report = check_hypergradient(
        problem, s.upper, s.lower, Implicit(CG(200, 1e-10), damping=2.0), **{**s.options(), "lower_solver": solve}
    )
    assert report.agrees
    assert weights == {0.7 + 2.0, 0.7}
    assert problem.regularization_weight == 0.7


@pytest.mark.parametrize(("field", "value"), [("directions", 0), ("tolerance", 0.0)])
def test_bad_arguments_are_named(field: str, value: float) -> None:
    s = setting("ridge")
    with pytest.raises(ValueError, match=field):
        check_hypergradient(s.problem, s.upper, s.lower, **{**s.options(), field: value})
