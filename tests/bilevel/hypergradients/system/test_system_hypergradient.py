"""`System.hypergradient`: one system, many right-hand sides, and what it does where a solve fails."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import CG, Identity, Implicit, Params, SolverError, SolverWarning, Status, hypergradient, linearize
from bilevel.lower import StaleSystemError
from bilevel.products import FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse
from tests.support.cases import joined
from tests.support.problems.closed_forms import NO_BATCH, Proximal, proximal_point
from tests.support.problems.smooth import BATCHES, Separable, Smooth, variables


@pytest.mark.parametrize("hvp", [ReverseOverReverse(), ForwardOverReverse(), FiniteDifference()], ids=str)
@pytest.mark.parametrize("options", [{}, {"damping": 2.0, "tikhonov": {"v": 1.0}, "implicit": ["v"]}], ids=str)
def test_it_is_the_hypergradient_of_the_same_options_bit_for_bit(hvp: HVPProvider, options: dict[str, Any]) -> None:
    upper, lower = variables()
    problem, solver = Smooth(0.5), CG(4, None)
    system = linearize(problem, upper, lower, BATCHES, solver=solver, hvp=hvp, **options)
    for batch in BATCHES:
        found = system.hypergradient(batch)
        whole = hypergradient(
            *(problem, upper, lower), Implicit(solver, hvp=hvp, **options), upper_batch=batch, lower_batches=BATCHES
        )
        for name in ("grad", "direct", "implicit"):
            one, other = getattr(found, name), getattr(whole, name)
            assert all(torch.equal(one[key], other[key]) for key in upper)
        assert torch.equal(found.loss, whole.loss)
        assert (found.stationarity, found.noise) == (whole.stationarity, whole.noise)
        assert found.solution is not None
        assert found.solution.status.ok
        assert found.lower is None
        assert found.failure is None


def test_each_right_hand_side_gets_its_own_answer() -> None:
    class Targets(Proximal):
        def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
            return batch * joined(lower).sum()

    _, upper, lower = proximal_point()
    system = linearize(Targets(), upper, lower, NO_BATCH, solver=CG(50, 1e-12))
    one, two = (system.hypergradient(factor) for factor in (1.0, -3.0))
    torch.testing.assert_close(joined(two.grad), -3.0 * joined(one.grad), rtol=1e-10, atol=0.0)


def test_a_start_is_taken_as_it_is() -> None:
    _, upper, lower = proximal_point()
    system = linearize(Proximal(), upper, lower, NO_BATCH, solver=CG(2, None))
    start = {name: 100.0 * leaf for name, leaf in lower.items()}
    cold, warm = system.hypergradient(None), system.hypergradient(None, x0=start)
    assert cold.solution is not None
    assert warm.solution is not None
    assert cold.solution.residual_norms[0] == 1.0
    # Unlike a warm start of `Implicit`, it is not left out where it is far away.
    assert warm.solution.residual_norms[0] > 1.0
    with pytest.raises(ValueError, match="x0 must have the names and shapes of b"):
        system.hypergradient(None, x0={"a": start["a"]})
    with pytest.raises(TypeError, match="x0 must be a dict"):
        system.hypergradient(None, x0=[start["a"]])  # type: ignore[arg-type]


def test_upper_variables_that_have_moved_are_taken_as_they_are_now() -> None:
    upper, lower = variables()
    system = linearize(Separable(linear=True), upper, lower, BATCHES, solver=CG(20, 1e-10))
    before = system.hypergradient(BATCHES[0])
    with torch.no_grad():
        upper["w"].add_(1.0)
    now = system.hypergradient(BATCHES[0])
    fresh = linearize(Separable(linear=True), upper, lower, BATCHES, solver=CG(20, 1e-10)).hypergradient(BATCHES[0])
    assert not torch.equal(now.grad["w"], before.grad["w"])
    torch.testing.assert_close(now.grad, fresh.grad, rtol=1e-9, atol=1e-12)
    assert now.stationarity == pytest.approx(fresh.stationarity, rel=1e-12)


@pytest.mark.parametrize("solver", [CG(), Identity()], ids=["a solve", "no solve"])
def test_a_stale_system_gives_nothing(solver: Any) -> None:
    upper, lower = variables()
    system = linearize(Smooth(0.5), upper, lower, BATCHES, solver=solver)
    system.hypergradient(BATCHES[0], on_failure="ignore")
    lower["w"].data.add_(1.0)
    with pytest.raises(StaleSystemError, match=r"lower\['w'\] changed after linearize"):
        system.hypergradient(BATCHES[0])


class Concave(Proximal):
    regularization_weight = 0.1

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return -joined(lower).square().sum()


def test_a_failed_solve_warns_at_the_users_line_or_raises() -> None:
    _, upper, lower = proximal_point()
    system = linearize(Concave(), upper, lower, NO_BATCH)
    with pytest.warns(SolverWarning, match="negative curvature") as caught:
        warned = system.hypergradient(None)
    assert caught[0].filename == __file__
    assert warned.failure == str(caught[0].message)
    with pytest.raises(SolverError, match="negative curvature") as raised:
        system.hypergradient(None, on_failure="raise")
    assert raised.value.solution is not None
    assert raised.value.solution.status is Status.NEGATIVE_CURVATURE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = system.hypergradient(None, on_failure="ignore")
    # What to do about it is worked out where it is shown.
    assert ignored.failure is not None
    assert warned.failure is not None
    assert warned.failure.startswith(ignored.failure)
    with pytest.raises(ValueError, match=r"on_failure must be one of .* got 'quiet'"):
        system.hypergradient(None, on_failure="quiet")  # type: ignore[arg-type]
