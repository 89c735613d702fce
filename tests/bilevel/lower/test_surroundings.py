"""What surrounds a call: gradient modes, autocast, transforms of torch.func."""

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
    check_hypergradient,
    functional_call,
    hypergradient,
    linearize,
)
from bilevel.hypergradients import SAMA
from bilevel.lower import StaleSystemError
from bilevel.nn import training_autocast
from bilevel.training import SingleLevelTrainer, gradient_of
from tests.support.cases import vector
from tests.support.problems.smooth import BATCHES, Smooth, variables

ARGUMENTS: dict[str, Any] = {"upper_batch": BATCHES[0], "lower_batches": BATCHES}
METHODS: list[Method] = [Implicit(CG(20, 1e-12)), Unrolled(SGDUpdate(0.01)), Implicit(CG(20, 1e-12), hvp="auto")]


def trained(run: Callable[[Trainer], None]) -> tuple[Trainer, Params, Params]:
    upper, lower = ({name: leaf.clone().requires_grad_() for name, leaf in v.items()} for v in variables())
    trainer = Trainer(
        Smooth(0.5),
        Level(upper, torch.optim.SGD(upper.values(), lr=0.01, momentum=0.9), BATCHES),
        Level(lower, torch.optim.Adam(lower.values(), lr=0.01), BATCHES),
        AlternatingSchedule(2, 3, 2),
    )
    run(trainer)
    return trainer, upper, lower


def solve(problem: Problem, upper: Params, lower: Params, batches: Any) -> Params:
    return lower


CALLS: dict[str, Callable[[Problem, Params, Params], Any]] = {
    "hypergradient": lambda problem, x, y: hypergradient(problem, x, y, **ARGUMENTS),
    "linearize": lambda problem, x, y: linearize(problem, x, y, BATCHES),
    "check_hypergradient": lambda problem, x, y: check_hypergradient(problem, x, y, **ARGUMENTS, lower_solver=solve),
}


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode_is_refused(name: str) -> None:
    upper, lower = variables()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"^{name} was called under torch.inference_mode"):
        CALLS[name](Smooth(0.5), upper, lower)


@pytest.mark.parametrize("use", ["hypergradient", "solve", "cross", "gradient", "stationarity"])
def test_a_system_is_not_used_under_inference_mode(use: str) -> None:
    upper, lower = variables()
    system = linearize(Smooth(0.5), upper, lower, BATCHES)
    arguments = {"hypergradient": [BATCHES[0]], "solve": [lower], "cross": [lower]}.get(use, [])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"called under torch\.inference_mode"):
        getattr(system, use)(*arguments)


def test_a_systems_operator_is_not_used_under_inference_mode() -> None:
    upper, lower = variables()
    for hvp in (None, "auto"):
        system = linearize(Smooth(0.5), upper, lower, BATCHES, hvp=hvp)  # type: ignore[arg-type]
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"called under torch\.inference_mode"):
            system.operator(lower)


@pytest.mark.parametrize("call", ["run", "advance"])
def test_training_under_inference_mode_is_refused_and_changes_nothing(call: str) -> None:
    trainer, _, lower = trained(lambda trainer: None)
    before = {name: leaf.detach().clone() for name, leaf in lower.items()}
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"Trainer.{call} was called under torch.inference"):
        getattr(trainer, call)()
    assert all(torch.equal(lower[name], leaf) for name, leaf in before.items())
    w = torch.ones(2, requires_grad=True)
    level = Level({"w": w}, torch.optim.SGD([w], lr=0.1), [torch.ones(2)])
    single = SingleLevelTrainer(gradient_of(lambda batch: (w @ batch) ** 2, {"w": w}), level, 3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"SingleLevelTrainer.{call} was called"):
        getattr(single, call)()


def test_tensors_that_were_made_under_inference_mode_are_named() -> None:
    upper, lower = variables()
    with torch.inference_mode():
        made = lower["w"].clone(), BATCHES[0].clone()
    for x, y in (({**upper, "w": made[0]}, lower), (upper, {**lower, "w": made[0]})):
        with pytest.raises(TypeError, match=r"(upper|lower)\['w'\] was made under torch.inference_mode"):
            hypergradient(Smooth(0.5), x, y, **ARGUMENTS)
    with pytest.raises(TypeError, match=r"upper_batch, tensor 0 was made under torch\.inf"):
        hypergradient(Smooth(0.5), upper, lower, upper_batch=made[1], lower_batches=BATCHES)
    with pytest.raises(TypeError, match=r"lower_batches, tensor 1 was made under torch\.inf"):
        linearize(Smooth(0.5), upper, lower, [BATCHES[0], made[1]])


@pytest.mark.parametrize("around", [torch.no_grad, lambda: torch.set_grad_enabled(False)], ids=["no_grad", "set"])
def test_no_grad_around_a_training_changes_no_bit_of_it(around: Callable[[], Any]) -> None:
    def without_grad(trainer: Trainer) -> None:
        with around():
            trainer.run()
            assert not torch.is_grad_enabled()

    expected, found = trained(lambda trainer: trainer.run()), trained(without_grad)
    start = variables()
    for mine, theirs, begin in zip(found[1:], expected[1:], start, strict=True):
        assert all(torch.equal(mine[name], leaf) for name, leaf in theirs.items())
        assert not all(torch.equal(mine[name], leaf) for name, leaf in begin.items())
    torch.set_grad_enabled(True)


def test_no_grad_around_plain_training_and_a_step_at_a_time() -> None:
    w = torch.ones(2, requires_grad=True)
    level = Level({"w": w}, torch.optim.SGD([w], lr=0.1), [torch.ones(2)])
    with torch.no_grad():
        SingleLevelTrainer(gradient_of(lambda batch: (w @ batch) ** 2, {"w": w}), level, 1).run()
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.6))
    trainer, _, lower = trained(lambda trainer: None)
    with torch.no_grad():
        trainer.advance()
    assert not torch.equal(lower["w"], variables()[1]["w"])


@pytest.mark.parametrize("method", METHODS, ids=["implicit", "unrolled", "auto"])
def test_no_grad_around_a_hypergradient_changes_no_bit_of_it(method: Method) -> None:
    upper, lower = variables()
    expected = hypergradient(Smooth(0.5), upper, lower, method, **ARGUMENTS)
    with torch.no_grad():
        found = hypergradient(Smooth(0.5), upper, lower, method, **ARGUMENTS)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0.0)
    assert found.implicit["t"] != 0.0


def outer(call: Callable[[Params, Params, Tensor], Tensor]) -> dict[str, Callable[[], Any]]:
    """The ways to put a transform around a call: over upper values, lower values or batches, by any transform."""
    upper, lower = variables()
    w = {"x": upper["w"], "y": lower["w"]}
    many = torch.stack([BATCHES[0], BATCHES[1]])

    def of(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        return call({**upper, "w": x}, {**lower, "w": y}, batch)

    return {
        "vmap over x": lambda: torch.func.vmap(lambda x: of(x, w["y"], BATCHES[0]))(torch.stack([w["x"], w["x"]])),
        "vmap over y": lambda: torch.func.vmap(lambda y: of(w["x"], y, BATCHES[0]))(torch.stack([w["y"], w["y"]])),
        "vmap over batches": lambda: torch.func.vmap(lambda batch: of(w["x"], w["y"], batch))(many),
        "jacrev": lambda: torch.func.jacrev(lambda x: of(x, w["y"], BATCHES[0]))(w["x"]),
        "jacfwd": lambda: torch.func.jacfwd(lambda x: of(x, w["y"], BATCHES[0]))(w["x"]),
        "grad": lambda: torch.func.grad(lambda y: of(w["x"], y, BATCHES[0]).sum())(w["y"]),
        "jvp": lambda: torch.func.jvp(lambda x: of(x, w["y"], BATCHES[0]), (w["x"],), (w["x"],)),
        "dual numbers": lambda: dual(of, w),
    }


def dual(of: Callable[..., Tensor], w: dict[str, Tensor]) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return of(torch.autograd.forward_ad.make_dual(w["x"], w["x"]), w["y"], BATCHES[0])


@pytest.mark.parametrize("name", outer(lambda x, y, batch: batch))
@pytest.mark.parametrize("method", METHODS, ids=["implicit", "unrolled", "auto"])
def test_transforms_around_a_hypergradient_are_refused(name: str, method: Method) -> None:
    def call(x: Params, y: Params, batch: Tensor) -> Tensor:
        return hypergradient(Smooth(0.5), x, y, method, upper_batch=batch, lower_batches=BATCHES).grad["t"]

    with pytest.raises(TypeError, match=r"belongs to a torch\.func transform .* in a loop"):
        outer(call)[name]()


@pytest.mark.parametrize("name", ["vmap over x", "vmap over batches", "jacrev"])
def test_transforms_around_a_system_are_refused(name: str) -> None:
    def call(x: Params, y: Params, batch: Tensor) -> Tensor:
        return linearize(Smooth(0.5), x, y, [batch]).stationarity()  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"belongs to a torch\.func transform"):
        outer(call)[name]()


class Net(Problem):
    """A network in float32 whose objectives cast as they are told."""

    # Which compares products in float64.
    check_curvature = False
    regularization_weight = 20.0

    def __init__(self, cast: Callable[[], Any]) -> None:
        torch.manual_seed(1)
        self.net, self.cast = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)), cast
        self.seen: set[torch.dtype] = set()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        with self.cast():
            outputs = functional_call(self.net, lower, batch)
        self.seen.add(outputs.dtype)
        return (outputs.float().squeeze(1) - upper["scale"] * batch.sum(1)).square().mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        with self.cast():
            return functional_call(self.net, lower, batch).float().square().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return torch.stack([leaf.square().sum() for leaf in lower.values()]).sum()


def net_result(problem: Net) -> Params:
    lower = {name: p.detach().clone() for name, p in problem.net.named_parameters()}
    batch = vector(64, 4).reshape(8, 8).float()
    result = hypergradient(problem, {"scale": torch.ones(())}, lower, upper_batch=batch, lower_batches=[batch])
    return result.grad


def no_cast() -> Any:
    return torch.autocast("cpu", enabled=False)


def test_autocast_around_a_hypergradient_does_not_reach_it() -> None:
    plain = net_result(Net(torch.enable_grad))
    problem = Net(torch.enable_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(net_result(problem), plain, rtol=0.0, atol=0.0)
        assert torch.is_autocast_enabled("cpu")
    assert problem.seen == {torch.float32}


def test_training_autocast_casts_in_training_steps_and_in_no_hypergradient() -> None:
    problem = Net(lambda: training_autocast("cpu"))
    torch.testing.assert_close(net_result(problem), net_result(Net(no_cast)), rtol=0.0, atol=0.0)
    assert problem.seen == {torch.float32}
    lower = {name: p.detach().clone().requires_grad_() for name, p in problem.net.named_parameters()}
    upper, batch = {"scale": torch.ones((), requires_grad=True)}, vector(64, 4).reshape(8, 8).float()
    Trainer(
        problem,
        Level(upper, torch.optim.SGD(upper.values(), lr=0.1), [batch]),
        Level(lower, torch.optim.SGD(lower.values(), lr=0.1), [batch]),
        AlternatingSchedule(1, 1, 0),
    ).run()
    assert problem.seen == {torch.float32, torch.bfloat16}


def test_autocast_inside_an_objective_is_told_in_a_hypergradient() -> None:
    with pytest.warns(UserWarning, match=r"autocast \(torch.bfloat16\) is on in a pass .*training_autocast"):
        net_result(Net(lambda: torch.autocast("cpu", dtype=torch.bfloat16)))


@pytest.mark.parametrize("method", [*METHODS, OneStep(0.1), SAMA(SGDUpdate(0.1)), Penalty(SGDUpdate(0.1), 10.0)])
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_an_objective_that_writes_to_a_variable_is_an_error(method: Method, level: str) -> None:
    class Renormed(Problem):
        check_curvature = False

        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            table = upper["w"] if level == "upper" else lower["w"]
            found = nn.functional.embedding(batch, table.detach(), max_norm=0.5)
            loss = ((lower["w"][batch] + found).sum(-1) * upper["d"] - 1.0 + upper["w"].sum()).square().mean()
            return loss + 0.1 * lower["w"].square().sum()

        def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return lower["w"][batch].square().mean()

    upper = {"d": torch.ones((), dtype=torch.float64), "w": vector(8, 3).reshape(4, 2)}
    lower = {"w": vector(8, 2).reshape(4, 2)}
    batch = torch.tensor([0, 1, 3])
    with pytest.raises((RuntimeError, StaleSystemError), match=rf"{level}\['w'\] (was written to|changed after)"):
        hypergradient(Renormed(), upper, lower, method, upper_batch=batch, lower_batches=[batch])
