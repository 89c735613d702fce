"""VICReg as a task: its outputs, its second derivatives, and a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel.products import HVPProvider
from recipes.bissl.tasks.vicreg import VICReg
from recipes.vision.losses import vicreg
from tests.support.recipes.pretext_cases import (
    PRODUCTS,
    check_micro_batches,
    check_products,
    make_problem,
    run_stages,
    views,
)


def task(**options: Any) -> VICReg:
    return VICReg(**{"image_size": 2, "projector_widths": (6, 4), **options})


@pytest.mark.parametrize("joint_pass", [False, True])
def test_the_loss_is_that_of_both_views(joint_pass: bool) -> None:
    weights = {"invariance": 3.0, "variance": 5.0, "covariance": 7.0}
    problem, batch = make_problem(task(joint_pass=joint_pass, **weights)), views()
    backbone, heads = problem.lower_backbone, problem.heads
    views_together = [torch.cat(batch)] if joint_pass else list(batch)
    first, second = torch.cat([heads["projector"](backbone(x)) for x in views_together]).chunk(2)
    expected = vicreg(first, second, **weights)
    torch.testing.assert_close(problem.pretext.loss(backbone, dict(heads.items()), batch), expected)
    plain = make_problem(task(joint_pass=joint_pass))
    published = vicreg(first, second, invariance=25.0, variance=25.0, covariance=1.0)
    torch.testing.assert_close(plain.pretext.loss(backbone, dict(heads.items()), batch), published)


@pytest.mark.parametrize("hvp", PRODUCTS, ids=lambda hvp: type(hvp).__name__)
def test_products_are_differences_of_the_gradient(hvp: HVPProvider) -> None:
    check_products(make_problem(task()), views(), hvp)


def test_micro_batches() -> None:
    check_micro_batches(make_problem(task()), views())


def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights of 25 want smaller steps, and a larger damping before training has gone far.
    rates = "--pretext.lr=0.01", "--pretext.baseline-lr=0.01", "--bissl.lower-lr=0.01", "--bissl.damping=20000"
    task = "--pretext.task=recipes.bissl.tasks.vicreg:VICReg", '--pretext.options={"projector_widths": [8, 8]}'
    made = run_stages(tmp_path, monkeypatch, *task, *rates)
    for before, after, moved in (("pretext", "head", False), ("head", "bissl", True)):
        weights = [key for key in made[before] if key.startswith("heads.") and key.endswith("weight")]
        assert weights
        assert all(torch.equal(made[before][key], made[after][key]) != moved for key in weights)


def test_describe_and_options() -> None:
    assert task(covariance=0.5).describe()[-1].endswith("invariance 25, variance 25, covariance 0.5")
    for name in ("invariance", "variance", "covariance"):
        with pytest.raises(ValueError, match=name):
            task(**{name: -1.0})
