"""Micro-batching of BiSSL's lower level through its pretext task."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import Params, linearize
from bilevel.products import ReverseOverReverse
from bilevel.products.micro_batch import MicroBatched, micro_batched_gradient
from recipes.bissl.tasks.base import PretextTask
from recipes.bissl.tasks.classification import Classification
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.training.problem import BiSSLProblem, lower_variables
from recipes.bissl.training.stages import pretext
from recipes.vision.losses import nt_xent
from tests.support.cases import joined, vector
from tests.support.recipes.small_runs import small_config, small_pipeline

Loss = Callable[[Params, Any], Tensor]


class Backbone(nn.Module):
    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def make_problem(first_order: Callable[[Loss], Loss] = lambda loss: loss, *, joint_pass: bool = False) -> BiSSLProblem:
    torch.manual_seed(0)
    pretext = SimCLR(image_size=2, joint_pass=joint_pass, projector_widths=(6, 4))  # type: ignore[call-arg]
    downstream = Classification(image_size=2, classes=("a", "b"))  # type: ignore[call-arg]
    lower, upper = Backbone().double(), Backbone().double()
    heads, head = pretext.build(lower).double(), downstream.build(upper).double()
    return BiSSLProblem(
        pretext, downstream, lower, upper, heads, head, regularization_weight=0.5, first_order=first_order
    )


def views(samples: int = 7) -> tuple[Tensor, Tensor]:
    first = vector(samples * 12, 1).reshape(samples, 3, 2, 2)
    return first, first + 0.2 * vector(samples * 12, 2).reshape(samples, 3, 2, 2)


@pytest.mark.parametrize("joint_pass", [False, True])
def test_simclr_outputs_keep_their_passes(joint_pass: bool) -> None:
    problem, batch = make_problem(joint_pass=joint_pass), views()
    backbone, projector = problem.lower_backbone, problem.heads["projector"]
    outputs = problem.pretext.outputs(backbone, dict(problem.heads.items()), batch)
    both = projector(backbone(torch.cat(batch))).split(7)
    first, second = both if joint_pass else [projector(backbone(view)) for view in batch]
    assert outputs.shape == (7, 2, 4)
    torch.testing.assert_close(outputs[:, 0], first)
    torch.testing.assert_close(outputs[:, 1], second)
    expected = nt_xent(first, second, temperature=0.5)
    torch.testing.assert_close(problem.pretext.loss(backbone, dict(problem.heads.items()), batch), expected)
    torch.testing.assert_close(problem.pretext.output_loss(outputs), expected)


def test_micro_batches_of_a_frozen_network_give_the_whole_batchs_system_and_gradient() -> None:
    problem, batch = make_problem(), views()
    problem.lower_backbone.eval()
    problem.heads.eval()
    upper, lower = problem.variables()
    systems = [linearize(problem, upper, lower, [batch], hvp=hvp) for hvp in (MicroBatched(3), ReverseOverReverse())]
    w = {name: vector(lower[name].numel(), k).reshape(lower[name].shape) for k, name in enumerate(systems[0].implicit)}
    found, expected = (joined(system.operator(w)) for system in systems)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    y = {name: leaf.detach().requires_grad_() for name, leaf in lower.items()}
    reference = torch.autograd.grad(problem.lower_objective(upper, y, batch), list(y.values()))
    _, gradient = micro_batched_gradient(
        lambda y, chunk: problem.lower_outputs(upper, y, chunk),
        lambda z: problem.lower_output_loss(upper, z, batch),
        lower,
        problem.split_batch(batch, 3),
    )
    for value, leaf in zip(reference, gradient.values(), strict=True):
        torch.testing.assert_close(leaf, value, rtol=1e-10, atol=1e-13)


def test_only_first_order_passes_take_the_first_order_outputs() -> None:
    calls = 0

    def counted(loss: Loss) -> Loss:
        def evaluate(lower: Params, batch: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return loss(lower, batch)

        return evaluate

    problem, batch = make_problem(counted), views(8)
    upper, lower = problem.variables()
    system = linearize(problem, upper, lower, [batch], hvp=MicroBatched(4))
    system.operator(system.variables(lower))
    assert calls == 0
    micro_batched_gradient(
        lambda y, chunk: problem.lower_outputs(upper, y, chunk),
        lambda z: problem.lower_output_loss(upper, z, batch),
        lower,
        problem.split_batch(batch, 4),
    )
    # Two chunks, two passes.
    assert calls == 4


def test_a_task_without_outputs_says_what_to_define() -> None:
    problem = make_problem()
    with pytest.raises(TypeError, match=r"SimCLR does not define outputs, .*; define outputs and output_loss"):
        PretextTask.outputs(problem.pretext, problem.lower_backbone, {}, views())
    with pytest.raises(TypeError, match="SimCLR defines outputs but not output_loss"):
        PretextTask.output_loss(problem.pretext, torch.ones(1))


@dataclass
class Views:
    both: Tensor
    name: str


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize("wrap", [lambda first, second: Views(torch.stack((first, second), 1), "a"), Pair])
def test_a_pretext_step_takes_each_sample_of_a_batch_of_any_kind_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Tensor, Tensor], Any]
) -> None:
    plain, seen = SimCLR.outputs, []

    def outputs(self: SimCLR, backbone: Any, heads: Any, batch: Any) -> Tensor:
        assert isinstance(batch, (Views, Pair))
        first, second = batch.both.unbind(1) if isinstance(batch, Views) else batch
        seen.append((first, second))
        return plain(self, backbone, heads, (first, second))

    monkeypatch.setattr(SimCLR, "outputs", outputs)
    pipeline = small_pipeline(tmp_path, small_config("--compute.micro-batch=4"))
    task, backbone = pipeline.config.pretext_task(), Backbone()
    heads = task.build(backbone)
    batch = [view.float() for view in views(7)]
    modules = pretext._Modules(task, backbone, heads)
    pretext._derivatives(modules, lower_variables(backbone, heads), pipeline.computing)(wrap(*batch))
    # Once for the outputs and once for their gradient.
    assert [len(first) for first, _ in seen] == [4, 3, 4, 3]
    for chunks in (seen[:2], seen[2:]):
        for view, parts in zip(batch, zip(*chunks, strict=True), strict=True):
            assert torch.equal(torch.cat(parts), view)
