"""The finite sums: problems against dense algebra and benchmark_bilevel's recipe, the exact F, counters, short runs.

Parts in JAX need jax, and the solvers a checkout of benchmark_bilevel in the environment variable BENCHMARK_BILEVEL.
"""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.race.finite_sums import measure, run, tables
from benchmarks.race.finite_sums.contestants import METHODS, Contestant, Entry, Look, OwnContestant, own
from benchmarks.race.finite_sums.jax_contestants import SOLVERS, JaxContestant, objectives, one_thread, peers
from benchmarks.race.finite_sums.problems import (
    BATCH,
    FiniteSum,
    Steps,
    data_cleaning,
    hyperparameter_selection,
    quadratics,
)
from benchmarks.race.finite_sums.reduced import ReducedQuadratic, ReSolved
from benchmarks.race.problems import Batch
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks/results/finite_sums.json"
PAGE = ROOT / "docs/peers.md"
CHECKOUT = Path(os.environ.get("BENCHMARK_BILEVEL", "nowhere"))
needs_checkout = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None
    or importlib.util.find_spec("benchopt") is None
    or not (CHECKOUT / "solvers/saba.py").is_file(),
    reason="no jax, no benchopt, or no checkout of benchmark_bilevel in the environment variable BENCHMARK_BILEVEL",
)
SMALL = {
    "quadratics": lambda: quadratics(samples=2 * BATCH, size=6, budget=8_000),
    "data cleaning": lambda: data_cleaning(samples=2 * BATCH, clean=BATCH, budget=8_000),
    "hyperparameter selection": lambda: hyperparameter_selection(samples=2 * BATCH, above=BATCH, budget=8_000),
}


@pytest.fixture(params=list(SMALL))
def problem(request: pytest.FixtureRequest) -> FiniteSum:
    return SMALL[request.param]()


def in_double(problem: FiniteSum) -> FiniteSum:
    data = [
        tuple(t.double() if t.is_floating_point() else t for t in d) for d in (problem.lower_data, problem.upper_data)
    ]
    return replace(
        problem, upper=problem.upper.double(), lower=problem.lower.double(), lower_data=data[0], upper_data=data[1]
    )


def test_losses_are_means_over_samples(problem: FiniteSum) -> None:
    """So that the mean over blocks is the loss of all, but for what does not depend on the sample."""
    problem, generator = in_double(problem), torch.Generator().manual_seed(0)
    x = torch.randn(problem.upper.shape, generator=generator, dtype=torch.float64)
    y = torch.randn(problem.lower.shape, generator=generator, dtype=torch.float64)
    for loss, data in ((problem.lower_loss, problem.lower_data), (problem.upper_loss, problem.upper_data)):
        samples = [tuple(t[i : i + 1] for t in data) for i in range(len(data[0]))]
        mean = torch.stack([loss(x, y, one) for one in samples]).mean()
        torch.testing.assert_close(mean, loss(x, y, data), rtol=1e-12, atol=0.0)


def test_quadratic_loss_by_its_matrices() -> None:
    problem, generator = in_double(SMALL["quadratics"]()), torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    A, B, C, a, b = (t.mean(0) for t in problem.lower_data[1:])
    value = problem.lower_loss(x, y, problem.lower_data)
    assert value.item() == pytest.approx((0.5 * y @ A @ y + 0.5 * x @ B @ x + x @ C @ y + a @ y + b @ x).item())
    d_x, d_y = torch.autograd.grad(value, (x, y))
    torch.testing.assert_close(d_x, B @ x + C @ y + b)
    torch.testing.assert_close(d_y, A @ y + C.T @ x + a)


def test_recipe_of_the_quadratics() -> None:
    """Samples of rank one, whose means tend to the eigenvalues and singular values of the recipe."""
    problem = quadratics(samples=40_000, size=5)
    A, B, C = (t.double() for t in problem.lower_data[1:4])
    assert all(int(torch.linalg.matrix_rank(M[0].float())) == 1 for M in (A, B, C))
    expected = torch.logspace(-1, 0, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(A.mean(0)), expected, rtol=0.05, atol=0.0)
    singular = torch.linalg.eigvalsh(B.mean(0))
    assert singular[0] == pytest.approx(0.0, abs=1e-8)
    torch.testing.assert_close(singular[1:], torch.logspace(-1, 0, 4, dtype=torch.float64), rtol=0.05, atol=0.0)
    torch.testing.assert_close(torch.linalg.svdvals(C.mean(0)), torch.full((5,), 0.1).double(), rtol=0.1, atol=0.0)
    assert (problem.upper == -2.0).all()
    assert (problem.lower == 0.0).all()


def test_recipe_of_data_cleaning() -> None:
    problem = data_cleaning()
    _, Z, labels = problem.lower_data
    assert Z.shape == (1152, 64)
    assert problem.upper.shape == (1152,)
    assert problem.lower.shape == (640,)
    torch.testing.assert_close(Z.double().mean(0), torch.zeros(64).double(), atol=1e-6, rtol=0.0)
    assert set(Z.double().std(0, correction=0).round(decimals=4).tolist()) <= {0.0, 1.0}
    uncorrupted = data_cleaning(wrong=0.0).lower_data[2]
    # Half of the labels are drawn anew, and one in ten of those is right.
    assert float((labels != uncorrupted).double().mean()) == pytest.approx(0.45, abs=0.05)


def test_recipe_of_hyperparameter_selection() -> None:
    problem = hyperparameter_selection()
    (_, Z, t), (_, _, above) = problem.lower_data, problem.upper_data
    assert Z.shape == (4992, 22)
    assert len(above) == 9152
    assert (Z[:, :10].sum(1) == 1.0).all()
    assert Z.abs().max() <= 1.0
    assert set(t.tolist()) == {-1.0, 1.0}
    assert 0.05 < float((t > 0).double().mean()) < 0.2
    assert problem.upper.exp().max() < 1.0


def test_exact_value_of_the_quadratics_by_dense_algebra() -> None:
    problem = in_double(SMALL["quadratics"]())
    A, _, C, a, _ = (t.mean(0) for t in problem.lower_data[1:])
    x = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    y = -torch.linalg.solve(A, C.T @ x + a)
    expected = problem.upper_loss(x, y, problem.upper_data)
    assert problem.reduced.value(x) == pytest.approx(expected.item(), rel=1e-5)


def test_exact_solution_is_stationary(problem: FiniteSum) -> None:
    reduced = problem.reduced
    if isinstance(reduced, ReducedQuadratic):
        best = -torch.linalg.solve(reduced.hessian, reduced.linear)
        moved = [reduced.value(best + 1e-2 * step) for step in torch.eye(len(best), dtype=torch.float64)]
        assert min(moved) > reduced.lowest()
        return
    assert isinstance(reduced, ReSolved)
    x = problem.upper.double()
    y = reduced.solution(x).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reduced.lower_loss(x, y, reduced.below), y)
    assert gradient.norm() < 1e-9
    slope = torch.linspace(-1.0, 1.0, len(x), dtype=torch.float64)
    difference = (reduced.value(x + 1e-4 * slope) - reduced.value(x - 1e-4 * slope)) / 2e-4
    assert float(reduced.gradient(x) @ slope) == pytest.approx(difference, rel=1e-5)


def test_solution_gradient_and_lowest_value_in_closed_form() -> None:
    """G = (y - 1)^2 / 2 + exp(x) y^2 / 2 has y* = 1 / (1 + exp(x)); F = (y - 1/4)^2 / 2 is 0 at x = log 3."""

    def lower_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return 0.5 * ((y - 1.0).square() + x.exp() * y.square()).sum()

    def upper_loss(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        return 0.5 * (y - 0.25).square().sum()

    reduced = ReSolved(torch.tensor([-1.0]), torch.zeros(1), lower_loss, (), upper_loss, ())
    x = torch.tensor([0.5], dtype=torch.float64)
    y = 1.0 / (1.0 + x.exp())
    torch.testing.assert_close(reduced.solution(x), y, rtol=1e-9, atol=0.0)
    assert reduced.value(x) == pytest.approx(float(0.5 * (y - 0.25).square()), rel=1e-9)
    torch.testing.assert_close(reduced.gradient(x), -(y - 0.25) * y.square() * x.exp(), rtol=1e-9, atol=0.0)
    assert reduced.lowest() == pytest.approx(0.0, abs=1e-10)


def rounds(contestant: Contestant, chunks: int, steps: Steps) -> list[Tensor]:
    seen: list[Tensor] = []

    def look(x: Tensor) -> bool:
        seen.append(x.clone())
        return len(seen) <= chunks

    contestant.run(steps, 1, look)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_own_methods_go_down(name: str) -> None:
    problem = SMALL["quadratics"]()
    contestant = OwnContestant(problem, METHODS[name])
    first, *_, last = rounds(contestant, 3, Steps(0.1, 1.0))
    assert torch.equal(first, problem.upper)
    assert problem.reduced.value(last) < problem.reduced.value(first)


def test_other_problems_go_down() -> None:
    for name, steps in (("data cleaning", Steps(0.3, 1e-3)), ("hyperparameter selection", Steps(1.0, 0.3))):
        problem = replace(SMALL[name](), budget=2_000)
        *_, last = rounds(OwnContestant(problem, METHODS["SABA"]), 4, steps)
        assert problem.reduced.value(last) < problem.reduced.value(problem.upper)


SAMPLES = {"SOBA": 4, "MA-SOBA": 4, "SABA": 4, "FSLA": 8, "F2SA": 5}
"""Oracle calls an iteration, in batches: at G a gradient, Hv and the cross product, at F a gradient; FSLA takes these
at two points; F2SA a gradient of F and gradients of G in x and y at two points."""


@pytest.mark.parametrize(("name", "calls"), SAMPLES.items())
def test_oracle_calls_of_an_iteration(name: str, calls: int) -> None:
    problem = replace(SMALL["hyperparameter selection"](), chunk=1)
    contestant = OwnContestant(problem, METHODS[name])
    after, before = contestant.counts[-1], contestant.counts[-2]
    assert after - before == calls * BATCH * problem.chunk
    # Beyond what was counted it goes on at the mean rate.
    assert contestant.oracles(20 * (len(contestant.counts) - 1)) == pytest.approx(20 * after)
    assert contestant.oracles(len(contestant.counts) - 2) == before


class Line(Contestant):
    """x goes down a line, one unit an iteration, two calls each."""

    def run(self, steps: Steps, seed: int, look: Look) -> None:
        x = self.problem.upper.clone()
        while look(x):
            x = x - steps.size

    def oracles(self, chunks: float) -> float:
        return 2.0 * chunks


class Height:
    """F = x."""

    def value(self, x: Tensor) -> float:
        return float(x[0])

    def lowest(self) -> float:
        return 0.0


def line(budget: int) -> FiniteSum:
    height: ReducedQuadratic = Height()  # pyright: ignore[reportAssignmentType]
    return replace(
        SMALL["quadratics"](),
        upper=torch.tensor([10.0]),
        reduced=height,
        chunk=1,
        budget=budget,
        grid=(Steps(1.0, 1.0),),
    )


def test_a_run_ends_at_the_last_target_or_the_budget() -> None:
    problem = line(100)
    curve = measure.run(problem, Line(problem), Steps(1.0, 1.0), 0, [5.0, 2.0], 100)
    assert curve["values"] == [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    assert curve["iterations"] == list(range(9))
    assert curve["oracles"] == [2 * k for k in range(9)]
    assert curve["seconds"] == sorted(curve["seconds"])
    assert [measure.reached(curve, target) for target in (9.5, 5.0, 1.0)] == [1, 5, None]
    assert measure.run(problem, Line(problem), Steps(1.0, 1.0), 0, [-1.0], 6)["iterations"] == [0, 1, 2, 3]


def test_looks_grow_apart() -> None:
    curve = measure.run(line(1000), Line(line(1000)), Steps(0.0, 1.0), 0, [0.0], 200)
    assert curve["iterations"][:12] == list(range(12))
    assert curve["iterations"][-1] == 100
    assert len(curve["iterations"]) < 45


def test_a_run_that_diverges_or_fails_says_so() -> None:
    problem = line(1000)
    curve = measure.run(problem, Line(problem), Steps(float("inf"), 1.0), 0, [0.0], 100)
    assert curve["failure"] == "not finite"
    assert curve["values"] == [10.0]

    class Broken(Line):
        def run(self, steps: Steps, seed: int, look: Look) -> None:
            raise ValueError("does not start")

    assert (
        measure.run(problem, Broken(problem), Steps(1.0, 1.0), 0, [0.0], 100)["failure"] == "ValueError: does not start"
    )


def test_best_steps() -> None:
    def tried(oracles: list[int], values: list[float], **failure: str) -> measure.Figures:
        return {"curve": {"oracles": oracles, "values": values, **failure}}

    slow, fast = tried([0, 9, 20], [5.0, 2.0, 0.5]), tried([0, 4, 9], [5.0, 2.0, 0.5])
    near, nearer = tried([0, 1], [5.0, 2.5]), tried([0, 1], [5.0, 2.2])
    lost = tried([0], [5.0], failure="not finite")
    assert measure.best_of([lost, slow, fast, near], [2.0, 1.0]) is fast
    assert measure.best_of([near, nearer, lost], [2.0, 1.0]) is nearer


def test_tables() -> None:
    curve = {
        "iterations": [0, 8, 16],
        "seconds": [0.0, 0.25, 0.5],
        "oracles": [0, 2000, 4000],
        "values": [10.0, 0.8, 0.05],
    }
    missed = {**curve, "values": [10.0, 0.8, 0.5]}
    row = {"method": "SOBA (JAX)", "size": 0.1, "ratio": 1.0, "curves": [curve, curve, missed]}
    other = {**row, "method": "SABA", "curves": [missed, missed, missed]}
    mine = {**row, "method": "SOBA"}
    failures = {"absent": "ImportError: nowhere"}
    shown = {"problem": "p", "start": 10.0, "lowest": 0.0, "rows": [other, mine, row], "failures": failures}
    header, rows = tables.problem_table(shown)
    assert header[1:4] == ["to 90%", "to 99%", "to 99.9%"]
    assert [r[0] for r in rows] == ["SABA", "SOBA", "SOBA (JAX)", "absent"]
    assert rows[1][1:] == ["0.25 s, 2 k, 8", "0.5 s, 4 k, 16 (2 of 3 runs)", "–", "99.5%", "32", "0.1, 1"]
    assert rows[0][2] == "–"
    assert rows[3][1] == "ImportError: nowhere"
    assert all(len(r) == len(header) for r in rows)


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(problem: FiniteSum) -> Contestant:
        raise RuntimeError("does not start")

    monkeypatch.setattr(run, "peers", lambda checkout: [Entry("absent", "JAX", broken)])
    monkeypatch.setattr(run, "problems", lambda quick: (SMALL["quadratics"](),))
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.svg"
    options = ["--quick", "--methods", "SOBA", "SABA", "absent", "--json", str(figures), "--figure", str(picture)]
    assert run.main(options) == 0
    kept = json.loads(figures.read_text(encoding="utf-8"))
    assert [p["problem"] for p in kept["problems"]] == ["quadratics"]
    assert [r["method"] for r in kept["problems"][0]["rows"]] == ["SOBA", "SABA"]
    assert kept["problems"][0]["failures"] == {"absent (JAX)": "RuntimeError: does not start"}
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert "SABA" in capsys.readouterr().out


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        (["--benchmark-bilevel", str(tmp_path)], "name a checkout of it"),
        (["--methods", "nobody"], "no nobody here"),
        (["--check"], "--check needs --docs"),
    ):
        with pytest.raises(SystemExit) as ended:
            run.main(options)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


def test_page_shows_the_kept_figures() -> None:
    assert run.main(["--from", str(KEPT), "--docs", str(PAGE), "--check"]) == 0
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert not kept["quick"]
    titles = {own(name).title for name in METHODS} | {f"{name} (JAX)" for name in SOLVERS}
    for problem in kept["problems"]:
        assert titles <= {row["method"] for row in problem["rows"]}
        assert not problem["failures"]
        assert all(len(row["curves"]) == len(measure.SEEDS) for row in problem["rows"])


@pytest.mark.parametrize("rewritten", [False, True])
def test_objectives_in_jax_are_the_same(problem: FiniteSum, rewritten: bool) -> None:
    one_thread()
    jax = pytest.importorskip("jax", reason="jax is not installed")
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(t.shape, generator=generator).requires_grad_() for t in (problem.upper, problem.lower))
    calls: list[int] = []
    functions = objectives(problem, calls.append, rewritten=rewritten)
    for function, loss, data in zip(
        functions, (problem.lower_loss, problem.upper_loss), (problem.lower_data, problem.upper_data), strict=True
    ):
        batch = tuple(t[BATCH:] if len(t) > BATCH else t for t in data)
        start = len(data[0]) - BATCH
        value = loss(x, y, batch)
        expected = torch.autograd.grad(value, (y, x), allow_unused=True, materialize_grads=True)
        arrays = jnp.asarray(y.detach().numpy()), jnp.asarray(x.detach().numpy())
        found, gradients = jax.value_and_grad(function, (0, 1))(*arrays, start, BATCH)
        assert float(found) == pytest.approx(value.item(), rel=1e-5)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(torch.tensor(one.tolist()), other, rtol=1e-4, atol=1e-5)
    jax.effects_barrier()
    # At G in x and in y, at F once.
    assert calls == [BATCH, BATCH, BATCH]


def test_jaxopt_goes_down() -> None:
    one_thread()
    pytest.importorskip("jaxopt", reason="jaxopt is not installed")
    problem = SMALL["quadratics"]()
    (entry,) = peers(None)
    contestant = entry.prepare(problem)
    values = [problem.reduced.value(x) for x in rounds(contestant, 3, Steps(0.3, 1.0))]
    assert values == sorted(values, reverse=True)
    assert contestant.counts[1] >= 2 * BATCH


@needs_checkout
@pytest.mark.parametrize("name", ["SOBA", "SABA", "SRBA"])
def test_solvers_of_benchmark_bilevel(name: str) -> None:
    """With one block nothing is random: the same x as here, and as many oracle calls an iteration."""
    one_thread()
    problem = quadratics(samples=BATCH, size=6, budget=20_000)
    theirs, ours = JaxContestant(problem, CHECKOUT, SOLVERS[name]), OwnContestant(problem, METHODS[name])
    steps = problem.grid[0]
    for one, other in zip(rounds(theirs, 2, steps), rounds(ours, 2, steps), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # This side's first iteration also looks for curvature that is cut off.
    assert theirs.counts[3] - theirs.counts[2] == ours.counts[3] - ours.counts[2]
