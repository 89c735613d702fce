"""Small two-view pretext tasks in float64, and what their second derivatives are compared with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import Params, linearize
from bilevel.nn.functional import curvature_pass
from bilevel.products import ForwardOverReverse, HVPProvider, ReverseOverReverse
from bilevel.products.micro_batch import MicroBatched
from recipes.bissl.tasks.base import PretextTask
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.training.problem import BiSSLProblem
from tests.support.cases import joined, vector
from tests.support.recipes.small_runs import before_steps, run_stage, small_config, small_pipeline, stop_at

PRODUCTS: list[HVPProvider] = [ReverseOverReverse(), ForwardOverReverse()]

SHORT = "--bissl.solver-iterations=1", "--bissl.hessian-batches=1", "--data.pretext-limit=24", "--pretext.batch-size=12"


class Net(nn.Module):
    """tanh(BatchNorm(W x + b)) of 2x2 images."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Tanh())

    def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
        return self.body(x)


def make_problem(task: PretextTask) -> BiSSLProblem:
    """BiSSL on small networks; parameters without gradients are not what they were built as."""
    torch.manual_seed(0)
    downstream = Classification(image_size=2, classes=("a", "b"))  # type: ignore[call-arg]
    lower, upper = Net().double(), Net().double()
    heads, head = task.build(lower).double(), downstream.build(upper).double()
    for k, parameter in enumerate(p for p in heads.parameters() if not p.requires_grad):
        with torch.no_grad():
            parameter += 0.3 * vector(parameter.numel(), k).reshape(parameter.shape)
    return BiSSLProblem(task, downstream, lower, upper, heads, head, regularization_weight=0.5)


def views(samples: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    first = vector(samples * 12, seed).reshape(samples, 3, 2, 2)
    return first, first + 0.4 * vector(samples * 12, seed + 1).reshape(samples, 3, 2, 2)


def direction(like: Params) -> Params:
    return {name: vector(leaf.numel(), k).reshape(leaf.shape) for k, (name, leaf) in enumerate(like.items())}


def check_products(problem: BiSSLProblem, batch: Any, hvp: HVPProvider) -> None:
    """Products of the lower loss, in every lower variable, equal central differences of its gradient."""
    upper, lower = problem.variables()
    w, step = direction(lower), 1e-6

    def slope(sign: int) -> Tensor:
        y = {name: (leaf.detach() + sign * step * w[name]).requires_grad_() for name, leaf in lower.items()}
        with curvature_pass():
            loss = problem.lower_objective(upper, y, batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(y.values()))])

    expected = (slope(1) - slope(-1)) / (2 * step)
    with curvature_pass():
        found = joined(hvp.linearize(lambda x, y: problem.lower_objective(x, y, batch), upper, lower).hessian(w))
    assert expected.norm() > 0.1
    assert (found - expected).norm() < 1e-6 * expected.norm()


def check_micro_batches(problem: BiSSLProblem, batch: Any) -> None:
    """With frozen statistics, products in chunks are the whole batch's."""
    problem.lower_backbone.eval()
    problem.heads.eval()
    upper, lower = problem.variables()
    systems = [linearize(problem, upper, lower, [batch], hvp=hvp) for hvp in (MicroBatched(3), ReverseOverReverse())]
    w = direction(systems[0].variables(lower))
    found, expected = (joined(system.operator(w)) for system in systems)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def run_stages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, interrupted: bool = False
) -> dict[str, Any]:
    """The tensors of the pretext, head and bissl stages, maybe with an interruption inside the first and the last."""
    pipeline = small_pipeline(folder, small_config(*SHORT, *arguments))
    last, made = None, {}
    for name in ("pretext", "head", "bissl"):
        if interrupted and name != "head":
            with monkeypatch.context() as patch:
                # After a checkpoint in either stage.
                before_steps(patch, name, stop_at(4))
                with pytest.raises(KeyboardInterrupt):
                    run_stage(pipeline, name, last)
        last = run_stage(pipeline, name, last)
        made[name] = last.tensors()
    return made


def check_same_runs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        assert all(torch.equal(found[name][key], tensor) for key, tensor in tensors.items()), name
