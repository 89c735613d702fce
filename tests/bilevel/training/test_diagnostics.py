"""What is kept and printed of the linear solves of a run."""

import dataclasses
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bilevel import CG, Hypergradient, Status, hypergradient
from bilevel.training import Callback
from bilevel.training.callbacks import Diagnostics, diagnostics_cells
from tests.support.cases import joined
from tests.support.problems.two_heads import LAMBDA, LOWER_BATCHES, UPPER_BATCHES, TwoHeads, implicit, make, variables

TITLES = [
    *("alternation", "residual", "iterations", "products", "curvature", "Ritz values", "|x-v|/|v|", "cos(x, v)"),
    *("stationarity", "x noise", "status"),
]


def result(batches: int) -> Hypergradient:
    upper, lower = variables()
    return hypergradient(TwoHeads(), upper, lower, upper_batch=UPPER_BATCHES[0], lower_batches=LOWER_BATCHES[:batches])


def test_stationarity_is_told_as_a_multiple_of_the_noise() -> None:
    upper, lower = variables()
    z = joined(lower)
    gradients = torch.stack(
        [(matrix @ z - linear)[:3] + LAMBDA * (z[:3] - upper["backbone"]) for matrix, linear in LOWER_BATCHES]
    )
    noise = (gradients.var(dim=0, unbiased=True).sum() / len(gradients)).sqrt()
    expected = float(gradients.mean(dim=0).norm() / noise)
    assert result(len(LOWER_BATCHES)).stationarity_over_noise == pytest.approx(expected, rel=1e-12)
    assert result(1).stationarity_over_noise is None


@pytest.mark.parametrize(
    ("stationarity", "noise", "expected"),
    [(3.0, 2.0, 1.5), (3.0, 0.0, math.inf), (0.0, 0.0, 0.0), (math.inf, 0.0, math.inf), (math.inf, 2.0, math.inf)],
)
def test_batches_that_agree_leave_no_noise(stationarity: float, noise: float, expected: float) -> None:
    found = dataclasses.replace(result(2), stationarity=stationarity, noise=noise)
    assert found.stationarity_over_noise == expected
    unknown = dataclasses.replace(found, stationarity=math.nan).stationarity_over_noise
    assert unknown is not None
    assert math.isnan(unknown)


def test_every_solve_is_counted_by_its_status() -> None:
    class Keep(Callback):
        def __init__(self) -> None:
            self.records: list[dict[str, Any]] = []

        def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
            self.records += [record] if record["event"] == "upper" else []

    keep = Keep()
    trainer = make(method=implicit(CG(1, rtol=0.1), damping=0.0), on_failure="ignore", callbacks=[keep])
    trainer.run()
    statuses = [record["status"] for record in keep.records]
    assert len(statuses) == trainer.schedule.alternations * trainer.schedule.upper_steps
    assert set(statuses) == {"CONVERGED", "NOT_CONVERGED"}, "the tolerance must lie amid the residuals"
    assert trainer.solves == {status: statuses.count(status) for status in set(statuses)}
    assert trainer.failures == {"NOT_CONVERGED": statuses.count("NOT_CONVERGED")}
    for record in keep.records:
        multiple = record["stationarity"] / record["gradient_noise"]
        assert record["stationarity_over_noise"] == pytest.approx(multiple, rel=1e-12)
    resumed = make(method=implicit(CG(1, rtol=0.1)), on_failure="ignore", callbacks=[Keep()])
    resumed.load_state_dict(trainer.state_dict())
    assert (resumed.solves, resumed.failures) == (trainer.solves, trainer.failures)


def record(status: str = "CONVERGED", **numbers: Any) -> dict[str, Any]:
    plain = {
        "residual": 0.5,
        "iterations": 2,
        "num_hvps": 3,
        "relative_change": 0.25,
        "cosine": 0.75,
        "stationarity": 6.0,
    }
    rest = {"min_curvature": None, "ritz_min": None, "ritz_max": None, "stationarity_over_noise": None}
    rest |= {"tikhonov": 0.0, "residual_without_tikhonov": None}
    return {"event": "upper", "status": status, **plain, **rest, **numbers}


def test_a_line_is_over_the_solves_since_the_last() -> None:
    first = record(min_curvature=1.5, ritz_min=1.25, ritz_max=4.0, residual=math.nan)
    second = record("NEGATIVE_CURVATURE", min_curvature=-0.5, ritz_min=-0.5, ritz_max=3.0, relative_change=0.75)
    third = record(residual=0.125, stationarity=9.0, stationarity_over_noise=2.5, cosine=0.0)
    cells = diagnostics_cells(7, [first, second, third])
    assert list(cells) == TITLES
    assert list(cells.values()) == [
        *("7", "0.5", "6", "9", "-0.5", "-0.5 .. 4", "0.417", "0.5", "9", "2.5"),
        "2 CONVERGED, 1 NEGATIVE_CURVATURE",
    ]
    bare = diagnostics_cells(1, [record(residual=math.nan, stationarity=math.nan, stationarity_over_noise=math.inf)])
    assert [bare[title] for title in ("residual", "curvature", "Ritz values")] == ["-", "-", "-"]
    assert (bare["stationarity"], bare["x noise"]) == ("nan", "inf")


def test_a_line_names_the_tikhonov_term_of_systems_that_got_one() -> None:
    with_term = [
        record(tikhonov=0.5, residual_without_tikhonov=0.25),
        record(tikhonov=2.0, residual_without_tikhonov=0.125),
    ]
    cells = diagnostics_cells(1, [record(), *with_term])
    assert cells["status"] == "3 CONVERGED, tikhonov 2 (residual without it 0.25)"


def trainer(alternations: int, solves: dict[str, int] | None = None) -> Any:
    return SimpleNamespace(total=alternations, solves=solves or {})


def feed(callback: Diagnostics, alternations: range, *, total: int) -> None:
    for alternation in alternations:
        callback.on_event(trainer(total), {"event": "lower", "alternation": alternation})
        callback.on_event(trainer(total), record())
        callback.on_event(trainer(total), {"event": "alternation", "alternation": alternation})


def test_lines_come_every_so_often_and_at_the_end_below_one_header() -> None:
    output = io.StringIO()
    callback = Diagnostics(Console(file=output, width=40), every=2)
    callback.on_run_start(trainer(5))
    feed(callback, range(1, 6), total=5)
    header, *lines = output.getvalue().splitlines()
    assert [title for title in TITLES if title in header] == TITLES
    assert [(line.split()[0], line.split()[-2]) for line in lines] == [("2", "2"), ("4", "2"), ("5", "1")]
    assert {len(line) for line in (header, *lines)} != {40}, "narrow terminals cut nothing off"


def test_what_is_not_printed_yet_outlives_an_interruption() -> None:
    output = io.StringIO()
    before, after = Diagnostics(Console(quiet=True), every=2), Diagnostics(Console(file=output), every=2)
    feed(before, range(1, 2), total=4)
    after.load_state_dict(before.state_dict())
    feed(after, range(2, 3), total=4)
    assert output.getvalue().splitlines()[-1].endswith(" 2 CONVERGED")


def test_the_summary_counts_and_says_what_to_do() -> None:
    output = io.StringIO()
    callback = Diagnostics(Console(file=output, width=400), every=None)
    feed(callback, range(1, 4), total=3)
    callback.on_run_end(trainer(3))
    assert not output.getvalue(), "nothing to summarise"
    callback.on_run_end(trainer(3, {"NOT_CONVERGED": 3, "CONVERGED": 5, "NEGATIVE_CURVATURE": 2}))
    text = output.getvalue()
    assert "10 linear solves, 5 of them failed" in text
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in text.splitlines() if "│" in line]
    expected = [(Status.CONVERGED, 5), (Status.NOT_CONVERGED, 3), (Status.NEGATIVE_CURVATURE, 2)]
    assert rows == [[status.name, str(count), status.value] for status, count in expected]


def test_a_run_prints_a_line_an_alternation_and_the_summary() -> None:
    output = io.StringIO()
    make(callbacks=[Diagnostics(Console(file=output, width=400))]).run()
    lines = output.getvalue().splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["alternation", "1", "2", "3", "4", "5"]
    assert all(line.endswith("3 CONVERGED") for line in lines[1:6])
    assert "15 linear solves, none of them failed" in lines[6]


def test_a_bad_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="Diagnostics: every must be a whole number of at least 1"):
        Diagnostics(every=0)
