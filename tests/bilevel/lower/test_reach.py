"""Variables that no objective reaches: an error where it is all of them, one line where it is some."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    CG,
    AlternatingSchedule,
    Implicit,
    Level,
    Method,
    OneStep,
    Params,
    Penalty,
    Problem,
    SGDUpdate,
    Trainer,
    Unrolled,
    functional_call,
    hypergradient,
    linearize,
    proximal,
    ridge,
)
from bilevel.products import FiniteDifference, ForwardOverReverse, GaussNewton, MicroBatched, ReverseOverReverse
from tests.support.cases import vector

Call = Callable[[nn.Module, Params, Tensor], Tensor]

METHODS: dict[str, Method] = {
    "implicit": Implicit(CG(5, 1e-10)),
    "kept graphs": Implicit(CG(5, 1e-10), hvp=ReverseOverReverse(keep_graph=True)),
    "auto": Implicit(CG(5, 1e-10), hvp="auto"),
    "unrolled": Unrolled(SGDUpdate(0.1)),
    "one step": OneStep(0.1),
    "one exact step": OneStep(0.1, hvp=ReverseOverReverse()),
    "penalty": Penalty(SGDUpdate(0.1), 10.0),
}


def direct(module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    return module(inputs)


def detached(module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    return functional_call(module, {name: leaf.detach() for name, leaf in params.items()}, inputs)


def through_data(module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    return functional_call(module, {name: leaf.data for name, leaf in params.items()}, inputs)


def without_gradients(module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return functional_call(module, params, inputs)


SPELLINGS: list[Call] = [direct, detached, through_data, without_gradients]


class Regression(Problem):
    """A network below, its starting point or penalty weights above; each level calls the network as it is told."""

    def __init__(self, below: Call, above: Call, penalty: str | None = "proximal", *, frozen: bool = False) -> None:
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.net.requires_grad_(not frozen)
        self.below, self.above, self.penalty = below, above, penalty
        self.regularization_weight = 1.0 if penalty else 0.0

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (self.below(self.net, lower, batch).squeeze(1) - batch.sum(1).sin()).square().mean()

    def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.below(self.net, lower, batch).squeeze(1)

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (self.above(self.net, lower, batch).squeeze(1) - batch[:, 0]).square().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor | None:
        return {"proximal": lambda: proximal(upper, lower), "ridge": lambda: ridge(lower), None: lambda: None}[
            self.penalty
        ]()

    def variables(self) -> tuple[Params, Params]:
        lower = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        return {name: leaf + 0.1 for name, leaf in lower.items()}, lower


BATCH = vector(18, 5).reshape(6, 3)
ARGUMENTS: dict[str, Any] = {"upper_batch": BATCH, "lower_batches": [BATCH]}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable module", "frozen module"])
@pytest.mark.parametrize("penalty", ["proximal", "ridge", None])
@pytest.mark.parametrize("call", SPELLINGS)
def test_a_lower_objective_that_reaches_no_lower_variable_is_an_error(
    call: Call, penalty: str | None, frozen: bool
) -> None:
    problem = Regression(call, functional_call, penalty, frozen=frozen)
    upper, lower = problem.variables()
    for _ in range(2):  # Not the first time alone.
        with pytest.raises(ValueError, match=r"lower_objective reaches none of the lower variables .*functional_call"):
            hypergradient(problem, upper, lower, **ARGUMENTS, on_failure="ignore")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("below", [True, False], ids=["below", "above"])
def test_every_method_refuses_a_level_that_does_not_see_the_lower_variables(method: Method, below: bool) -> None:
    problem = Regression(direct if below else functional_call, functional_call if below else direct)
    name = "lower_objective" if below else "upper_objective"
    with pytest.raises(ValueError, match=f"{name} reaches none of the lower variables"):
        hypergradient(problem, *problem.variables(), method, **ARGUMENTS)


@pytest.mark.parametrize("hvp", [ReverseOverReverse(), FiniteDifference(), GaussNewton(), MicroBatched(4)], ids=str)
def test_every_provider_refuses_a_lower_objective_that_reaches_nothing(hvp: Any) -> None:
    problem = Regression(direct, functional_call)
    problem.lower_output_loss = lambda *args: (args[-2] - args[-1].sum(1).sin()).square().mean()  # type: ignore[method-assign]
    _, lower = problem.variables()
    with pytest.raises(ValueError, match=r"lower_(objective|outputs) reaches none of the lower variables"):
        linearize(problem, *problem.variables(), [BATCH], hvp=hvp).solve(lower)


def test_forward_mode_refuses_it_too() -> None:
    problem = Regression(direct, functional_call)
    with pytest.raises(ValueError, match="lower_objective reaches none of the lower variables"):
        hypergradient(problem, *problem.variables(), Implicit(CG(5), hvp=ForwardOverReverse()), **ARGUMENTS)


def test_forward_mode_agrees_that_nothing_is_wrong_with_a_network_that_is_called_rightly() -> None:
    problem = Regression(functional_call, functional_call)
    methods = [Implicit(CG(5), hvp=hvp) for hvp in (ForwardOverReverse(), ReverseOverReverse())]
    forward, reverse = (
        hypergradient(problem, *problem.variables(), method, **ARGUMENTS, on_failure="ignore") for method in methods
    )
    torch.testing.assert_close(forward.grad, reverse.grad)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_trainer_refuses_it_at_its_first_lower_step_and_changes_nothing(micro_batch: int | None) -> None:
    problem = Regression(direct, functional_call)
    problem.lower_output_loss = lambda *args: (args[-2] - args[-1].sum(1).sin()).square().mean()  # type: ignore[method-assign]
    upper, lower = ({name: leaf.requires_grad_() for name, leaf in v.items()} for v in problem.variables())
    before = {name: leaf.detach().clone() for name, leaf in lower.items()}
    trainer = Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [BATCH]),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.1), [BATCH], micro_batch=micro_batch),
        AlternatingSchedule(2, 2, 1),
    )
    with pytest.raises(ValueError, match=r"lower_(objective|outputs) reaches none of the lower variables"):
        trainer.run()
    assert all(torch.equal(lower[name], leaf) for name, leaf in before.items())


class Weighted(Problem):
    """Upper variables that stand in the loss, in the regularizer, above, or nowhere."""

    regularization_weight = 1.0

    def __init__(self, *used: str) -> None:
        self.used = used

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        weight = upper["loss"].exp() if "loss" in self.used else 1.0
        return weight * (batch @ lower["w"] - 1.0).square().mean() + (lower["b"] ** 2 if "b" in self.used else 0.0)

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return ridge(lower) * (upper["penalty"].exp() if "penalty" in self.used else 1.0)

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (batch @ lower["w"]).square().mean() + (upper["direct"] ** 2 if "direct" in self.used else 0.0)


def weighted() -> tuple[Params, Params]:
    upper = {name: torch.tensor(0.3, dtype=torch.float64) for name in ("loss", "penalty", "direct")}
    return upper, {"w": vector(3, 1), "b": torch.tensor(0.5, dtype=torch.float64)}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_upper_variables_that_stand_nowhere_are_an_error(method: Method) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="no objective, neither upper nor lower, reaches any of the upper var"):
            hypergradient(problem := Weighted("b"), *weighted(), method, **ARGUMENTS)
    with pytest.raises(ValueError, match="no objective, neither upper nor lower, reaches any of the upper var"):
        hypergradient(problem, *weighted(), method, **ARGUMENTS)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("used", ["loss", "penalty", "direct"])
def test_single_variables_that_are_not_reached_are_listed_once(
    method: Method, used: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem, missing = Weighted(used), [name for name in ("loss", "penalty", "direct") if name != used]
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        for _ in range(3):
            hypergradient(problem, *weighted(), method, **ARGUMENTS, on_failure="ignore")
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "upper variables" in line] == [
        f"no objective reaches 2 of the 3 upper variables on this batch: {missing}. Their derivatives are zero; leave "
        "them out of the level if that is always so"
    ]
    # Through the regularizer alone a variable is reached, but not by what is to be learned.
    lower = [line for line in said if line.startswith("lower_objective does not reach")]
    assert [line.partition(". ")[0] for line in lower] in (
        [],
        ["lower_objective does not reach 1 of the 2 lower variables on this batch: ['b']"],
    )


def test_a_training_lists_a_lower_variable_that_the_loss_alone_does_not_reach(caplog: pytest.LogCaptureFixture) -> None:
    upper, lower = ({name: leaf.requires_grad_() for name, leaf in v.items()} for v in weighted())
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        Trainer(
            Weighted("loss", "penalty", "direct"),
            Level(upper, torch.optim.SGD(upper.values(), lr=0.01), [BATCH]),
            Level(lower, torch.optim.SGD(lower.values(), lr=0.01), [BATCH]),
            AlternatingSchedule(3, 2, 2),
        ).run()
    assert len(caplog.records) == 1
    assert "lower_objective does not reach 1 of the 2 lower variables on this batch: ['b']" in caplog.text


def test_nothing_is_said_of_problems_whose_variables_are_all_reached(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="bilevel"):
        hypergradient(Weighted("loss", "penalty", "direct", "b"), *weighted(), **ARGUMENTS)
        problem = Regression(functional_call, functional_call)
        hypergradient(problem, *problem.variables(), CG(5), **ARGUMENTS, on_failure="ignore")
    assert not caplog.records


def test_a_module_that_is_called_directly_beside_a_ridge_in_the_objective_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The ridge reaches every lower variable; the network's own parameters are what gives it away."""

    class Hidden(Regression):
        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return super().lower_objective(upper, lower, batch) + 0.1 * ridge(lower)

    for below, above, name in ((direct, functional_call, "lower_objective"), (functional_call, direct, "upper_obj")):
        caplog.clear()
        problem = Hidden(below, above)
        if name == "upper_obj":
            real = problem.upper_objective
            problem.upper_objective = lambda u, y, b, real=real: real(u, y, b) + 0.1 * ridge(y)  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING, logger="bilevel"):
            for _ in range(2):
                hypergradient(problem, *problem.variables(), CG(5), **ARGUMENTS, on_failure="ignore")
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert said[0].startswith(name)
        assert "depends on 4 tensors that require gradients and are no variables of this pass" in said[0]


class SomeBatches(Problem):
    """Upper variables that stand in the second batch alone."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, labelled = batch
        value = (inputs @ lower["w"] - 1.0).square().mean() + 0.1 * ridge(lower)
        return value * upper["t"].exp() if labelled else value

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        return (batch[0] @ lower["w"]).square().mean()


@pytest.mark.parametrize("labels", [(False, True), (False, False)])
def test_upper_variables_that_stand_in_some_batches_alone_do_not_stop_a_training(labels: tuple[bool, bool]) -> None:
    upper = {"t": torch.zeros((), dtype=torch.float64, requires_grad=True)}
    lower = {"w": vector(3, 1).requires_grad_()}
    batches = [(BATCH, labelled) for labelled in labels]
    trainer = Trainer(
        SomeBatches(),
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [(BATCH, False)]),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.01), batches),
        AlternatingSchedule(20, 1, 1),
    )
    if any(labels):
        trainer.run()
        assert bool(upper["t"] != 0.0)
    else:
        with pytest.raises(ValueError, match="no objective, neither upper nor lower, reaches any of the upper var"):
            trainer.run()


@pytest.mark.parametrize("hvp", [GaussNewton(), MicroBatched(4)], ids=str)
@pytest.mark.parametrize("spelling", ["detached", "kept elsewhere"])
def test_a_loss_that_does_not_reach_its_outputs_is_an_error(hvp: Any, spelling: str) -> None:
    class Apart(Regression):
        def lower_outputs(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            self.kept = super().lower_outputs(upper, lower, batch)
            return self.kept

        def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Tensor) -> Tensor:
            z = outputs.detach() if spelling == "detached" else self.kept
            return (z[: len(batch)] - batch[: len(z)].sum(1).sin()).square().mean()

    problem = Apart(functional_call, functional_call)
    with pytest.raises(ValueError, match="lower_output_loss reaches none of the outputs"):
        hypergradient(problem, *problem.variables(), Implicit(CG(5), hvp=hvp), **ARGUMENTS, on_failure="ignore")
    upper, lower = ({name: leaf.requires_grad_() for name, leaf in v.items()} for v in problem.variables())
    trainer = Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [BATCH]),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.1), [BATCH], micro_batch=4),
        AlternatingSchedule(1, 1, 1),
    )
    with pytest.raises(ValueError, match="lower_output_loss reaches none of the outputs"):
        trainer.run()


def test_other_upper_variables_of_the_same_problem_are_judged_anew(caplog: pytest.LogCaptureFixture) -> None:
    class Weighted(Problem):
        def lower_objective(self, upper: Params, lower: Params, batch: None) -> Tensor:
            weight = torch.stack([leaf.exp() for leaf in upper.values()]).sum()
            return (0.5 * weight * lower["y"] ** 2 - lower["y"]).sum()

        def upper_objective(self, upper: Params, lower: Params, batch: None) -> Tensor:
            return lower["y"].square().sum()

    problem, y = Weighted(), {"y": torch.ones(2, dtype=torch.float64)}
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        for names in ("a", "ab"):
            x = {name: torch.zeros((), dtype=torch.float64) for name in names}
            found = hypergradient(problem, x, y, upper_batch=None, lower_batches=[None], on_failure="ignore")
            assert all(float(leaf) < 0.0 for leaf in found.grad.values())
    assert not caplog.records
