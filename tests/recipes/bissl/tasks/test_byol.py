"""BYOL: its loss, its target, and its second derivatives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import CG, AlternatingSchedule, Implicit, Level, Trainer
from bilevel.products import HVPProvider
from bilevel.training import Callback
from recipes.bissl.tasks.byol import BYOL
from recipes.bissl.tasks.simclr import SimCLR
from recipes.bissl.training.problem import BiSSLProblem
from tests.support.recipes.pretext_cases import (
    PRODUCTS,
    check_micro_batches,
    check_products,
    check_same_runs,
    make_problem,
    run_stages,
    views,
)


def byol(**options: Any) -> BYOL:
    return BYOL(**{"image_size": 2, "projector_widths": (6, 4), **options})


def loop(first: np.ndarray, second: np.ndarray) -> float:
    """Mean of 2 - 2 cos, row by row."""
    rows = [2 - 2 * (u @ v) / np.sqrt((u @ u) * (v @ v)) for u, v in zip(first, second, strict=True)]
    return sum(rows) / len(rows)


def embeddings(problem: BiSSLProblem, batch: tuple[Tensor, Tensor], joint_pass: bool) -> list[list[np.ndarray]]:
    """Predictions and the target's projections of both views, network by network."""
    heads, target = problem.heads, list(problem.heads["target"].children())
    networks = [[problem.lower_backbone, heads["projector"], heads["predictor"]], target]
    found = []
    for layers in networks:
        outputs = [torch.cat(batch)] if joint_pass else list(batch)
        for layer in layers:
            outputs = [layer(x) for x in outputs]
        found.append([x.detach().numpy() for x in torch.cat(outputs).chunk(2)])
    return found


@pytest.mark.parametrize("joint_pass", [False, True])
def test_loss_is_its_definition(joint_pass: bool) -> None:
    problem, batch = make_problem(byol(joint_pass=joint_pass)), views()
    (p1, p2), (t1, t2) = embeddings(problem, batch, joint_pass)
    loss = problem.pretext.loss(problem.lower_backbone, dict(problem.heads.items()), batch).detach()
    assert float(loss) == pytest.approx(loop(p1, t2) + loop(p2, t1), rel=1e-12)
    assert float(loss) != pytest.approx(loop(p1, t1) + loop(p2, t2), rel=1e-3)
    other_way = problem.pretext.loss(problem.lower_backbone, dict(problem.heads.items()), batch[::-1])
    assert other_way.item() == pytest.approx(float(loss), rel=1e-12)


def test_the_target_is_constant_in_the_gradient() -> None:
    problem, batch = make_problem(byol()), views()
    _, targets = embeddings(problem, batch, joint_pass=False)
    backbone, heads = problem.lower_backbone, problem.heads
    heads["target"].requires_grad_(True)
    problem.pretext.loss(backbone, dict(heads.items()), batch).backward()
    assert all(p.grad is None for p in heads["target"].parameters())
    online = [*backbone.parameters(), *heads["projector"].parameters(), *heads["predictor"].parameters()]
    predictions = [heads["predictor"](heads["projector"](backbone(view))) for view in batch]
    by_hand = sum(
        (p / p.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).square().sum(dim=1).mean()
        for p, t in zip(predictions, map(torch.from_numpy, reversed(targets)), strict=True)
    )
    assert isinstance(by_hand, Tensor)
    for p, expected in zip(online, torch.autograd.grad(by_hand, online), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hvp", PRODUCTS, ids=lambda hvp: type(hvp).__name__)
def test_products_are_differences_of_the_gradient(hvp: HVPProvider) -> None:
    check_products(make_problem(byol()), views(), hvp)


def test_micro_batches() -> None:
    check_micro_batches(make_problem(byol()), views())


def test_the_target_starts_as_the_online_network_and_is_no_variable() -> None:
    torch.manual_seed(0)
    problem = make_problem(byol())
    heads = byol().build(problem.lower_backbone)
    online = [*problem.lower_backbone.parameters(), *heads["projector"].parameters()]
    target = list(heads["target"].parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in zip(online, target, strict=True))
    assert not any(p.requires_grad for p in target)
    assert {name.split(".")[1] for name in problem.variables()[1] if name.startswith("heads.")} == {
        "projector",
        "predictor",
    }
    shapes = {name: [tuple(p.shape) for p in heads[name].parameters()] for name in ("projector", "predictor")}
    assert shapes["projector"] == [(6, 5), (6,), (6,), (6,), (4, 6), (4,)]
    assert shapes["predictor"] == [(6, 4), (6,), (6,), (6,), (4, 6), (4,)]
    assert byol().target_decay == 0.9995


class Watch(Callback):
    """Compares the target with the moving average of the online network, event by event."""

    def __init__(self, problem: BiSSLProblem, decay: float) -> None:
        self.problem, self.decay, self.seen = problem, decay, []
        self.expected = [p.clone() for p in self.target()]
        self.buffers = self.copied_buffers()

    def target(self) -> list[Tensor]:
        return list(self.problem.heads["target"].parameters())

    def copied_buffers(self) -> list[Tensor]:
        return [b.clone() for b in self.problem.heads["target"].buffers()]

    def on_event(self, trainer: Any, record: dict[str, Any]) -> None:
        self.seen.append(record["event"])
        same_buffers = all(map(torch.equal, self.copied_buffers(), self.buffers))
        if record["event"] == "lower":
            online = [*self.problem.lower_backbone.parameters(), *self.problem.heads["projector"].parameters()]
            d = self.decay
            self.expected = [d * old + (1 - d) * new.detach() for old, new in zip(self.expected, online, strict=True)]
            assert not same_buffers
            self.buffers = self.copied_buffers()
        else:
            assert same_buffers
        for found, expected in zip(self.target(), self.expected, strict=True):
            torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-14)


def test_the_target_moves_once_a_lower_step_and_never_otherwise() -> None:
    problem = make_problem(byol(target_decay=0.9))
    upper, lower = problem.variables()
    labelled = [(views(6, seed)[0], torch.tensor([0, 1, 0, 1, 0, 1])) for seed in (5, 7)]
    watch = Watch(problem, 0.9)
    Trainer(
        problem,
        Level(upper, torch.optim.SGD(list(upper.values()), lr=0.1), labelled),
        Level(lower, torch.optim.SGD(list(lower.values()), lr=0.1), [views(7, 1), views(7, 3)]),
        AlternatingSchedule(
            2, 2, 2, 1, 0.5, adaptation_pairs={name: name for name in upper if name.startswith("backbone.")}
        ),
        Implicit(CG(max_iterations=2, rtol=None), damping=1.0, hessian_batches=2),
        callbacks=(watch,),
    ).run()
    assert [name for name in watch.seen if name != "alternation"] == 2 * [
        *("lower", "lower"),
        "adaptation",
        *("upper", "upper"),
    ]


def test_stages_and_their_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = '--pretext.options={"projector_widths": [8, 8], "target_decay": 0.9}'
    arguments = "--pretext.task=recipes.bissl.tasks.byol:BYOL", options
    whole = run_stages(tmp_path / "a", monkeypatch, *arguments, interrupted=False)
    check_same_runs(run_stages(tmp_path / "b", monkeypatch, *arguments, interrupted=True), whole)
    weights = [key for key in whole["pretext"] if key.startswith("heads.target.") and "num_batches" not in key]
    assert all(torch.equal(whole["pretext"][key], whole["head"][key]) for key in weights)
    assert not any(torch.equal(whole["head"][key], whole["bissl"][key]) for key in weights)
    # Two batches an epoch, two views a batch: the target's statistics follow its own passes, in lower steps only.
    counts = {name: int(whole[name]["heads.target.0.bn1.num_batches_tracked"]) for name in ("pretext", "bissl")}
    online = {name: int(whole[name]["backbone.bn1.num_batches_tracked"]) for name in ("pretext", "bissl")}
    assert counts == online
    assert counts["bissl"] - counts["pretext"] == 2 * 2 * 2


def test_describe_and_options() -> None:
    assert "keeps 0.99 of itself at every pretext step" in byol(target_decay=0.99).describe()[-1]
    assert byol().describe_views() == SimCLR.model_validate({"image_size": 2}).describe_views()
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="target_decay"):
            byol(target_decay=bad)
    problem, batch = make_problem(byol()), views()
    embedded = problem.pretext.embed(problem.lower_backbone, dict(problem.heads.items()), batch)
    assert embedded is not None
    torch.testing.assert_close(embedded, problem.heads["projector"](problem.lower_backbone(batch[0])))
