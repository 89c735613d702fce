"""The page on choosing a method: its tables are the kept figures, and its sentences hold for them."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import bilevel
from benchmarks.solvers import network as solvers_network
from benchmarks.solvers import run as benchmark
from benchmarks.solvers import systems as solvers_systems
from benchmarks.solvers import tables as solvers_tables
from benchmarks.solvers import trajectory as solvers_trajectory
from bilevel import hypergradients, linear, products
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks/results/solvers.json"
FIGURES: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
PAGE = ROOT / "docs/choosing.md"
OUTCOMES = ROOT / "docs/outcomes.md"
PICTURE = ROOT / "docs/_static/solvers.svg"
EXACT = ("ReverseOverReverse()", "ReverseOverReverse(keep_graph=True)", "ForwardOverReverse()")
DEFINITE = ("A = I", "well-conditioned (8)", "0-dimensional variable", "unused variables, b = 0 there")
FEW, EVEN = "ill-conditioned (1e6), 5 large eigenvalues", "ill-conditioned (1e6), evenly spread"
MODELS = ("CG, Nystrom preconditioner", "Nystrom")


def system(case: str, solver: str, provider: str = "ReverseOverReverse()") -> dict[str, Any]:
    (row,) = (r for r in FIGURES["systems"] if (r["case"], r["solver"], r["provider"]) == (case, solver, provider))
    return row


def network(solver: str, c: float) -> dict[str, Any]:
    (row,) = (r for r in FIGURES["network"]["system"]["solvers"] if (r["solver"], r["c"]) == (solver, c))
    return row


def noise(c: float) -> float:
    (row,) = (r for r in FIGURES["network"]["system"]["systems"] if r["c"] == c)
    return row["noise"]


def product(provider: str, activation: str, dtype: str) -> dict[str, Any]:
    rows = FIGURES["network"]["providers"]
    (row,) = (r for r in rows if (r["provider"], r["activation"], r["dtype"]) == (provider, activation, dtype))
    return row


def trajectory(method: str, steps: int) -> dict[str, Any]:
    (row,) = (r for r in FIGURES["trajectory"] if (r["method"], r["steps"]) == (method, steps))
    return row


def test_pages_show_the_kept_figures() -> None:
    assert benchmark.main(["--from", str(KEPT), "--docs", str(PAGE), str(OUTCOMES), "--check"]) == 0
    assert not FIGURES["quick"]


def test_pages_show_every_table() -> None:
    marked = re.findall(r"^<!-- table (\S+) -->$", PAGE.read_text("utf-8") + OUTCOMES.read_text("utf-8"), re.M)
    assert sorted(marked) == sorted(solvers_tables.tables(FIGURES))


def test_another_figure_is_noticed(tmp_path: Path) -> None:
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    changed = json.loads(json.dumps(FIGURES))
    changed["systems"][0]["products"] += 1
    figures.write_text(json.dumps(changed), encoding="utf-8")
    assert benchmark.main(["--from", str(figures), "--docs", str(page), "--check"]) == 1
    assert benchmark.main(["--from", str(figures), "--docs", str(page)]) == 0
    assert benchmark.main(["--from", str(figures), "--docs", str(page), "--check"]) == 0


def test_page_without_markers_is_refused() -> None:
    for page in ("# A page\n", "<!-- table nothing -->\n<!-- end -->\n", "<!-- table systems -->\n"):
        with pytest.raises(ValueError, match="markers"):
            solvers_tables.insert(page, {"systems": "| a |"})


def test_verdicts() -> None:
    row = {"status": "CONVERGED", "products": 3, "residual": 1e-9, "shifted": False, "provider": "FiniteDifference()"}
    assert solvers_systems.verdict(row) == "right"
    assert solvers_systems.verdict(row | {"residual": 1e-3}) == "wrong"
    assert solvers_systems.verdict(row | {"residual": None}) == "wrong"
    assert solvers_systems.verdict(row | {"shifted": True, "residual": 1e-3}) == "reported"
    assert solvers_systems.verdict(row | {"status": "INCONSISTENT", "residual": None}) == "reported"
    assert solvers_systems.verdict(row | {"products": 0, "residual": 0.5}) == "unchecked"


def test_every_combination_is_right_or_reported() -> None:
    rows = FIGURES["systems"]
    assert len(rows) == len(solvers_systems.cases()) * len(solvers_systems.SOLVERS) * len(solvers_systems.PROVIDERS)
    assert not [row for row in rows if solvers_systems.verdict(row) == "wrong"]
    assert {row["solver"] for row in rows if solvers_systems.verdict(row) == "unchecked"} == {"Identity"}


def test_names_on_the_page_are_measured() -> None:
    names = {row["solver"] for row in FIGURES["systems"]}
    assert names == set(solvers_systems.SOLVERS)
    assert {row["provider"] for row in FIGURES["systems"]} == set(solvers_systems.PROVIDERS)
    assert {row["case"] for row in FIGURES["systems"]} == {case.name for case in solvers_systems.cases()}
    assert {row["solver"] for row in FIGURES["network"]["system"]["solvers"]} == set(solvers_network.SOLVERS)
    assert {row["provider"] for row in FIGURES["network"]["providers"]} == set(solvers_network.PROVIDERS)
    assert {row["method"] for row in FIGURES["trajectory"]} == set(solvers_trajectory.methods(0.1))


@pytest.mark.parametrize("solver", solvers_systems.SOLVERS)
def test_kept_figures_are_those_of_today(solver: str) -> None:
    """A change of a solver that changes an outcome must measure the page again."""
    reverse = solvers_systems.PROVIDERS["ReverseOverReverse()"]
    for case in solvers_systems.cases():
        kept = system(case.name, solver)
        if "ill-conditioned" in case.name or kept["products"] > 120:
            continue
        now = solvers_systems.measure_one(case, solvers_systems.SOLVERS[solver], reverse)
        assert now["status"] == kept["status"], case.name
        assert now["products"] == pytest.approx(kept["products"], abs=2), case.name


class TestSmallSystems:
    def test_cg(self) -> None:
        for case in (*DEFINITE, "singular, consistent"):
            assert system(case, "CG")["status"] == "CONVERGED"
            assert system(case, "CG")["error"] < 1e-7
        assert system("indefinite", "CG")["status"] == "NEGATIVE_CURVATURE"
        assert system("singular, inconsistent", "CG")["status"] == "INCONSISTENT"
        assert system(FEW, "CG")["status"] == "CONVERGED"
        assert system(FEW, "CG")["products"] < 2 * system("well-conditioned (8)", "CG")["products"]
        assert (system(EVEN, "CG")["status"], system(EVEN, "CG")["products"]) == (
            "NOT_CONVERGED",
            solvers_systems.ITERATIONS,
        )

    def test_minres(self) -> None:
        for case in (*DEFINITE, "singular, consistent", FEW):
            assert system(case, "MINRES")["status"] == "CONVERGED"
            assert system(case, "MINRES")["products"] == pytest.approx(system(case, "CG")["products"], abs=3)
        assert system("indefinite", "MINRES")["status"] == "CONVERGED"
        assert system("indefinite", "MINRES")["error"] < 1e-7
        assert system(EVEN, "MINRES")["error"] > system(EVEN, "CG")["error"]

    def test_models(self) -> None:
        for solver in MODELS:
            for case in (FEW, EVEN):
                assert system(case, solver)["status"] == "CONVERGED"
            assert system(FEW, solver)["products"] < 0.7 * system(FEW, "CG")["products"]
            assert system(EVEN, "CG")["status"] == "NOT_CONVERGED"
            well = "well-conditioned (8)"
            assert system(well, solver)["products"] >= 10 + 0.9 * system(well, "CG")["products"] - 1
            for case in ("singular, consistent", "unused variables, b = 0 there"):
                assert system(case, solver)["status"] == "CONVERGED"
                assert system(case, solver)["error"] > 0.1
        for case in solvers_systems.cases():
            products = [system(case.name, solver)["products"] for solver in MODELS]
            assert abs(products[0] - products[1]) <= 1

    def test_escalating(self) -> None:
        shifted = {row["case"] for row in FIGURES["systems"] if row["shifted"]}
        assert shifted == {"indefinite", "singular, inconsistent", "unused variables, b not 0 there"}
        assert {row["solver"] for row in FIGURES["systems"] if row["shifted"]} == {"Escalating(CG)"}
        assert system("indefinite", "Escalating(CG)")["error"] > 0.9

    def test_neumann(self) -> None:
        for case in ("well-conditioned (8)", "singular, consistent", "unused variables, b = 0 there"):
            assert system(case, "Neumann")["status"] == "CONVERGED"
            assert system(case, "Neumann")["products"] > 3 * system(case, "CG")["products"]
        assert system(FEW, "Neumann")["error"] > 0.9
        assert system(EVEN, "Neumann")["error"] > 0.9
        assert system("indefinite", "Neumann")["status"] in ("DIVERGED", "NEGATIVE_CURVATURE")

    def test_layerwise(self) -> None:
        assert system("well-conditioned (8)", "layer-wise CG")["status"] == "NOT_CONVERGED"
        assert system("indefinite", "layer-wise CG")["status"] == "NOT_CONVERGED"
        assert system("A = I", "layer-wise CG")["status"] == "CONVERGED"

    def test_dense(self) -> None:
        for case in solvers_systems.cases():
            row = system(case.name, "Dense")
            if row["error"] is not None:
                assert row["status"] == "CONVERGED"
                assert row["error"] < 1e-9
                assert row["products"] == case.right.numel() + 1

    def test_identity_operator(self) -> None:
        assert (system("A = I", "CG")["products"], system("A = I", "Identity")["products"]) == (2, 0)
        assert system("A = I", "Identity")["error"] == 0.0

    def test_no_solution_and_no_numbers(self) -> None:
        for solver in set(solvers_systems.SOLVERS) - {"Identity"}:
            unused = system("unused variables, b not 0 there", solver)
            assert unused["status"] == "INCONSISTENT" or unused["shifted"]
            assert system("NaN in the data", solver)["status"] == "NON_FINITE"
        assert system("NaN in the data", "Identity")["status"] == "BUDGET"

    def test_exact_providers_agree(self) -> None:
        for case in solvers_systems.cases():
            for solver in solvers_systems.SOLVERS:
                if solver == "layer-wise CG" or case.name == EVEN:
                    continue
                assert len({system(case.name, solver, provider)["status"] for provider in EXACT}) == 1

    def test_differences(self) -> None:
        for provider in ("FiniteDifference()", "FiniteDifference(central=False)"):
            for case in DEFINITE:
                assert system(case, "CG", provider)["status"] == "CONVERGED"
            assert system(EVEN, "CG", provider)["error"] > 1e-4


class TestNetwork:
    def test_cg_is_below_the_noise_after_two_iterations(self) -> None:
        assert network("CG(2, None)", 10.0)["error"] < noise(10.0)

    def test_layerwise_stops(self) -> None:
        two, twenty = (network(f"CG({n}, None, layerwise=True)", 10.0)["error"] for n in (2, 20))
        assert twenty > 0.5 * two
        assert network("CG(20, None)", 10.0)["error"] < 1e-6 * twenty
        assert (
            network("CG(20, None, layerwise=True)", 3.0)["error"] > network("CG(2, None, layerwise=True)", 3.0)["error"]
        )

    def test_neumann(self) -> None:
        assert network("CG(5, None)", 10.0)["error"] < network("Neumann(5)", 10.0)["error"]
        assert network("Neumann(20)", 10.0)["error"] < network("CG(5, None)", 10.0)["error"]
        for c in solvers_network.WEIGHTS:
            assert network("Neumann(5, scale=1.0)", c)["status"] == "DIVERGED"
            assert network("Neumann(5, scale=1.0)", c)["error"] >= 0.99 * network("Identity()", c)["error"]

    def test_indefinite(self) -> None:
        (row,) = (r for r in FIGURES["network"]["system"]["systems"] if r["c"] == 1.0)
        assert row["smallest"] < 0.0
        assert network("CG(20, None)", 1.0)["status"] == "NEGATIVE_CURVATURE"
        assert network("CG(20, None)", 1.0)["error"] > 0.9
        assert network("MINRES(100, 1e-2)", 1.0)["status"] == "NOT_CONVERGED"

    def test_minres_equals_cg(self) -> None:
        for iterations in (5, 20):
            cg, minres = (network(f"{name}({iterations}, None)", 3.0)["error"] for name in ("CG", "MINRES"))
            assert minres < 2 * cg

    def test_identity_is_above_the_noise(self) -> None:
        assert network("Identity()", 10.0)["error"] > noise(10.0)

    def test_models(self) -> None:
        plain = network("Nystrom(20, tikhonov=1.0, max_refinements=0)", 10.0)
        assert (plain["first_products"], plain["products"]) == (21, 1)
        assert plain["error"] > network("CG(2, None)", 10.0)["error"]
        refined = network("Nystrom(20, tikhonov=1.0, max_refinements=5)", 10.0)
        assert refined["error"] < network("CG(5, None)", 10.0)["error"]
        assert (refined["first_products"], refined["products"]) == (26, 6)
        assert network("CG(5, None, preconditioner=Diagonal())", 10.0)["error"] > network("CG(5, None)", 10.0)["error"]

    def test_gauss_newton(self) -> None:
        for c in solvers_network.WEIGHTS:
            assert network("CG(20, None) with GaussNewton()", c)["status"] in ("BUDGET", "CONVERGED")
        error = network("CG(20, None) with GaussNewton()", 10.0)["error"]
        assert noise(10.0) < 1.1 * error
        assert 0.6 < error / network("Identity()", 10.0)["error"] < 1.0

    def test_small_weights_drown_in_noise(self) -> None:
        assert noise(10.0) < 0.5
        assert min(noise(3.0), noise(1.0)) > 1.0


class TestProducts:
    def test_exact(self) -> None:
        for provider in EXACT:
            for activation in ("ReLU", "SiLU"):
                assert product(provider, activation, "float64")["error"] < 1e-13
                assert product(provider, activation, "float32")["error"] < 1e-5

    def test_kept_graph_saves_time(self) -> None:
        for activation in ("ReLU", "SiLU"):
            for dtype in ("float64", "float32"):
                kept, plain = (product(EXACT[k], activation, dtype)["gradients"]["median"] for k in (1, 0))
                assert kept < 0.8 * plain

    def test_differences(self) -> None:
        assert product("FiniteDifference()", "SiLU", "float32")["error"] < 0.02
        assert product("FiniteDifference()", "ReLU", "float32")["error"] > 0.1
        for provider in ("FiniteDifference()", "FiniteDifference(central=False)"):
            assert product(provider, "ReLU", "float64")["error"] < 1e-5
        assert product("FiniteDifference(central=False)", "ReLU", "float32")["error"] > 0.1


class TestTrajectory:
    LAST = max(row["steps"] for row in FIGURES["trajectory"])

    def test_implicit_converges_with_the_lower_level(self) -> None:
        rows = [row for row in FIGURES["trajectory"] if row["method"].startswith("implicit, CG")]
        assert rows[-1]["error"] < 1e-8
        assert rows[0]["error"] > 0.5
        assert all(b["error"] < a["error"] for a, b in pairwise(rows))
        for row in rows:
            if row["steps"] >= 30:
                assert row["error"] < trajectory("unrolled, all T steps", row["steps"])["error"]

    def test_unrolling_is_exact_for_what_was_done(self) -> None:
        assert all(r["error_to_loop"] < 1e-12 for r in FIGURES["trajectory"] if r["method"] == "unrolled, all T steps")

    def test_penalty(self) -> None:
        errors = [row["error"] for row in FIGURES["trajectory"] if row["method"].startswith("penalty")]
        assert errors[0] > 10.0
        assert 0.1 / 100.0 < errors[-1] < 10.0 / 100.0


def test_page_names_what_is_there() -> None:
    called = set(re.findall(r"`(\w+)\(", PAGE.read_text(encoding="utf-8")))
    assert called
    assert called <= {name for room in (bilevel, hypergradients, linear, products) for name in room.__all__}
