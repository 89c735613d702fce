"""The race: its judge against independent solvers, its bookkeeping by hand, a short run without other packages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from benchmarks.race import run as race
from benchmarks.race.methods import ENTRIES, Draws, Entry, Own
from benchmarks.race.problems import Rates, hyper_cleaning, stochastic_quadratic
from bilevel.hypergradients import SingleLoop
from tests.support.paths import ROOT

KEPT = ROOT / "benchmarks/results/race.json"
PAGE = ROOT / "docs/peers.md"
OWN = [entry for entry in ENTRIES if not entry.distribution]
GENERATOR = torch.Generator()


def broken(*_: object) -> None:
    raise RuntimeError("does not start")


ABSENT = Entry("absent", "a-distribution-that-is-nowhere", broken)  # pyright: ignore[reportArgumentType]


def test_judge_of_hyper_cleaning() -> None:
    """The lower problem by L-BFGS, from the race's own losses."""
    problem = hyper_cleaning(points=60)
    x = torch.linspace(-2.0, 2.0, 60)
    (batch, clean) = problem.lower_batch(GENERATOR), problem.upper_batch(GENERATOR)
    shape = problem.lower.shape

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        y = torch.from_numpy(flat).reshape(shape).requires_grad_()
        loss = problem.lower_loss(x.double(), y, (batch[0].double(), batch[1]))
        return loss.item(), torch.autograd.grad(loss, y)[0].numpy().ravel()

    found = minimize(objective, np.zeros(shape.numel()), jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 0})
    y = torch.from_numpy(found.x).reshape(shape)
    expected = float(problem.upper_loss(x.double(), y, (clean[0].double(), clean[1])))
    assert problem.value(x) == pytest.approx(expected, rel=1e-5)


def test_judge_of_the_quadratic() -> None:
    """With batches of all rows in the mean: the gradient of the mean over many draws vanishes at the judge's y*."""
    problem = stochastic_quadratic(rows=64)
    x = torch.linspace(-1.0, 1.0, 50, dtype=torch.float64)
    draws = [problem.lower_batch(GENERATOR.manual_seed(k)) for k in range(60)]
    rows = np.unique(np.concatenate([torch.cat([z, u, e[:, None]], 1).double().numpy() for z, u, e in draws]), axis=0)
    assert len(rows) == 64
    Z, U, e = rows[:, :100], rows[:, 100:150], rows[:, 150]
    y = np.linalg.solve(Z.T @ Z / 64 + 0.01 * np.eye(100), Z.T @ (U @ x.numpy() + e) / 64)
    uppers = [problem.upper_batch(GENERATOR.manual_seed(k)) for k in range(120)]
    pairs = np.unique(np.concatenate([torch.cat([w, s[:, None]], 1).double().numpy() for w, s in uppers]), axis=0)
    assert len(pairs) == 500
    expected = 0.5 * np.mean((pairs[:, :100] @ y - pairs[:, 100]) ** 2) + 0.005 * float(x.square().sum())
    assert problem.value(x) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("entry", OWN, ids=lambda entry: entry.name)
def test_contestants_go_down(entry: Entry) -> None:
    torch.manual_seed(0)
    problem = hyper_cleaning(points=50)
    contestant = entry.start(problem, Rates(1.0, 0.1), torch.Generator().manual_seed(0))
    start = problem.value(contestant.upper)
    for _ in range(5):
        contestant.advance()
    assert problem.value(contestant.upper) < start
    assert isinstance(contestant, Own)
    # A single loop moves both levels in each of its steps.
    single = entry.name.startswith("single loop")
    assert contestant.trainer.steps == {"upper": 100 if single else 5, "lower": 100}


def test_single_loops_take_fixed_batches_of_all_rows() -> None:
    problem = stochastic_quadratic(rows=130)
    started = [
        entry.start(problem, Rates(0.01, 0.1), torch.Generator().manual_seed(k)) for k in (0, 1) for entry in OWN
    ]
    found = [c.trainer for c in started if isinstance(c, Own) and isinstance(c.trainer.method, SingleLoop)]
    assert len(found) == 4
    for trainer in found:
        below, above = trainer.lower.data.blocks, trainer.upper.data.blocks
        assert below is not None
        assert above is not None
        # 130 and 500 rows in batches of 64.
        assert [len(below.block(k)[0]) for k in range(len(below))] == [64, 64, 2]
        assert len(above) == 8
        assert [group["lr"] for group in trainer.upper.optimizer.param_groups] == [0.1 / 20]
    orders = [[trainer.lower.next_batch()[2].sum().item() for _ in range(12)] for trainer in found]
    assert orders[0] != orders[2], "the seed of a run orders its batches"


def test_draws_go_on_from_their_state() -> None:
    problem = stochastic_quadratic(rows=64)
    source = Draws(problem.lower_batch, torch.Generator().manual_seed(0))
    state = source.state_dict()
    first, second = source.next(), source.next()
    source.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(source.next(), first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(source.next(), second, strict=True))
    assert not torch.equal(first[0], second[0])


def test_time_to_a_target() -> None:
    curve = {"times": [0.0, 1.0, 2.0, 3.0], "values": [5.0, 3.0, 1.0, 2.0]}
    assert race.time_to(curve, 3.0) == 1.0
    assert race.time_to(curve, 1.5) == 2.0
    assert race.time_to(curve, 0.5) is None
    assert race.targets(11.0, 1.0) == pytest.approx([2.0, 1.1])


def test_best_step_sizes() -> None:
    slow, fast, never, worse = (
        {"curve": {"times": [0.0, time], "values": [5.0, end]}}
        for time, end in ((2.0, 0.5), (1.0, 0.9), (0.5, 2.0), (0.1, 3.0))
    )
    assert race.best_of([slow, fast, never], 1.0) is fast
    assert race.best_of([worse, never], 1.0) is never


def test_failure_is_a_curve_with_a_reason() -> None:
    curve = race.run(stochastic_quadratic(rows=64), ABSENT, Rates(0.1, 0.1), 0.1, seed=0)
    assert curve["failure"] == "RuntimeError: does not start"
    assert curve["times"] == [0.0]


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(race, "ENTRIES", (OWN[0], OWN[4], ABSENT))
    monkeypatch.setattr(race, "QUICK_SECONDS", 0.1)
    figures, picture = tmp_path / "figures.json", tmp_path / "race.svg"
    assert race.main(["--quick", "--json", str(figures), "--figure", str(picture)]) == 0
    kept = json.loads(figures.read_text(encoding="utf-8"))
    assert [r["race"] for r in kept["races"]] == ["hyper-cleaning", "stochastic quadratic"]
    assert [m["version"] is None for m in kept["methods"]] == [False, False, True]
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert "not installed" in capsys.readouterr().out


def test_page_shows_the_kept_figures() -> None:
    assert race.main(["--from", str(KEPT), "--docs", str(PAGE), "--check"]) == 0
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert not kept["quick"]
    assert all(method["version"] for method in kept["methods"])
    assert all(len(row["curves"]) == race.REPEATS for r in kept["races"] for row in r["rows"])
