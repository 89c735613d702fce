"""BiSSL with a pretext and a downstream task of one's own: fill in what is covered; tell odd from even.

    python examples/plugin_tasks.py [--quick]

No file of the recipe knows the two classes. In this folder they serve the command line as they are:

    python ../recipes/bissl/run.py --pretext.task plugin_tasks:Uncover --downstream.task plugin_tasks:Parity

Here a Config is made from the digits preset with overrides and goes through the stages, with 3 labels a digit.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from bilevel.recipes.bissl.outcome.console_table import plain_lines
from bilevel.recipes.bissl.outcome.temporary_run import results_of
from bilevel.recipes.bissl.settings.config import build_config
from bilevel.recipes.bissl.settings.presets import digits
from bilevel.recipes.bissl.tasks import Bound, DownstreamTask, PretextTask
from bilevel.recipes.vision.metrics import Metric, State


def plain(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1], three channels."""
    return images.expand(-1, 3, -1, -1).float() / 127.5 - 1.0


class Uncover(PretextTask):
    side: int = Field(default=4, ge=1, description="side of the covered square (px)")

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        first = nn.Linear(int(backbone.num_features), 64)  # type: ignore[arg-type]
        return nn.ModuleDict({"decoder": nn.Sequential(first, nn.ReLU(), nn.Linear(64, self.image_size**2))})

    def transform(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # Drawn here, not in the loss, so that a stored batch keeps its squares throughout a linear solve.
        first = torch.randint(self.image_size - self.side + 1, (2, len(images), 1), generator=generator)
        inside = (torch.arange(self.image_size) >= first) & (torch.arange(self.image_size) < first + self.side)
        covered = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return plain(images).masked_fill(covered.to(images.device), 0.0), plain(images)[:, 0].flatten(1)

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(heads["decoder"](backbone(batch[0])), batch[1])


class Parity(DownstreamTask):
    def build(self, backbone: nn.Module) -> nn.Module:
        return nn.Linear(int(backbone.num_features), 1)  # type: ignore[arg-type]

    def transform(
        self, images: Tensor, targets: Tensor, generator: torch.Generator, train: bool
    ) -> tuple[Tensor, Tensor]:
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist() if train else [0, 0]
        return plain(images.roll(shift, (2, 3))), (targets % 2).float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(outputs.squeeze(1), targets)

    def metrics(self) -> dict[str, Metric]:
        return {"auroc": Metric(collect, auroc)}


def collect(state: State | None, outputs: Tensor, targets: Tensor) -> State:
    """All scores and targets so far: a ranking needs the whole set."""
    scores = outputs.squeeze(1)
    return (scores, targets) if state is None else (torch.cat([state[0], scores]), torch.cat([state[1], targets]))


def auroc(state: State) -> float:
    """Percentage of (odd, even) pairs in which the odd one has the higher score; ties count half."""
    scores, odd = state[0], state[1] > 0.5
    return 50.0 * float(1.0 + (scores[odd][:, None] - scores[~odd]).sign().mean())


FULL = {"seeds": 4, "pretext": {"epochs": 15}, "bissl": {"alternations": 5}, "finetune": {"epochs": 60}}
ONE = {"epochs": 1}
QUICK = {"seeds": 2, "pretext": ONE, "head": ONE, "bissl": {"alternations": 1}, "finetune": ONE}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage")
    module = Path(__file__).stem if __name__ == "__main__" else __name__
    tasks = {
        "data": {"split_seed": 2},
        "pretext": {"task": f"{module}:Uncover", "options": {"side": 4}, "batch_size": 128},
        "downstream": {"task": f"{module}:Parity"},
    }
    bissl = {"damping": 5.0, "upper_steps": 3, "hessian_batches": 1, "solver_rtol": 0.05, "solver_iterations": 8}
    length = QUICK if parser.parse_args(arguments).quick else FULL
    config = build_config(digits(), tasks, {"arms": ("bissl", "baseline", "scratch"), "bissl": bissl}, length)
    results = results_of(config)
    print("\n".join(plain_lines(results)))
    return results


if __name__ == "__main__":
    main()
