"""Losses of lightly as pretext tasks of BiSSL: NT-Xent, VICReg, Barlow Twins and DINO.

    python examples/stack/lightly_tasks.py [--task NTXent | VICReg | BarlowTwins | DINO] [--quick]

First two losses beside the bundled ones, and whether their Hessian products are finite where an embedding is zero; then
BiSSL on scikit-learn's digits. In this folder, the command line takes a class by name: ``python ../../recipes/bissl/
run.py --pretext.task lightly_tasks:BarlowTwins``. Needs the extras `demo` and `lightly`.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bilevel.recipes.bissl.outcome.console_table import plain_lines
from bilevel.recipes.bissl.outcome.temporary_run import results_of
from bilevel.recipes.bissl.settings.config import build_config
from bilevel.recipes.bissl.settings.presets import digits
from bilevel.recipes.bissl.tasks import Bound, PretextTask, TwoViewTask
from bilevel.recipes.vision.losses import nt_xent, vicreg
from bilevel.recipes.vision.networks.backbones import projector
from bilevel.recipes.vision.views.view_policy import ViewPolicy

try:
    from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, VICRegLoss
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the extra lightly brings it: pip install ".[demo,lightly]"')


class NTXent(TwoViewTask):
    """Any loss of the embeddings of two views is a task like this one; those below differ in the criterion."""

    criterion: ClassVar[nn.Module] = NTXentLoss(temperature=0.5)

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"projector": self.fresh_projector(backbone)})

    def outputs(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.both(lambda view: heads["projector"](backbone(view)), batch)

    def output_loss(self, outputs: Tensor) -> Tensor:
        return self.criterion(outputs[:, 0], outputs[:, 1])


class VICReg(NTXent):
    criterion: ClassVar[nn.Module] = VICRegLoss()


class BarlowTwins(NTXent):
    criterion: ClassVar[nn.Module] = BarlowTwinsLoss()

    def output_loss(self, outputs: Tensor) -> Tensor:
        return super().output_loss(outputs) / outputs.shape[2]  # a mean, beside which the regularizer counts


class DINO(PretextTask):
    """A criterion with a state, its centre: as one of the heads it is saved, and no curvature pass writes to it."""

    def random_views(self) -> tuple[ViewPolicy, ViewPolicy]:
        return ViewPolicy(size=self.image_size, blur_probability=1.0), ViewPolicy(size=self.image_size)

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        head = projector(int(backbone.num_features), (256, 256, 256))  # type: ignore[arg-type]
        teacher = copy.deepcopy(nn.Sequential(backbone, head)).requires_grad_(False).train()
        return nn.ModuleDict({"student": head, "teacher": teacher, "criterion": DINOLoss(output_dim=256)})

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            teacher = [heads["teacher"](view) for view in batch]
        return heads["criterion"](teacher, [heads["student"](backbone(view)) for view in batch])

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, heads: nn.ModuleDict, step: int) -> None:
        online = nn.Sequential(backbone, heads["student"])
        for slow, fast in zip(heads["teacher"].parameters(), online.parameters(), strict=True):
            slow.lerp_(fast, 0.004)


def products(loss: Callable[[Tensor, Tensor], Tensor], zero: bool) -> Tensor:
    """Value, gradient and a Hessian product of the loss in one row, at drawn embeddings, of which one may be zero."""
    z, direction = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[0, 3] = 0.0 if zero else z[0, 3]
    value = loss(*z.requires_grad_())
    (gradient,) = torch.autograd.grad(value, z, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), z)
    return torch.cat([value.detach().view(1), gradient.detach().flatten(), product.flatten()])


# The bundled loss as lightly and VICReg's authors compute it; the paper does not halve the variance term.
half_variance = partial(vicreg, invariance=25.0, variance=12.5, covariance=1.0)
TASKS = {task.__name__: task for task in (NTXent, VICReg, BarlowTwins, DINO)}
FULL = {"seeds": 4, "pretext": {"epochs": 20}, "bissl": {"alternations": 5}, "finetune": {"epochs": 60}}
QUICK = {"seeds": 2, **{key: {"epochs": 1} for key in ("pretext", "head", "finetune")}, "bissl": {"alternations": 1}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="BarlowTwins", help="of BiSSL (default: BarlowTwins)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage")
    given, module = parser.parse_args(arguments), Path(__file__).stem if __name__ == "__main__" else __name__
    for task, ours in ((NTXent, nt_xent), (VICReg, half_variance)):
        found, zero = (products(task.criterion, zero) for zero in (False, True))
        apart = float((found - products(ours, zero=False)).norm() / found.norm())
        outcome = "finite" if zero.isfinite().all() else "not finite"
        print(f"{task.__name__}: {apart:.0e} from the bundled loss; {outcome} at a zero embedding")
    task, arms = {"task": f"{module}:{given.task}", "batch_size": 128, "lr": 0.3}, ("bissl", "baseline", "scratch")
    base = {"data": {"split_seed": 2}, "pretext": task, "bissl": {"lower_lr": 0.1, "damping": 5.0, "aggregate": True}}
    results = results_of(build_config(digits(), base, {"arms": arms}, QUICK if given.quick else FULL))
    print("\n".join(plain_lines(results)))
    return results


if __name__ == "__main__":
    main()
