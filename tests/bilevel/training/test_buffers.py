"""Buffers of a problem's modules: a resumed training goes on with them, wherever they are kept."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import AlternatingSchedule, Checkpointing, Level, Params, Problem, Trainer, functional_call, proximal
from bilevel.problem import modules_of
from tests.support.cases import vector

BATCHES = [vector(24, seed).reshape(8, 3) for seed in (1, 2, 3)]


class Counting(nn.Module):
    """Buffers of other kinds: one that is replaced, one that no state_dict holds, one of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.detach().mean()
            self.calls += 1
        return x + self.level * self.calls


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "own": Counting,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
}


def network(layer: str) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 4), LAYERS[layer](), nn.Tanh(), nn.Linear(4, 1)).double()


class Adapt(Problem):
    """F in eval mode, so that what the buffers hold enters every upper step."""

    regularization_weight = 2.0
    curvature_depends_on_upper = False

    def __init__(self, net: nn.Module, place: str) -> None:
        if place == "attribute":
            self.net = net
        elif place == "list":
            self.nets = [net]
        elif place == "dictionary":
            self.nets = {"task": (net, "text")}
        elif place == "within a module":
            self.model = nn.ModuleDict({"backbone": net, "head": nn.Linear(2, 2)})
        self.call: Callable[..., Tensor] = lambda params, batch, **mode: functional_call(net, params, batch, **mode)

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return (self.call(lower, batch).squeeze(1) - batch.sum(1)).square().mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.call(lower, batch, training=False).square().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower)


def training(layer: str, place: str, alternations: int, folder: Path | None = None) -> tuple[Trainer, nn.Module]:
    net = network(layer)
    lower = {name: p.detach().clone() for name, p in net.named_parameters()}
    upper = {name: leaf.clone() for name, leaf in lower.items()}
    above, below = (Level(v, torch.optim.SGD(v.values(), lr=0.1), BATCHES) for v in (upper, lower))
    callbacks = [] if folder is None else [Checkpointing(folder)]
    schedule = AlternatingSchedule(alternations, 3, 2)
    return Trainer(Adapt(net, place), above, below, schedule, callbacks=callbacks, on_failure="ignore"), net


@pytest.mark.parametrize("place", ["attribute", "list", "dictionary", "within a module"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_resumed_training_has_the_buffers_and_the_variables_of_one_that_was_not_stopped(
    layer: str, place: str, tmp_path: Path
) -> None:
    whole, net = training(layer, place, 4)
    whole.run()
    training(layer, place, 2, tmp_path)[0].run()
    resumed, again = training(layer, place, 4, tmp_path)
    assert resumed.resume(tmp_path)
    resumed.run()
    for name, buffer in net.named_buffers():
        assert torch.equal(dict(again.named_buffers())[name], buffer), name
    for level in ("upper", "lower"):
        for name, leaf in whole.levels[level].params.items():
            assert torch.equal(resumed.levels[level].params[name], leaf), name


def test_buffers_that_a_checkpoint_would_lose_are_told_once() -> None:
    trainer, _ = training("batch norm", "elsewhere", 2)
    trainer.run()
    with pytest.warns(UserWarning, match=r"have written buffers of \['Sequential'\], which no checkpoint holds"):
        assert trainer.state_dict()["kept"] == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.state_dict()


@pytest.mark.parametrize("layer", [None, "eval"])
def test_nothing_is_said_of_buffers_that_no_step_has_written(layer: str | None) -> None:
    trainer, net = training("batch norm", "elsewhere", 1)
    if layer == "eval":
        net.eval()
    else:
        net[1] = nn.Identity()  # type: ignore[index]
        trainer.lower.params, trainer.upper.params = (
            {name: leaf for name, leaf in v.items() if not name.startswith("1.")}
            for v in (trainer.lower.params, trainer.upper.params)
        )
    trainer.run()
    trainer.state_dict()


class WithTarget(Adapt):
    """A momentum target that is a module."""

    def __init__(self, net: nn.Module, place: str) -> None:
        super().__init__(net, place)
        self.target = network("batch norm")

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        with torch.no_grad():
            goal = self.target.eval()(batch)
        return super().lower_objective(upper, lower, batch) + (self.call(lower, batch) - goal).square().mean()

    def after_lower_step(self, upper: Params, lower: Params, step: int) -> None:
        for name, p in self.target.named_parameters():
            p.data.lerp_(lower[name].detach(), 0.1)


def test_modules_that_a_hook_moves_are_kept_with_their_parameters(tmp_path: Path) -> None:
    def made(alternations: int) -> tuple[Trainer, WithTarget]:
        trainer, net = training("batch norm", "attribute", alternations, tmp_path)
        problem = WithTarget(net, "attribute")
        trainer.problem = problem
        return trainer, problem

    whole, there = made(4)
    whole.callbacks = ()
    whole.run()
    made(2)[0].run()
    resumed, here = made(4)
    assert resumed.resume(tmp_path)
    resumed.run()
    for name, p in there.target.named_parameters():
        assert torch.equal(dict(here.target.named_parameters())[name], p), name
        assert not torch.equal(p, dict(network("batch norm").named_parameters())[name]), name


def test_a_state_of_other_modules_is_refused() -> None:
    problem = Adapt(network("batch norm"), "attribute")
    state: dict[str, Any] = problem.state_dict()
    assert state["net"].keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for other in ({}, {"net": {}}, {"backbone": state["net"]}, {"net": {**state["net"], "1.running_mean": 3}}):
        with pytest.raises(ValueError, match="is not that of a module here"):
            problem.load_state_dict(other)


def test_modules_are_found_under_their_paths() -> None:
    problem = Adapt(network("own"), "dictionary")
    assert list(modules_of(problem)) == ["nets['task'][0]"]
    assert Adapt(nn.Sequential(nn.Linear(3, 1)), "attribute").state_dict() == {}


Saved = Callable[[nn.Module], Any]


def statistics(net: nn.Module) -> dict[str, Tensor]:
    """The buffers that a step writes, without counts that nothing goes by."""
    return {name: buffer.clone() for name, buffer in net.named_buffers() if not name.endswith("batches_tracked")}


HELD: dict[str, Saved] = {
    "state_dict": lambda net: net.state_dict(),
    "buffers": lambda net: {"buffers": dict(net.named_buffers()), "note": "text", "none": None},
    "statistics alone": statistics,
    "nested": lambda net: {"a": [{"b": tuple(statistics(net).values())}, 3]},
    "one vector": lambda net: {"all": torch.cat([leaf.reshape(-1) for leaf in statistics(net).values()])},
    "float32": lambda net: {name: leaf.float() for name, leaf in statistics(net).items()},
    "bfloat16": lambda net: {name: leaf.bfloat16() for name, leaf in statistics(net).items()},
    "arrays": lambda net: {name: leaf.numpy() for name, leaf in statistics(net).items()},
    "numbers": lambda net: {name: leaf.tolist() for name, leaf in statistics(net).items()},
    "bytes": lambda net: {"file": b"what nobody looks into"},
}

LOST: dict[str, Saved] = {
    "nothing": lambda net: {},
    "other things": lambda net: {"target": [p.detach().clone() for p in net.parameters()], "step": 3},
    "some": lambda net: dict(list(statistics(net).items())[:-1]),
    "others of the shape": lambda net: {name: leaf + 1.5 for name, leaf in statistics(net).items()},
}


def with_state(layer: str, save: Saved) -> Trainer:
    trainer, net = training(layer, "elsewhere", 2)
    net.register_buffer("constant", vector(5, 9))  # no step writes it, so that no state need hold it

    class Own(Adapt):
        def state_dict(self) -> dict[str, Any]:
            return save(net)

        def load_state_dict(self, state: Any) -> None:
            pass

    trainer.problem = Own(net, "elsewhere")
    trainer.run()
    return trainer


@pytest.mark.parametrize("save", LOST.values(), ids=LOST)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_state_of_ones_own_that_forgets_written_buffers_is_told_once(layer: str, save: Saved) -> None:
    trainer = with_state(layer, save)
    with pytest.warns(UserWarning, match=r"have written buffers of \['Sequential'\].*put them into its state_dict"):
        trainer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.state_dict()
        trainer.lower.data.next()
        trainer.state_dict()


@pytest.mark.parametrize("save", HELD.values(), ids=HELD)
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_said_of_buffers_that_a_state_of_ones_own_holds_in_any_structure(layer: str, save: Saved) -> None:
    if layer == "cumulative" and save is not HELD["bytes"]:
        full = save
        save = lambda net: {"rest": full(net), "count": [int(net[1].num_batches_tracked)]}  # type: ignore[index]  # noqa: E731
    if layer == "own" and save is HELD["state_dict"]:
        save = HELD["buffers"]  # one of its buffers is in no state_dict
    trainer = with_state(layer, save)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.state_dict()
