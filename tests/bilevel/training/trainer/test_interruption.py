"""A trainer that is stopped at any point, inside a solve too, and resumed ends as one that is not."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import CG, Identity, Implicit, Neumann, Trainer
from bilevel.checkpoint import load_checkpoint
from bilevel.interruption import SIGNALS, Interrupted, Interruption, check, deferred, installed
from bilevel.linear import Solver
from tests.bilevel.training.trainer.test_resume import metrics
from tests.support.problems.small_net import Bell, Net, net_trainer


def made(folder: Path, solver: Solver, aggregate: bool, fresh: bool = False) -> Trainer:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(9)
    method = Implicit(solver, damping=2.0, hessian_batches=2, fresh_batches=fresh, aggregate=aggregate)
    trainer = net_trainer(folder, method=method)
    torch.manual_seed(10)
    return trainer


def run_until(number: int, folder: Path, solver: Solver, aggregate: bool, fresh: bool) -> None:
    """Start or go on in `folder` until the evaluation with this number brings a signal."""
    trainer = made(folder, solver, aggregate, fresh)
    Bell(trainer.problem, number)  # type: ignore[arg-type]
    found = load_checkpoint(folder / "checkpoints")
    if found is not None:
        trainer.load_state_dict(found[1])
    with Interruption(), pytest.raises(Interrupted, match="SIGTERM"):
        trainer.run()


# Of what solvers carry from one right-hand side to the next: nothing, directions, a scale; or one solve an alternation.
CASES = [
    (CG(3, rtol=None), False, False),
    (CG(3, rtol=None, recycle=5), False, False),
    (Neumann(2), False, False),
    (CG(2, rtol=None, recycle=3), True, False),
    (Identity(), False, False),
    (CG(3, rtol=None), False, True),
    (CG(2, rtol=None, recycle=3), True, True),
]
NAMES = ["cg", "recycled", "neumann", "aggregated", "identity", "fresh batches", "aggregated, fresh batches"]


@pytest.mark.parametrize(("solver", "aggregate", "fresh"), CASES, ids=NAMES)
def test_stopped_anywhere_is_not_stopped(tmp_path: Path, solver: Solver, aggregate: bool, fresh: bool) -> None:
    whole = made(tmp_path / "whole", solver, aggregate, fresh)
    whole.run()
    end = torch.get_rng_state()
    for first in (2, 4, 6, 9, 13):
        folder = tmp_path / str(first)
        run_until(first, folder, solver, aggregate, fresh)
        run_until(10, folder, solver, aggregate, fresh)
        torch.manual_seed(12345)
        last = made(folder, solver, aggregate, fresh)
        found = load_checkpoint(folder / "checkpoints")
        assert found is not None
        last.load_state_dict(found[1])
        last.run()
        for level in ("upper", "lower"):
            ours, theirs = last.levels[level].params, whole.levels[level].params
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), (first, level)
        assert isinstance(last.problem, Net)
        assert isinstance(whole.problem, Net)
        pairs = zip(last.problem.net.buffers(), whole.problem.net.buffers(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert metrics(folder) == metrics(tmp_path / "whole")
        assert (last.steps, last.solves) == (whole.steps, whole.solves)
        assert torch.equal(torch.get_rng_state(), end)


def test_a_solve_ends_after_the_product_and_its_step_is_undone(tmp_path: Path) -> None:
    # Three lower steps, then products of the first solve.
    trainer = made(tmp_path / "a", CG(50, rtol=None), False)
    Bell(trainer.problem, 8)  # type: ignore[arg-type]
    before = {name: leaf.clone() for name, leaf in trainer.upper.params.items()}
    with Interruption(), pytest.raises(Interrupted):
        trainer.run()
    assert trainer.steps == {"lower": 3, "upper": 0}
    assert all(torch.equal(trainer.upper.params[name], before[name]) for name in before)
    found = load_checkpoint(tmp_path / "a" / "checkpoints")
    assert found is not None
    assert found[0] == 0
    assert found[1]["steps"] == {"lower": 3, "upper": 0}
    # The same process may go on as well.
    trainer.run()
    whole = made(tmp_path / "b", CG(50, rtol=None), False)
    whole.run()
    assert all(torch.equal(trainer.upper.params[name], whole.upper.params[name]) for name in before)


def test_handlers_are_restored_and_other_threads_left_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption() as handler:
        assert installed() is handler
        assert all(signal.getsignal(number) is handler for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    seen: list[Any] = []

    def elsewhere() -> None:
        with Interruption():
            seen.append(installed())
            check()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [None]


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_wait_where_they_are_deferred_and_nowhere_else(number: signal.Signals) -> None:
    with Interruption(), deferred():
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=number.name):
            check()
    with Interruption(), pytest.raises(Interrupted, match=number.name):
        os.kill(os.getpid(), number)
    with deferred():
        check()


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Interruption(), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)
