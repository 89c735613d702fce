"""The curves of the solvers' benchmark: how they are measured, what the picture shows, what the page says of them."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.solvers import curves as solvers_curves
from benchmarks.solvers import run as benchmark
from bilevel.compare import curves_tables, standard_solvers, to_tolerance
from bilevel.linear import Dense
from tests.support.paths import ROOT

PICTURE = ROOT / "docs/_static/solvers.svg"
FIGURES: dict[str, Any] = json.loads((ROOT / "benchmarks/results/solvers.json").read_text(encoding="utf-8"))


def test_picture(tmp_path: Path) -> None:
    """The kept picture is drawn from the kept figures: the same texts, whatever the version that draws."""
    benchmark.draw(FIGURES["curves"], tmp_path / "again.svg")
    drawn, kept = (path.read_text(encoding="utf-8") for path in (tmp_path / "again.svg", PICTURE))
    texts = [re.findall(r"<text[^>]*>(?:<tspan[^>]*>)?([^<]*)", svg) for svg in (drawn, kept)]
    assert texts[0] == texts[1]
    assert {row["system"] for row in FIGURES["curves"]["curves"]} <= {text.split(":")[0] for text in texts[1]}
    assert PICTURE.stat().st_size < 220_000


def test_curves_are_those_of_the_dense_solution() -> None:
    """A small system measured anew: its exact solutions solve it, and Dense finds them."""
    systems = solvers_curves.matrices(quick=True, device=torch.device("cpu"))
    for system in systems:
        problem = system.linearize(Dense(), None).problem
        assert isinstance(problem, solvers_curves.Quadratic)
        for b, x in zip(system.rights, system.exact, strict=True):
            assert torch.allclose(problem.matrix @ x, torch.cat(list(b.values())), atol=1e-8)
    rows = solvers_curves.measure_system(systems[0], 2)
    dense = next(row for row in rows if row["solver"] == "Dense")
    assert max(dense["points"][0]["errors"]) < 1e-12
    assert [(row["solver"], row["use"]) for row in rows] == [
        (name, use) for name in standard_solvers() for use in ("first", "later")
    ]
    curves_tables(rows, solvers_curves.COLUMNS)


class TestCurves:
    SYSTEMS = tuple(dict.fromkeys(row["system"] for row in FIGURES["curves"]["curves"]))

    @staticmethod
    def row(system_name: str, solver: str, use: str = "first") -> dict[str, Any]:
        rows = FIGURES["curves"]["curves"]
        (found,) = (r for r in rows if r["system"].startswith(system_name) and (r["solver"], r["use"]) == (solver, use))
        return found

    def products(self, system_name: str, solver: str, use: str = "first") -> float:
        tolerance = 1e-2 if system_name == "BiSSL" else 1e-6
        found = to_tolerance(self.row(system_name, solver, use), tolerance)
        return float("inf") if found is None else found["products"].median

    def test_cg_and_minres(self) -> None:
        for name in ("well-conditioned", "singular", "BiSSL"):
            least = min(self.products(name, solver) for solver in standard_solvers() if solver != "Dense")
            assert self.products(name, "CG") <= 1.5 * least
            assert self.products(name, "MINRES") <= 1.5 * least
        solved = {solver for solver in standard_solvers() if self.products("indefinite", solver) < 1e9}
        assert solved == {"MINRES", "Dense"}

    def test_recycling_and_models_pay_at_large_eigenvalues(self) -> None:
        name = "ill-conditioned (1e6)"
        for solver in ("CG, recycled", "CG, Nyström", "Nyström"):
            assert self.products(name, solver, "later") < 0.5 * self.products(name, "CG", "later")
        assert self.products("well", "CG, recycled", "later") == self.products("well", "CG", "later")

    def test_layerwise_and_neumann(self) -> None:
        for name in self.SYSTEMS:
            assert min(p["error"]["median"] for p in self.row(name, "layer-wise CG")["points"]) > 0.01
        assert self.row("well", "Neumann")["points"][-1]["error"]["median"] < 1e-3
        assert self.row("ill-conditioned (1e6)", "Neumann")["points"][-1]["error"]["median"] > 0.5

    def test_successive(self) -> None:
        rows = {row["solver"]: row for row in FIGURES["curves"]["successive"]}
        layerwise = rows["layer-wise CG, 5 iterations"]
        assert sum(rows["CG recycled, to the noise"]["products"]) < sum(rows["CG to the noise"]["products"])
        assert sum(rows["CG recycled, to 1e-2"]["products"]) < sum(rows["CG to 1e-2"]["products"])
        assert sum(rows["CG recycled, to the noise"]["products"]) < 0.4 * sum(layerwise["products"])
        assert rows["CG to 1e-2"]["error"] < 0.2 * layerwise["error"]
        for name in ("CG to the noise", "CG recycled, to the noise"):
            assert rows[name]["error"] < FIGURES["curves"]["noise"]
