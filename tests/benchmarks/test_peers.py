"""The comparison with other packages: what it measures of itself, and rows for what is missing or fails."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import measuring, pages
from benchmarks.peers import run as peers
from benchmarks.peers.adapters import METHODS, Answer, Method, installed
from benchmarks.peers.cases import NTXent, bissl_shaped, quadratic, ridge
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks/results/peers.json"
PAGE = ROOT / "docs/peers.md"
OWN = [method for method in METHODS if not method.distribution]


def fail(case: object, iterations: int) -> Answer:
    raise ImportError("no such thing")


BROKEN = Method("broken", "", fail, "nothing")
ABSENT = Method("absent", "a-distribution-that-is-nowhere", fail, "nothing")


def test_ridge_closed_form_is_the_derivative() -> None:
    """Against central differences of F(x, y*(x)) by numpy."""
    case, exact = ridge(points=30, features=4)
    (X, t), x = case.batches[0], case.upper[0].numpy()

    def value(log_weight: np.ndarray) -> float:
        H = X.numpy().T @ X.numpy() / len(X) + np.diag(np.exp(log_weight))
        w = torch.from_numpy(np.linalg.solve(H, X.numpy().T @ t.numpy() / len(X)))
        return float(case.upper_loss(case.upper, (w[None],)))

    steps = 1e-5 * np.eye(len(x))
    differences = [(value(x + step) - value(x - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(exact.numpy(), differences, rtol=1e-6)


@pytest.mark.parametrize("method", OWN[:2], ids=lambda method: method.name)
def test_own_rows_meet_the_closed_form(method: Method) -> None:
    case, exact = ridge()
    assert peers.relative(method.run(case, 200).value, (exact,)) < 1e-10


def test_solutions_of_small_systems() -> None:
    case, exact = quadratic(torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64))
    assert torch.allclose(OWN[0].run(case, 3).value[0], exact, rtol=1e-12)
    assert torch.allclose(exact, torch.tensor([[1 / 1.5, 0.5, 0.2]], dtype=torch.float64))


def test_nt_xent_of_orthogonal_pairs() -> None:
    """Two pairs at right angles: log(e^2 + 2) - 2 for every row at temperature 0.5."""
    outputs = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]])
    loss = NTXent()(outputs, torch.tensor([2, 3, 0, 1]))
    assert float(loss) == pytest.approx(np.log(np.e**2 + 2.0) - 2.0, rel=1e-6)


def test_network_has_the_stated_size() -> None:
    case = bissl_shaped(width=32, batches=1, size=2, steps=0)
    assert sum(leaf.numel() for leaf in case.upper) == 278_304


def test_statistics_are_counted() -> None:
    case = bissl_shaped(width=2, batches=3, size=4, steps=0)
    copy = case.copied()
    peers.gradient(copy)
    assert peers.statistics_writes(case, copy) == 3.0
    OWN[0].run(case, 2)
    assert peers.statistics_writes(copy, case) == -3.0


def test_failures_are_rows() -> None:
    rows = peers.measure_ridge([BROKEN])
    assert {row["error"] for row in rows} == {None}
    figures = {"ridge": rows, "methods": [{"name": "absent", "version": installed(ABSENT.distribution)}]}
    _, table = peers.ridge_table(figures)
    assert table == [["broken", *["failed: ImportError"] * 2], ["absent", "not installed", ""]]


def test_probes_tell_silence_from_words() -> None:
    def silent_zero(case: object, iterations: int) -> Answer:
        return Answer((torch.zeros(1, 6, dtype=torch.float64),))

    rows = peers.measure_probes([OWN[0], Method("zero", "", silent_zero, ""), BROKEN])
    _, table = peers.probe_table({"probes": rows, "methods": []})
    assert table[0][2].endswith("negative curvature")
    assert table[0][3].endswith("non finite")
    assert table[1] == ["zero", "error 1, silent", "error 1, silent", "finite, silent", "no"]
    assert table[2] == ["broken", *["raises ImportError"] * 3, "no"]


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "METHODS", (*OWN[1:3], ABSENT))
    monkeypatch.setattr(peers, "QUICK_SYSTEM", {"width": 4, "batches": 2, "size": 8, "steps": 30, "c": 100.0})
    path = tmp_path / "figures.json"
    assert peers.main(["--quick", "--json", str(path)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert [m["version"] is None for m in figures["methods"]] == [False, False, True]
    first = figures["system"]["rows"][0]
    assert first["error"] < 1e-3
    assert first["gradients"]["q1"] <= first["gradients"]["median"] <= first["gradients"]["q3"]
    assert first["memory"] > 0
    assert "not installed" in capsys.readouterr().out


def test_page_shows_the_kept_figures() -> None:
    assert peers.main(["--from", str(KEPT), "--docs", str(PAGE), "--check"]) == 0


class TestKeptFigures:
    """The page's sentences."""

    FIGURES = json.loads(KEPT.read_text(encoding="utf-8"))

    def test_the_run_was_whole(self) -> None:
        assert not self.FIGURES["quick"]

    def system(self, method: str) -> dict:
        (row,) = (row for row in self.FIGURES["system"]["rows"] if row["method"] == method)
        return row

    def probe(self, name: str, method: str) -> dict:
        (row,) = (r for r in self.FIGURES["probes"] if (r["probe"], r["method"]) == (name, method))
        return row

    def ridge(self, method: str, iterations: int) -> float:
        (row,) = (r for r in self.FIGURES["ridge"] if (r["method"], r["iterations"]) == (method, iterations))
        return row["error"]

    def test_every_package_was_there(self) -> None:
        assert all(method["version"] for method in self.FIGURES["methods"])
        assert self.FIGURES["system"]["reference"]["status"] == "CONVERGED"

    def test_ridge(self) -> None:
        for method in ("CG, recomputed", "CG, kept graph", "TorchOpt"):
            assert self.ridge(method, 200) < 1e-12
        assert 1e-12 < self.ridge("BOAT", 200) < 1e-8
        assert 1e-8 < self.ridge("curvlinops", 200) < 1e-4
        assert self.ridge("Betty", 200) > 1.0

    def test_system(self) -> None:
        exact = self.system("CG, kept graph")["error"]
        for method in ("CG, recomputed", "TorchOpt", "BOAT"):
            assert self.system(method)["error"] == pytest.approx(exact, rel=0.1)
        assert self.system("CG, layer-wise")["error"] > 10 * exact
        assert self.system("Betty")["error"] > 10 * exact
        assert self.system("CG to 1e-2")["products"] < self.system("CG, kept graph")["products"]

    def test_cost(self) -> None:
        def time(method: str) -> float:
            return self.system(method)["gradients"]["median"]

        assert time("CG, kept graph") < time("CG, recomputed") < time("curvlinops")
        assert self.system("CG, recomputed")["memory"] < 0.5 * self.system("CG, kept graph")["memory"]
        assert self.system("CG, kept graph")["memory"] < 1.2 * self.system("BOAT")["memory"]

    def test_statistics(self) -> None:
        for row in self.FIGURES["system"]["rows"]:
            assert row["statistics_writes"] == (5.0 if row["method"] in ("Betty", "BOAT") else 0.0)

    def test_what_goes_wrong(self) -> None:
        assert self.probe("A = I", "BOAT")["error"] == 1.0
        assert not self.probe("A = I", "Betty")["finite"]
        assert self.probe("indefinite", "CG, recomputed")["status"] == "NEGATIVE_CURVATURE"
        for method in ("TorchOpt", "Betty", "BOAT"):
            assert not self.probe("indefinite", method)["said"]
            assert not self.probe("NaN in the data", method)["said"]
        assert self.probe("NaN in the data", "TorchOpt")["finite"]
        assert self.probe("NaN in the data", "curvlinops")["raised"]
        assert self.probe("indefinite", "curvlinops")["said"]


def test_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="peers-ridge"):
        pages.insert("# A page\n", {"peers-ridge": "| a |"})


def test_timings() -> None:
    timings = measuring.interleaved({"a": lambda: None, "b": lambda: sum(range(1000))}, 3)
    assert [len(timing.samples) for timing in timings.values()] == [3, 3]
    assert measuring.Timing((1.0, 2.0, 3.0, 4.0, 5.0)).record() == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert measuring.Timing((2.0, 9.0)).over(measuring.Timing((1.0, 3.0))).samples == (2.0, 3.0)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def work() -> None:
        a = torch.zeros(100_000)
        b = a + 1.0
        del a
        torch.zeros(50_000).add_(b[:50_000])

    assert measuring.peak_memory(work) == pytest.approx(800_000, rel=0.01)
