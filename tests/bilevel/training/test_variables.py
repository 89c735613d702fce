"""What a level's variables may be: none frozen beside others, none twice, no memory shared with the other level."""

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
    Trainer,
    Unrolled,
    functional_call,
    hypergradient,
    linearize,
)
from bilevel import tree as trees
from bilevel.hypergradients import SAMA, SGDUpdate
from bilevel.training import Callback
from tests.support.cases import vector


class Chain(Problem):
    """A network below whose first layer may be frozen."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        outputs = functional_call(self.net, lower, batch).squeeze(1)
        ridge = torch.stack([leaf.square().sum() for leaf in lower.values()]).sum()
        return (outputs - batch.sum(1)).square().mean() + upper["log"].exp() * ridge

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.net, lower, batch).square().mean()


BATCH = vector(18, 5).reshape(6, 3)


def level(params: Params) -> Level:
    return Level(params, torch.optim.SGD(params.values(), lr=0.1), [BATCH])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frozen", ["0.weight", "2.bias"])
def test_frozen_variables_are_refused_with_the_remedy_that_works(frozen: str, dtype: torch.dtype) -> None:
    problem, upper = Chain(), {"log": torch.tensor(-1.0, dtype=dtype)}
    problem.net.to(dtype)
    batch = BATCH.to(dtype)
    dict(problem.net.named_parameters())[frozen].requires_grad_(False)
    lower: Params = dict(problem.net.named_parameters())
    refused: list[Callable[[], Any]] = [
        lambda: level(lower),
        lambda: hypergradient(problem, upper, lower, upper_batch=batch, lower_batches=[batch]),
        lambda: linearize(problem, upper, lower, [batch]),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=rf"{frozen}.*1 of 4.*requires_grad=False while the others.*leave frozen"):
            call()
    # The remedy of the message: what is left out comes from the module, and nothing responds there.
    kept: Params = {name: p for name, p in problem.net.named_parameters() if p.requires_grad}
    arguments: dict[str, Any] = {"upper_batch": batch, "lower_batches": [batch], "on_failure": "ignore"}
    result = hypergradient(problem, upper, kept, **arguments)
    plain = {name: p.detach().clone() for name, p in kept.items()}
    torch.testing.assert_close(hypergradient(problem, upper, plain, **arguments).grad, result.grad)
    before = dict(problem.net.named_parameters())[frozen].detach().clone()
    log = {"log": upper["log"].clone().requires_grad_()}
    Trainer(
        problem,
        Level(log, torch.optim.SGD(log.values(), lr=0.0), [batch]),
        Level(kept, torch.optim.SGD(kept.values(), lr=0.1), [batch]),
        AlternatingSchedule(1, 3, 0),
    ).run()
    assert torch.equal(dict(problem.net.named_parameters())[frozen], before)
    assert all(not torch.equal(kept[name], leaf) for name, leaf in plain.items())


def test_plain_values_without_requires_grad_are_variables() -> None:
    problem = Chain()
    lower = {name: p.detach().clone() for name, p in problem.net.named_parameters()}
    upper = {"log": torch.tensor(-1.0, dtype=torch.float64)}
    Trainer(problem, level(upper), level(lower), AlternatingSchedule(1, 1, 0)).run()
    assert not torch.equal(lower["0.weight"], dict(problem.net.named_parameters())["0.weight"])


def test_upper_values_may_mix_for_a_single_hypergradient() -> None:
    """An optimizer of one's own may move some of them; the derivatives are right for all."""
    upper = {"log": torch.tensor(-1.0, dtype=torch.float64, requires_grad=True), "idle": torch.zeros(2)}
    lower = {name: p.detach() for name, p in Chain().net.named_parameters()}
    result = hypergradient(Chain(), upper, lower, upper_batch=BATCH, lower_batches=[BATCH], on_failure="ignore")
    assert result.grad.keys() == upper.keys()
    with pytest.raises(ValueError, match=r"Level: params: \['idle'\] \(1 of 2\) have requires_grad=False"):
        level(upper)


class Quadratic(Problem):
    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (trees.flatten(lower) - trees.flatten(upper)).square().sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (trees.flatten(lower) - batch).square().sum()


def flat(dtype: torch.dtype) -> Tensor:
    return torch.arange(12, dtype=dtype)


PAIRS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "the same tensor": lambda buffer: (buffer, buffer),
    "a detached alias": lambda buffer: (buffer, buffer.detach()),
    "another shape": lambda buffer: (buffer, buffer.view(3, 4)),
    "overlapping slices": lambda buffer: (buffer[:7], buffer[6:]),
    "a slice within": lambda buffer: (buffer[2:9], buffer[4:6]),
    "a row and a column": lambda buffer: (buffer.view(3, 4)[1], buffer.view(3, 4)[:, 2]),
    "strides that meet": lambda buffer: (buffer[::2], buffer[1::3]),
    "a transpose": lambda buffer: (buffer.view(3, 4), buffer.view(3, 4).T),
    "parameters": lambda buffer: (nn.Parameter(buffer), buffer),
}
APART: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "slices of one buffer": lambda buffer: (buffer[:6], buffer[6:]),
    "every other entry": lambda buffer: (buffer[::2], buffer[1::2]),
    "two columns": lambda buffer: (buffer.view(3, 4)[:, 0], buffer.view(3, 4)[:, 3]),
    "detached slices": lambda buffer: (buffer[:6].detach(), buffer[6:].detach()),
    "a copy": lambda buffer: (buffer, buffer.clone()),
    "an empty view": lambda buffer: (buffer, buffer[3:3]),
    "a scalar beside": lambda buffer: (buffer[5], buffer[6:]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_variables_of_both_levels_that_share_memory_are_refused(name: str, dtype: torch.dtype) -> None:
    x, y = PAIRS[name](flat(dtype))
    apart = torch.zeros(2, dtype=dtype, requires_grad=x.requires_grad)
    with pytest.raises(ValueError, match=r"upper\['x'\] and lower\['y'\] share memory.*clone\(\)"):
        Trainer(Quadratic(), level({"x": x, "z": apart}), level({"y": y}), AlternatingSchedule(1, 1, 1))


@pytest.mark.parametrize("name", PAIRS)
def test_variables_of_one_level_that_share_memory_are_refused(name: str) -> None:
    x, y = (leaf.detach() for leaf in PAIRS[name](flat(torch.float64)))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(ValueError, match=r"Level: params: 'x' and 'y' share memory.*a tied tensor once"):
        Level({"x": x, "y": y}, optimizer, [BATCH])
    with pytest.raises(ValueError, match="lower: 'x' and 'y' share memory"):
        hypergradient(Quadratic(), {}, {"x": x, "y": y}, upper_batch=BATCH, lower_batches=[BATCH])


@pytest.mark.parametrize("name", APART)
def test_views_that_lie_apart_train(name: str) -> None:
    x, y = APART[name](flat(torch.float64))
    assert trees.overlapping([("x", x), ("y", y)]) is None
    if y.numel() != x.numel():
        return
    batch = torch.zeros(x.numel(), dtype=torch.float64)
    above, below = (Level({n: leaf}, torch.optim.SGD([leaf], lr=0.1), [batch]) for n, leaf in (("x", x), ("y", y)))
    before = x.clone(), y.clone()
    trainer = Trainer(Quadratic(), above, below, AlternatingSchedule(2, 2, 2))
    # One system serves both upper steps: they move x, whose buffer is y's too.
    trainer.problem.curvature_depends_on_upper = False
    trainer.run()
    assert trainer.failures.total() == 0
    assert not torch.equal(x, before[0])
    assert not torch.equal(y, before[1])


def test_copies_of_modules_in_one_flat_buffer_train_as_copies_of_their_own() -> None:
    """Two networks whose parameters are slices of one buffer, as flattened parameters are."""

    class Two(Chain):
        curvature_depends_on_upper = False
        regularization_weight = 0.5

        def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
            return (functional_call(self.net, lower, batch).squeeze(1) - batch.sum(1)).square().mean()

        def regularizer(self, upper: Params, lower: Params) -> Tensor:
            return torch.stack([(leaf - upper[name]).square().sum() for name, leaf in lower.items()]).sum()

    def run(*, shared: bool) -> Params:
        problem = Two()
        values = [p.detach() for p in problem.net.parameters()] * 2
        buffer = torch.cat([value.reshape(-1) for value in values])
        parts = list(buffer.split([value.numel() for value in values])) if shared else values
        leaves = [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]
        leaves = leaves if shared else [leaf.clone() for leaf in leaves]
        names = [name for name, _ in problem.net.named_parameters()]
        upper, lower = dict(zip(names, leaves[:4], strict=True)), dict(zip(names, leaves[4:], strict=True))
        Trainer(problem, level(upper), level(lower), AlternatingSchedule(2, 2, 3), on_failure="ignore").run()
        return {**upper, **{f"lower {name}": leaf for name, leaf in lower.items()}}

    torch.testing.assert_close(run(shared=True), run(shared=False), rtol=1e-12, atol=0.0)


ENTRIES: dict[str, tuple[Tensor, bool]] = {
    "expanded rows": (torch.zeros(4).expand(8, 4), True),
    "expanded columns": (torch.zeros(8, 1).expand(8, 4), True),
    "expanded number": (torch.zeros(()).expand(3), True),
    "windows": (torch.zeros(10).unfold(0, 4, 2), True),
    "strides that meet": (torch.zeros(20).as_strided((3, 3), (2, 2)), True),
    "windows apart": (torch.zeros(12).unfold(0, 4, 4), False),
    "strides that do not meet": (torch.zeros(20).as_strided((2, 3), (3, 2)), False),
    "transposed": (torch.zeros(4, 8).T, False),
    "every second": (torch.zeros(8, 4)[::2, ::2], False),
    "expanded from one to one": (torch.zeros(4).expand(1, 4), False),
    "channels last": (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), False),
    "number": (torch.zeros(()), False),
    "empty": (torch.zeros(0, 4), False),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ENTRIES)
def test_variables_whose_entries_share_memory_are_refused(
    kind: str, dtype: torch.dtype, *, requires_grad: bool
) -> None:
    base, overlaps = ENTRIES[kind]
    memory = torch.zeros(base.untyped_storage().nbytes() // base.element_size(), dtype=dtype)
    w = memory.as_strided(base.shape, base.stride()).requires_grad_(requires_grad)
    params = {"b": torch.zeros(2, dtype=dtype, requires_grad=requires_grad), "w": w}
    if overlaps:
        with pytest.raises(ValueError, match=r"^Level: params\['w'\] has shape .*are the same memory.*clone"):
            level(params)
        params["w"] = w.detach().clone(memory_format=torch.contiguous_format).requires_grad_(requires_grad)
    made = level(params)
    made.descend({name: torch.ones_like(leaf) for name, leaf in params.items()}, 1.0)
    assert all(bool((leaf == -0.1).all()) for leaf in made.params.values())


def test_variables_of_the_meta_device_are_refused_by_name() -> None:
    module = nn.Linear(3, 1, device="meta")
    with pytest.raises(ValueError, match=r"^Level: params\['weight'\] is on the meta device, .*to_empty\(device"):
        level(dict[str, Tensor](module.named_parameters()))
    made: Params = dict(module.to_empty(device="cpu").named_parameters())
    level(made)


METHODS: dict[str, Method] = {
    "implicit": Implicit(CG(2, rtol=None)),
    "unrolled": Unrolled(),
    "one step": OneStep(),
    "penalty": Penalty(SGDUpdate(0.01), 10.0),
    "sama": SAMA(),
}


@pytest.mark.parametrize("where", ["before the run", "in a callback", "before advance", "upper level"])
@pytest.mark.parametrize("name", METHODS)
def test_variables_that_are_frozen_once_their_level_is_made_are_refused(name: str, where: str) -> None:
    """Progressive freezing: no step is made that would train them on."""
    problem = Chain()
    lower: Params = dict(problem.net.named_parameters())
    upper = {key: torch.tensor(-1.0, dtype=torch.float64, requires_grad=True) for key in ("log", "other")}
    frozen = upper["other"] if where == "upper level" else lower["0.weight"]

    class Freezing(Callback):
        def on_progress(self, training: Any) -> None:
            frozen.requires_grad_(where != "in a callback" or training.progress != 1)

    trainer = Trainer(
        problem, level(upper), level(lower), AlternatingSchedule(3, 2, 1), METHODS[name], callbacks=[Freezing()],
        on_failure="ignore",
    )  # fmt: skip
    if where != "in a callback":
        frozen.requires_grad_(False)
    before = frozen.detach().clone()
    of, key = ("upper", "other") if where == "upper level" else ("lower", "0.weight")
    with pytest.raises(ValueError, match=rf"^{of}: \['{key}'\].*requires_grad=False while the others.*leave frozen"):
        trainer.advance() if where == "before advance" else trainer.run()
    assert trainer.progress == (1 if where == "in a callback" else 0)
    assert torch.equal(frozen, before) == (where != "in a callback")
    frozen.requires_grad_()
    trainer.run()
    assert trainer.progress == 3
