"""A module in train mode below and in eval mode above."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import CG, Params, Problem, functional_call, hypergradient
from bilevel.nn import curvature_pass
from tests.support.cases import vector

LAYERS: dict[str, Any] = {
    "dropout": lambda: nn.Dropout(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "instance norm": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True)),
    "both": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3)),
    "randomized relu": lambda: nn.RReLU(),
}


def network(layer: str, *, training: bool = True) -> nn.Sequential:
    torch.manual_seed(4)
    last = [nn.Flatten(), nn.Linear(6, 1)]
    net = nn.Sequential(nn.Linear(3, 6), LAYERS[layer](), *last).double()
    net.train(training)
    return net


INPUTS = vector(30, 2).reshape(10, 3)


@pytest.mark.parametrize("outside", [True, False], ids=["train mode around", "eval mode around"])
@pytest.mark.parametrize("curvature", [True, False], ids=["in a hypergradient", "in a training step"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_mode_that_is_asked_for_holds_for_the_call_alone(layer: str, curvature: bool, outside: bool) -> None:
    module = network(layer, training=outside)
    module[0].train(not outside)  # A layer with a mode of its own gets that back.
    params = dict(module.named_parameters())

    def call(training: bool) -> Tensor:
        torch.manual_seed(1)
        if curvature:
            with curvature_pass():
                return functional_call(module, params, INPUTS, training=training)
        return functional_call(module, params, INPUTS, training=training)

    for mode in (False, True):
        twin = network(layer, training=mode)
        torch.manual_seed(1)
        expected = twin(INPUTS)
        torch.testing.assert_close(call(mode), expected, rtol=1e-12, atol=1e-14)
        assert (module[0].training, module[1].training) == (not outside, outside)


def test_the_modes_come_back_after_an_error() -> None:
    module = network("dropout")
    with pytest.raises(RuntimeError, match="shape"):
        functional_call(module, {}, vector(4, 1).reshape(1, 4), training=False)
    assert all(layer.training for layer in module.modules())


class Noisy(Problem):
    regularization_weight = 20.0

    def __init__(self, training: bool | None) -> None:
        self.net, self.training = network("dropout"), training

    def lower_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        outputs = functional_call(self.net, lower, batch, training=self.training).squeeze(1)
        return (outputs - upper["shift"] * batch.sum(1)).square().mean()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return functional_call(self.net, lower, batch, training=self.training).square().mean()

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return torch.stack([leaf.square().sum() for leaf in lower.values()]).sum()


def values(training: bool | None) -> list[float]:
    problem = Noisy(training)
    lower = {name: p.detach() for name, p in problem.net.named_parameters()}
    upper = {"shift": torch.ones((), dtype=torch.float64)}
    results = [
        hypergradient(problem, upper, lower, CG(50, 1e-8), upper_batch=INPUTS, lower_batches=[INPUTS]) for _ in range(3)
    ]
    return [float(result.loss) for result in results] + [float(result.grad["shift"]) for result in results]


def test_the_upper_objective_in_eval_mode_is_the_same_at_one_point() -> None:
    noisy, still = values(None), values(False)
    assert len(set(noisy[:3])) == 3
    assert len(set(still[:3])) == 1
    assert len(set(still[3:])) == 1
