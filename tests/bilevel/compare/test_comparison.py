"""`compare_solvers` against dense algebra, and what its advice says of known spectra."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import CG, Identity, Neumann, Params, Problem, functional_call, proximal, tree
from bilevel.compare import SolverReport, compare_solvers, standard_solvers
from bilevel.linear import Solver
from bilevel.lower import FixedPointProblem
from tests.bilevel.compare.points import ALL, FEW, Point

WELL = torch.linspace(0.5, 2.0, 12).tolist()
ILL = torch.logspace(-3, 0, 12).tolist()
INDEFINITE = [-1.0, -0.4, *torch.linspace(0.3, 4.0, 10).tolist()]
NEAR_ONE = torch.linspace(0.9995, 1.0005, 12).tolist()


PLAIN = {name: standard_solvers()[name] for name in ("CG", "Neumann", "Identity", "MINRES", "CG, recycled")}


def compare(point: Point, **changed: Any) -> SolverReport:
    return compare_solvers(**{**point.arguments, "solvers": PLAIN, "iterations": FEW, "seconds": ALL, **changed})


def points(report: SolverReport, solver: str, use: str = "first") -> list[dict[str, Any]]:
    (row,) = (row for row in report.figures["curves"] if (row["solver"], row["use"]) == (solver, use))
    return row["points"]


@pytest.fixture(scope="module")
def noisy() -> tuple[Point, SolverReport]:
    point = Point(WELL, spread=0.2)
    return point, compare(point)


class TestFigures:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(
        ("name", "make"), [("CG", lambda n: CG(n, None)), ("Neumann", Neumann), ("Identity", lambda n: Identity())]
    )
    def test_errors_are_those_of_dense_algebra(self, dtype: torch.dtype, name: str, make: Any) -> None:
        point = Point(WELL, dtype=dtype)
        report = compare(point, solvers={name: make}, iterations=(1, 2, 4))
        for made in points(report, name):
            for index, error in enumerate(made["errors"]):
                solver: Solver = make(made["budget"])
                b = {"y": point.right(index).to(dtype)}
                found = solver.solve(lambda v: {"y": point.problem.matrix @ v["y"]}, b)
                exact = point.solution(index)
                expected = float((found.value["y"].double() - exact).norm() / exact.norm())
                assert error == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 else 1e-3)
                assert made["products"][index] == found.num_hvps

    def test_later_right_hand_sides_find_the_state(self) -> None:
        report = compare(Point(WELL), solvers={"Neumann": Neumann}, iterations=(3,))
        (first,), (later,) = points(report, "Neumann"), points(report, "Neumann", "later")
        assert (first["products"], later["products"]) == ([7, 7], [3])

    def test_eigenvalues(self) -> None:
        facts = compare(Point(INDEFINITE), solvers={"CG": CG(1, None)}).figures["facts"]
        assert facts["eigenvalues_complete"]
        assert facts["eigenvalues"] == pytest.approx([-1.0, 4.0])

    def test_noise_is_the_standard_error_of_the_solution(self, noisy: tuple[Point, SolverReport]) -> None:
        point, report = noisy
        x, count = point.solution(0), len(point.diagonals)
        moved = [torch.linalg.solve(point.matrix, diagonal * x) for diagonal in point.diagonals]
        squares = sum(float(e.square().sum()) for e in moved)
        expected = math.sqrt(squares / (count * (count - 1))) / float(x.norm())
        assert report.figures["facts"]["noise"] == pytest.approx(expected, rel=1e-8)
        assert report.target == report.figures["facts"]["noise"]

    def test_the_point_is_described(self, noisy: tuple[Point, SolverReport]) -> None:
        point, report = noisy
        facts, x = report.figures["facts"], point.solution(0)
        gradient = point.matrix @ point.y - point.x
        assert facts["stationarity"] == pytest.approx(float(gradient.norm()))
        assert facts["gain"] == pytest.approx(-float(x @ gradient))
        # The cross term is minus the identity, and dF/dx is 1.
        exact, plain = 1.0 + x, 1.0 + point.right(0)
        beside = facts["identity"]
        assert beside["error"] == pytest.approx(float((plain - exact).norm() / exact.norm()))
        assert beside["cosine"] == pytest.approx(float(plain @ exact / (plain.norm() * exact.norm())))
        assert facts["reference"]["solver"] == "Dense"
        assert facts["reference"]["residual"] < 1e-12

    def test_a_large_system_is_solved_by_iterations(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bilevel.compare.reference.DENSE_SIZE", 5)
        for spectrum, solver in ((WELL, "CG"), (INDEFINITE, "MINRES")):
            point = Point(spectrum, dtype=torch.float32, spread=0.1)
            report = compare(point, solvers={"CG": CG(1, None), "Neumann": Neumann(1)})
            facts = report.figures["facts"]
            assert (facts["reference"]["solver"], facts["reference"]["dtype"]) == (solver, "float64")
            assert facts["reference"]["residual"] < 1e-10
            assert facts["eigenvalues"] == pytest.approx([min(spectrum), max(spectrum)], rel=1e-3)
            dense = compare(point, solvers={"CG": CG(1, None)}).figures["facts"]["noise"]
            assert facts["noise"] == pytest.approx(dense, rel=0.2)

    def test_one_batch_is_halved(self) -> None:
        class Rows(Problem):
            def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
                return 0.5 * (batch @ lower["y"]).square().mean() - (upper["x"] * lower["y"]).sum()

            def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
                return 0.5 * (lower["y"] - batch).square().sum()

        rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = {"y": torch.ones(4, dtype=torch.float64)}
        arguments: dict[str, Any] = {"upper": {"x": y["y"]}, "lower": y, "upper_batches": [rows[0]], "seconds": ALL}
        report = compare_solvers(Rows(), **arguments, lower_batches=[rows], solvers={"CG": CG(2, None)})
        facts = report.figures["facts"]
        assert facts["noise_from"] == "halves"
        A = rows.T @ rows / 200
        x = torch.linalg.solve(A, y["y"] - rows[0])
        half = 0.5 * (rows[:100].T @ rows[:100] - rows[100:].T @ rows[100:]) / 100 @ x
        expected = float(torch.linalg.solve(A, half).norm() / x.norm())
        assert facts["noise"] == pytest.approx(expected, rel=1e-8)
        assert any("halves" in sentence for sentence in report.advice)


class TestAdvice:
    def test_well_conditioned(self) -> None:
        report = compare(Point(WELL))
        assert report.recommended == "CG"
        assert any(sentence.startswith("Both CG and Neumann get there") for sentence in report.advice)
        assert report.target == 1e-2

    def test_ill_conditioned(self) -> None:
        report = compare(Point(ILL))
        assert report.recommended == "CG"
        assert any("Neumann does not: Neumann has an error of" in sentence for sentence in report.advice)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_indefinite(self, dtype: torch.dtype) -> None:
        report = compare(Point(INDEFINITE, dtype=dtype))
        assert report.recommended == "MINRES"
        (sentence,) = (s for s in report.advice if "negative curvature" in s)
        assert "a tikhonov of about 1.5" in sentence
        assert any("Neither CG nor Neumann gets there: " in s for s in report.advice)

    def test_near_the_identity(self) -> None:
        report = compare(Point(NEAR_ONE))
        assert report.recommended == "Identity"
        assert any(sentence.startswith("Identity, without any product, is as good") for sentence in report.advice)

    def test_noise_is_what_is_enough(self, noisy: tuple[Point, SolverReport]) -> None:
        _, report = noisy
        made = next(p for p in points(report, "CG") if max(p["errors"]) <= report.target)
        assert made["budget"] < 12
        assert f'CG({made["budget"]}, None), or CG(50, "noise")' in report.advice[0]

    def test_batches_that_hardly_tell(self) -> None:
        report = compare(Point(ILL, spread=1.0))
        assert any("More lower batches come before a better solver" in s for s in report.advice)
        assert report.target == 1e-2

    def test_what_time_does_not_suffice_for_is_said(self) -> None:
        report = compare(Point(WELL), solvers=None, seconds=1e-9)
        assert {row["solver"] for row in report.figures["curves"]} == {"CG", "Neumann"}
        assert all(len(row["points"]) == 1 for row in report.figures["curves"])
        said = " ".join(str(report).split())
        assert "The time of 1e-09 seconds did not suffice for all: only 1 of 2 upper batches were taken; CG" in said
        assert "MINRES was not measured" in said

    @pytest.mark.parametrize("solvers", [{"CG": 1, "Neumann": 1}, {"CG": 8, "Neumann": 1}])
    def test_a_curve_that_the_time_cut_does_not_say_what_more_of_it_would(self, solvers: dict[str, int]) -> None:
        figures = json.loads(json.dumps(compare(Point(ILL)).figures))
        points = {(row["solver"], row["use"]): row for row in figures["curves"]}
        for name, count in solvers.items():
            for use in ("first", "later"):
                row = points[name, use]
                row["cut"], row["points"] = True, row["points"][:count]
        figures["curves"] = [row for row in figures["curves"] if row["solver"] in solvers]
        said = SolverReport(figures).advice
        if solvers["CG"] == 1:
            assert any(s.startswith("Neither CG nor Neumann gets there within the time: ") for s in said)
            assert said[0].startswith("No solver gets to a relative error of 0.01 (taken as enough) within the time; ")
        else:
            assert any("; Neumann not within the time: Neumann has an error of" in s for s in said)
        assert not any("does not" in s or "with what was tried" in s for s in said)

    def test_a_hypergradient_that_is_zero_has_no_relative_error(self) -> None:
        point = Point(WELL)
        # The cross term is minus the identity and dF/dx is 1: it is 1 + x, with A x = y - t.
        point.upper_batches = [point.y + point.matrix @ torch.ones(len(WELL), dtype=torch.float64)]
        report = compare(point)
        assert report.figures["facts"]["identity"] is None
        (sentence,) = (s for s in report.advice if s.startswith("Identity"))
        assert "the hypergradient is zero to rounding at this point" in sentence
        assert "cosine" not in sentence

    @pytest.mark.parametrize("value", [math.nan, math.inf, None])
    @pytest.mark.parametrize("name", ["stationarity", "gradient_noise", "gain", "loss"])
    def test_what_is_not_finite_is_not_told_as_a_number(
        self, noisy: tuple[Point, SolverReport], name: str, value: float | None
    ) -> None:
        figures = noisy[1].figures
        report = SolverReport({**figures, "facts": {**figures["facts"], name: value}})
        (sentence,) = (s for s in report.advice if s.startswith("The lower gradient"))
        assert not any(word in sentence for word in ("nan", "inf ", "None"))
        assert ("is not finite at this point" in sentence) == (name == "stationarity")
        assert ("would change the upper loss" in sentence) == (name == "gradient_noise")
        assert sentence.count("what the batches leave open") == (name in ("gain", "loss"))

    def test_a_reference_that_is_not_solved_names_no_solver(self) -> None:
        report = compare(Point(torch.logspace(-6, 0, 40).tolist()), seconds=1e-9)
        assert report.recommended is None
        assert report.advice[0].startswith(
            "No solver can be named: CG, which the others are measured against, was left"
        )
        assert "Give more seconds" in report.advice[0]
        # What is told by x is not told of an x that is not known.
        said = " ".join(report.advice)
        assert "The lower gradient has a norm of" in said
        assert "would change" not in said

    def test_eigenvalues_that_were_met_bound_the_condition_number_from_below(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = {"CG": CG(20, None)}
        assert "a condition number of 4." in " ".join(compare(Point(WELL), solvers=one).advice)
        monkeypatch.setattr("bilevel.compare.reference.DENSE_SIZE", 5)
        assert "a condition number of at least 4." in " ".join(compare(Point(WELL), solvers=one).advice)


class Net(Problem):
    """A network with BatchNorm and dropout in float32, and a proximal regularizer."""

    regularization_weight = 2.0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(self.module, lower, (batch[0],)), batch[1])

    def upper_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.lower_objective(upper, lower, batch)

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


def of_network(problem: Net, **changed: Any) -> SolverReport:
    y = {name: p.detach().clone() for name, p in problem.module.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(5)]
    arguments: dict[str, Any] = {"upper_batches": batches[:2], "lower_batches": batches[2:], "seconds": ALL}
    return compare_solvers(problem, y, y, **{**arguments, "iterations": (1, 2, 4, 8), **changed})


class TestNetworks:
    def test_nothing_is_written(self) -> None:
        problem = Net()
        buffers = {name: buffer.clone() for name, buffer in problem.module.named_buffers()}
        state = torch.get_rng_state()
        of_network(problem, solvers={"CG": CG(2, None)})
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in problem.module.named_buffers())
        assert all(p.grad is None for p in problem.module.parameters())

    def test_all_systems_have_the_same_masks(self) -> None:
        """Of random masks, so that solvers and the reference are of one system: enough iterations are exact."""
        report = of_network(Net(), solvers={"CG": lambda n: CG(n, None)}, iterations=(25,))
        assert points(report, "CG")[-1]["error"]["median"] < 1e-4
        again = of_network(Net(), solvers={"CG": lambda n: CG(n, None)}, iterations=(25,))
        assert [p["errors"] for p in points(again, "CG")] == [p["errors"] for p in points(report, "CG")]

    def test_a_problem_that_does_not_compute_in_float64(self) -> None:
        class Writes(Net):
            def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
                kept = torch.zeros(1)
                kept[0] = 1.0
                if kept.dtype == torch.float64:
                    raise RuntimeError("only float32 here")
                return super().lower_objective(upper, lower, batch) * kept[0]

        report = of_network(Writes(), solvers={"CG": lambda n: CG(n, None)})
        assert report.figures["facts"]["reference"]["dtype"] == "float32"
        assert "The problem does not compute in float64 (only float32 here)" in report.advice[-1]

    def test_standard_solvers(self) -> None:
        report = of_network(Net(), iterations=(2,))
        assert {row["solver"] for row in report.figures["curves"]} == set(standard_solvers())
        assert not report.figures["cuts"]
        assert len(report.figures["successive"]) > 5
        assert all(math.isfinite(row["error"]) for row in report.figures["successive"])


class TestBadInput:
    def test_upper_batches(self) -> None:
        point = Point(WELL)
        for given in (DataLoader(TensorDataset(torch.zeros(2))), [], point.upper_batches[0], iter([1])):
            with pytest.raises(TypeError, match="upper_batches must be a list of one or more batches"):
                compare(point, upper_batches=given)

    def test_lower_batches(self) -> None:
        with pytest.raises(TypeError, match="lower_batches must be a sequence of batches"):
            compare(Point(WELL), lower_batches=torch.zeros(2))

    @pytest.mark.parametrize("given", [{}, CG(), {"CG": 3}, {"CG": lambda n: n}])
    def test_solvers(self, given: Any) -> None:
        with pytest.raises(TypeError, match="solvers"):
            compare(Point(WELL), solvers=given)

    @pytest.mark.parametrize("given", [(), (0, 1), (2, 1), (1, 1)])
    def test_iterations(self, given: Any) -> None:
        with pytest.raises(ValueError, match="iterations"):
            compare(Point(WELL), iterations=given)

    def test_seconds(self) -> None:
        with pytest.raises(ValueError, match="seconds must be a positive number, got 0"):
            compare(Point(WELL), seconds=0)

    def test_no_right_hand_side(self) -> None:
        point = Point(WELL)
        with pytest.raises(ValueError, match=r"upper_batches\[1\]: dF/dy is zero"):
            compare(point, upper_batches=[point.upper_batches[0], tree.flatten(point.lower)])

    def test_not_finite(self) -> None:
        point = Point(WELL)
        point.problem.matrix[0, 0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            compare(point)

    def test_no_solution(self) -> None:
        with pytest.raises(ValueError, match=r"upper_batches\[0\]: the system of this right-hand side has no solution"):
            compare(Point([0.0, *WELL]))


class Map(FixedPointProblem):
    """y = M y + x, F = 1/2 ||y - t||^2."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def fixed_point_map(self, upper: Params, lower: Params, batch: Any) -> Params:
        return {"y": self.matrix @ lower["y"] + upper["x"]}

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return 0.5 * (lower["y"] - batch).square().sum()


class TestNotSymmetric:
    @staticmethod
    def report(radius: float) -> tuple[SolverReport, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        matrix *= radius / torch.linalg.eigvals(matrix).abs().max()
        x = torch.randn(8, generator=generator, dtype=torch.float64)
        A = torch.eye(8, dtype=torch.float64) - matrix
        y = torch.linalg.solve(A, x)
        targets = [torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2)]
        arguments: dict[str, Any] = {"upper_batches": targets, "lower_batches": [None], "seconds": ALL}
        report = compare_solvers(Map(matrix), {"x": x}, {"y": y}, **arguments, iterations=(1, 4, 10))
        return report, A, y - targets[0]

    def test_a_map_that_contracts(self) -> None:
        report, A, b = self.report(0.3)
        assert {row["solver"] for row in report.figures["curves"]} == set(standard_solvers(symmetric=False))
        assert any(sentence.startswith("Both GMRES and adjoint iteration get there") for sentence in report.advice)
        # The iteration's terms by hand.
        exact, w = torch.linalg.solve(A.T, b), b
        for made in points(report, "adjoint iteration")[:1]:
            for _ in range(made["budget"]):
                w = w + b - A.T @ w
            errors = float((b - exact).norm() / exact.norm()), float((w - exact).norm() / exact.norm())
            assert min(errors) * (1 - 1e-9) <= made["errors"][0] <= max(errors) * (1 + 1e-9)
        assert points(report, "GMRES")[-1]["error"]["median"] < 1e-10

    def test_a_map_that_does_not(self) -> None:
        report, _, _ = self.report(3.0)
        assert report.recommended == "GMRES"
        assert any("GMRES gets there" in s and "adjoint iteration does not" in s for s in report.advice)
        assert any("A is not symmetric" in sentence for sentence in report.advice)
        assert "residual" in " ".join(report.advice)
        assert report.figures["facts"]["eigenvalues"] is None
