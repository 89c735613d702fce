"""Functional optimizer steps against torch.optim, and their derivatives against finite differences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Params
from bilevel.hypergradients.updates.torch_updates import TorchUpdate, from_optimizer
from bilevel.hypergradients.updates.update import AdamUpdate, SGDUpdate, State, Update, starting_state
from tests.support.cases import vector

STEPS = 5
# Name -> the options of torch.optim that have a twin, the twin.
TWINS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Update]] = {
    "plain": (torch.optim.SGD, {"lr": 0.3}, SGDUpdate(0.3)),
    "decay": (torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.2}, SGDUpdate(0.3, weight_decay=0.2)),
    "momentum": (
        torch.optim.SGD,
        {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.2},
        SGDUpdate(0.3, momentum=0.8, weight_decay=0.2),
    ),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.3, "momentum": 0.8, "nesterov": True},
        SGDUpdate(0.3, momentum=0.8, nesterov=True),
    ),
    "adam": (torch.optim.Adam, {"lr": 0.1}, AdamUpdate(0.1)),
    "adam, options": (
        torch.optim.Adam,
        {"lr": 0.1, "betas": (0.5, 0.7), "eps": 0.2, "weight_decay": 0.3},
        AdamUpdate(0.1, (0.5, 0.7), 0.2, 0.3),
    ),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}, AdamUpdate(0.1, weight_decay=0.3, decoupled=True)),
}
WRAPPED: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.2}),
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True, "alpha": 0.8}),
    (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    (torch.optim.Adadelta, {"lr": 0.5}),
    (torch.optim.Adamax, {"lr": 0.1}),
    (torch.optim.NAdam, {"lr": 0.1}),
    (torch.optim.RAdam, {"lr": 0.1}),
    (torch.optim.ASGD, {"lr": 0.1}),
    (torch.optim.Rprop, {"lr": 0.1}),
]


def start() -> Params:
    return {"w": vector(6, 1).reshape(2, 3), "scale": vector(1, 2)[0], "none": vector(0)}


def gradient(step: int) -> Params:
    flat = vector(7, 10 + step)
    return {"w": flat[:6].reshape(2, 3), "scale": flat[6], "none": vector(0)}


def live(optimizer: type[torch.optim.Optimizer], options: dict[str, Any]) -> tuple[torch.optim.Optimizer, Params]:
    variables = {name: leaf.clone().requires_grad_() for name, leaf in start().items()}
    return optimizer(list(variables.values()), **options), variables


def advance(optimizer: torch.optim.Optimizer, variables: Params, step: int) -> None:
    for name, leaf in variables.items():
        leaf.grad = gradient(step)[name]
    optimizer.step()


def assert_same_path(
    update: Update, optimizer: torch.optim.Optimizer, variables: Params, y: Params, state: State, first: int = 0
) -> None:
    """The next steps of both agree; torch's differentiable steps correct Adam's bias in float32, whatever the dtype."""
    rounded = isinstance(update, TorchUpdate) and "Adam" in update.optimizer.__name__
    relative, absolute = (1e-4, 1e-5) if rounded else (1e-13, 1e-14)
    for step in range(first, first + STEPS):
        advance(optimizer, variables, step)
        y, state = update.step(y, gradient(step), state)
        for name, leaf in variables.items():
            torch.testing.assert_close(y[name], leaf.detach(), rtol=relative, atol=absolute)


@pytest.mark.parametrize("name", TWINS)
def test_steps_are_those_of_torch(name: str) -> None:
    optimizer, options, update = TWINS[name]
    assert_same_path(update, *live(optimizer, options), start(), update.init(start()))


@pytest.mark.parametrize(("optimizer", "options"), WRAPPED, ids=lambda v: getattr(v, "__name__", ""))
def test_wrapped_steps_are_those_of_torch(optimizer: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    assert_same_path(TorchUpdate(optimizer, options), *live(optimizer, options), start(), {})


def path(update: Update, *inputs: Tensor) -> Tensor:
    """The end of two steps (three where there is a third gradient) as a function of y and the gradients."""
    y: Params = {"w": inputs[0]}
    state = update.init({"w": inputs[0].detach()})
    for g in inputs[1:]:
        y, state = update.step(y, {"w": g}, state)
    return y["w"]


@pytest.mark.parametrize(
    "update",
    [*[twin for _, _, twin in TWINS.values()], *[TorchUpdate(*pair) for pair in WRAPPED]],
    ids=[*TWINS, *[pair[0].__name__ for pair in WRAPPED]],
)
def test_derivatives(update: Update) -> None:
    inputs = [vector(3, seed).requires_grad_() for seed in (30, 31, 32, 33)]
    assert torch.autograd.gradcheck(lambda *given: path(update, *given), inputs, atol=1e-6)


@pytest.mark.parametrize("update", [SGDUpdate(0.3, 0.8, 0.1, True), AdamUpdate(0.1, eps=0.3)], ids=["sgd", "adam"])
def test_second_derivatives(update: Update) -> None:
    inputs = [vector(2, seed).requires_grad_() for seed in (40, 41, 42)]
    assert torch.autograd.gradgradcheck(lambda *given: path(update, *given), inputs, atol=1e-6)


MAKERS: dict[str, tuple[Callable[..., Update], list[float]]] = {
    "sgd": (lambda lr, mu, decay: SGDUpdate(lr, mu, decay, nesterov=True), [0.3, 0.8, 0.1]),
    "adam": (lambda lr, b1, b2, decay: AdamUpdate(lr, (b1, b2), 0.3, decay), [0.1, 0.6, 0.7, 0.2]),
    "adamw": (lambda lr, b1, b2, decay: AdamUpdate(lr, (b1, b2), 0.3, decay, True), [0.1, 0.6, 0.7, 0.2]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_derivatives_with_respect_to_options(name: str) -> None:
    make, values = MAKERS[name]
    fixed = [vector(3, seed) for seed in (50, 51, 52, 53)]
    options = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    assert torch.autograd.gradcheck(lambda *given: path(make(*given), *fixed), options)
    torch.testing.assert_close(path(make(*options), *fixed), path(make(*values), *fixed), rtol=1e-14, atol=1e-14)


def test_adam_at_zero_second_moment_has_its_true_derivative() -> None:
    lr, eps = 0.1, 1e-3
    g = torch.tensor([0.0, 0.7], dtype=torch.float64, requires_grad=True)
    y = torch.ones(2, dtype=torch.float64, requires_grad=True)
    moved = path(AdamUpdate(lr, eps=eps), y, g)
    slope, through = torch.autograd.grad(moved.sum(), [g, y])
    # After one step from rest the move is -lr g / (|g| + eps).
    expected = [-lr / eps, -lr * eps / (0.7 + eps) ** 2]
    torch.testing.assert_close(slope, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0.0)
    assert torch.equal(through, torch.ones(2, dtype=torch.float64))
    plain = path(TorchUpdate(torch.optim.Adam, {"lr": lr, "eps": eps}), y, g)
    assert math.isnan(torch.autograd.grad(plain.sum(), g)[0][0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_adam_does_not_hide_what_is_not_finite(bad: float) -> None:
    g = torch.tensor([bad, 1.0], dtype=torch.float64)
    moved = path(AdamUpdate(0.1), torch.ones(2, dtype=torch.float64), g)
    assert math.isnan(moved[0])
    assert math.isfinite(moved[1])
    y = {"w": torch.ones(2, dtype=torch.float64)}
    _, state = AdamUpdate(0.1).step(y, y, AdamUpdate(0.1).init(y))
    state["square"]["w"][0] = math.nan
    assert AdamUpdate(0.1).step(y, y, state)[0]["w"].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "update", [SGDUpdate(0.3, 0.8), AdamUpdate(0.1), TorchUpdate(torch.optim.RMSprop)], ids=lambda u: type(u).__name__
)
def test_steps_write_to_nothing(update: Update) -> None:
    y, g = start(), gradient(0)
    _, state = update.step(y, g, update.init(y))
    tensors = [*y.values(), *g.values(), *[t for values in state.values() for t in values.values()]]
    before = [(t.clone(), t._version) for t in tensors]
    first, second = update.step(y, g, state), update.step(y, g, state)
    assert all(torch.equal(t, old) and t._version == version for t, (old, version) in zip(tensors, before, strict=True))
    assert all(torch.equal(first[0][name], second[0][name]) for name in y)
    assert all(leaf.grad is None for leaf in (*y.values(), *first[0].values()))


def test_options_in_another_dtype_leave_that_of_the_variables() -> None:
    y = {"w": torch.ones(2), "scale": torch.tensor(1.0)}
    option = torch.tensor(0.1, dtype=torch.float64)
    for update in (SGDUpdate(option, option, option), AdamUpdate(option, (option, option), weight_decay=option)):
        state = update.init(y)
        for _ in range(2):
            moved, state = update.step(y, y, state)
            assert {leaf.dtype for leaf in moved.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        *[(optimizer, options) for optimizer, options, _ in TWINS.values()],
        *[pair for pair in WRAPPED if "amsgrad" not in pair[1]],
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("made", [0, 3])
def test_a_live_optimizer_goes_on_as_an_update(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any], made: int
) -> None:
    running, variables = live(optimizer, options)
    for step in range(made):
        advance(running, variables, step)
    update, state = from_optimizer(running, variables)
    assert isinstance(update, {torch.optim.SGD: SGDUpdate, torch.optim.Adam: AdamUpdate}.get(optimizer, Update))
    y = {name: leaf.detach().clone() for name, leaf in variables.items()}
    assert_same_path(update, running, variables, y, starting_state(update, y, state), first=made)


def test_a_live_optimizer_that_has_no_twin_is_refused() -> None:
    variables = {name: leaf.requires_grad_() for name, leaf in start().items()}
    leaves = list(variables.values())
    groups = torch.optim.SGD([{"params": leaves[:1]}, {"params": leaves[1:]}], lr=0.1)
    with pytest.raises(ValueError, match="2 parameter groups"):
        from_optimizer(groups, variables)
    with pytest.raises(ValueError, match=r"does not hold \['other'\]"):
        from_optimizer(torch.optim.SGD(leaves, lr=0.1), {"other": vector(2)})
    for optimizer in (
        torch.optim.SGD(leaves, lr=0.1, momentum=0.9, dampening=0.5),
        torch.optim.SGD(leaves, lr=0.1, maximize=True),
        torch.optim.Adam(leaves, amsgrad=True),
    ):
        with pytest.raises(ValueError, match="no counterpart"):
            from_optimizer(optimizer, variables)
    uneven = torch.optim.Adam(leaves)
    variables["w"].grad = vector(6).reshape(2, 3)
    uneven.step()
    with pytest.raises(ValueError, match=r"different numbers of steps, \[0, 1\]"):
        from_optimizer(uneven, variables)
    with pytest.raises(TypeError, match="LBFGS cannot be differentiated through"):
        from_optimizer(torch.optim.LBFGS(leaves), variables)


class Named(torch.optim.SGD):
    """Another name for the same step."""


class Signs(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for leaf in self.param_groups[0]["params"]:
            leaf.grad.sign_()
        return super().step(closure)


class Slow(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        raise AssertionError


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_subclass_is_read_as_its_parent_only_where_it_steps_alike(scheduled: bool) -> None:
    variables = start()
    for kind, step in ((Named, None), (Signs, "SGD"), (Slow, "Adam")):
        optimizer = kind(variables.values(), lr=0.3)
        if scheduled:
            torch.optim.lr_scheduler.StepLR(optimizer, 2)
        if step is None:
            assert from_optimizer(optimizer, variables) == (SGDUpdate(0.3), {})
            continue
        with pytest.raises(ValueError, match=rf"{kind.__name__} has a step of its own.*take torch\.optim\.{step}, or"):
            from_optimizer(optimizer, variables)


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Adafactor])
def test_optimizers_without_the_flag_are_refused(optimizer: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(TypeError, match=f"{optimizer.__name__} cannot be differentiated through"):
        TorchUpdate(optimizer)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TorchUpdate(torch.nn.Linear), TypeError, "must be a class of torch.optim"),  # type: ignore[arg-type]
        (lambda: TorchUpdate(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), ValueError, "detaches the gradient"),
        (lambda: TorchUpdate(torch.optim.Adam, {"differentiable": True}), ValueError, "leave `differentiable` out"),
        (lambda: TorchUpdate(torch.optim.Adam, {"lr": torch.tensor(0.1)}), TypeError, r"\['lr'\] are tensors"),
        (lambda: TorchUpdate(torch.optim.Adam, {"lr": -1.0}), ValueError, "Invalid learning rate"),
        (lambda: SGDUpdate(-0.1), ValueError, "SGDUpdate: lr must be a finite number >= 0, got -0.1"),
        (lambda: SGDUpdate("0.1"), ValueError, "lr must be a finite number >= 0"),  # type: ignore[arg-type]
        (lambda: SGDUpdate(math.nan), ValueError, "lr must be a finite number >= 0"),
        (lambda: SGDUpdate(torch.ones(2)), ValueError, r"0-d tensor, got shape \(2,\)"),
        (lambda: SGDUpdate(0.1, nesterov=True), ValueError, "nesterov=True needs a momentum"),
        (lambda: AdamUpdate(0.1, (0.9, 1.0)), ValueError, r"betas\[1\] must be a finite number >= 0 and below 1"),
        (lambda: AdamUpdate(0.1, eps=0.0), ValueError, "eps must be a positive number"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Update], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_torch_detaches_the_first_momentum() -> None:
    """The reason for refusing it: once torch differentiates through it, the refusal can go."""
    y = vector(2, 60).requires_grad_()
    g = [vector(2, seed).requires_grad_() for seed in (61, 62)]
    moved = y.clone()
    optimizer = torch.optim.SGD([moved], lr=1.0, momentum=0.5, differentiable=True)
    for each in g:
        moved.grad = each
        optimizer.step()
    first = torch.autograd.grad(moved.sum(), g[0], allow_unused=True)[0]
    correct = torch.autograd.grad(path(SGDUpdate(1.0, momentum=0.5), y, *g).sum(), g[0])[0]
    assert torch.equal(correct, torch.full((2,), -1.5, dtype=torch.float64))
    assert first is None


def test_a_state_must_cover_the_variables() -> None:
    y = start()
    update = SGDUpdate(0.1, momentum=0.9)
    part: State = {"momentum": {"w": y["w"]}}
    with pytest.raises(ValueError, match=r"state lacks \['momentum/scale', 'momentum/none'\]"):
        starting_state(update, y, part)
    with pytest.raises(ValueError, match="AdamUpdate keeps"):
        starting_state(AdamUpdate(0.1), y, update.init(y))
