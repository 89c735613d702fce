"""Mixed precision on a device: bfloat16 in training steps, and none in the passes of a hypergradient."""

from collections.abc import Callable
from functools import partial

import torch

from bilevel import CG, AlternatingSchedule, Implicit, Level, Params, Trainer, hypergradient
from tests.support.problems.device_networks import made
from tests.support.rounding import BFLOAT16, distance, rounding_limit

CPU = torch.device("cpu")


def step_gradient(device: torch.device, dtype: torch.dtype, *, cast: bool) -> Params:
    """Of the lower objective, as a training step takes it."""
    problem, upper, lower, batch = made("weight norm", device, dtype)
    problem.cast = cast
    leaves = {name: leaf.requires_grad_() for name, leaf in lower.items()}
    found = torch.autograd.grad(problem.lower_objective(upper, leaves, batch), list(leaves.values()))
    assert problem.seen == {torch.bfloat16 if cast else dtype}
    return dict(zip(leaves, found, strict=True))


def test_a_step_in_bfloat16_is_off_by_its_rounding(
    device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    exact = partial(step_gradient, CPU, torch.float64, cast=False)
    error, limit = distance(step_gradient(device, torch.float32, cast=True), exact()), rounding_limit(exact, BFLOAT16)
    record_property("error", error)
    record_property("limit", limit)
    assert error <= limit < 1.0
    # Something was rounded at all.
    assert error > BFLOAT16.unit / 100


def test_a_hypergradient_under_it_is_that_without(device: torch.device) -> None:
    def gradient(cast: bool) -> Params:
        problem, upper, lower, batch = made("batch norm", device, torch.float32)
        problem.cast = cast
        method = Implicit(CG(3, rtol=None))
        options = {"upper_batch": batch, "lower_batches": [batch], "on_failure": "ignore"}
        found = hypergradient(problem, upper, lower, method, **options).grad
        # Examinations are made in float64.
        assert torch.float32 in problem.seen <= {torch.float32, torch.float64}
        return found

    plain, cast = gradient(False), gradient(True)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_steps_of_a_trainer_are_cast_and_its_hypergradients_are_not(device: torch.device) -> None:
    problem, upper, lower, batch = made("batch norm", device, torch.float32)
    problem.cast = True
    trainer = Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [batch]),
        Level(lower, torch.optim.Adam(lower.values(), lr=1e-2), [batch]),
        AlternatingSchedule(1, 2, 1),
        CG(2, rtol=None),
        on_failure="ignore",
    )
    trainer.run()
    assert problem.seen >= {torch.bfloat16, torch.float32}
    assert {leaf.dtype for leaf in (*upper.values(), *lower.values())} == {torch.float32}
