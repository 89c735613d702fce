"""BiSSL with a pretext task and a downstream task of one's own: quarter turns, and odd or even.

    python examples/plugin_tasks.py [--quick]

The same classes serve the command line as they are, run in this folder:

    python ../recipes/bissl/run.py --pretext.task plugin_tasks:QuarterTurns --downstream.task plugin_tasks:Parity

The pretext task predicts by how many quarter turns an image was rotated; the downstream task tells odd from even digits by
one score, measured by the area under the ROC curve. No file of the recipe knows either. Here a Config is made from a
preset with overrides and run through all stages, beside plain pre-training and random weights.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from recipes.bissl.artifact import ArtifactStore
from recipes.bissl.config import build_config
from recipes.bissl.context import Context, Datasets
from recipes.bissl.evaluate import Metric, State
from recipes.bissl.presets import digits
from recipes.bissl.run import run_pipeline, summarise
from recipes.bissl.tasks.base import Bound, DownstreamTask, PretextTask


def plain(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1], three channels."""
    return images.expand(-1, 3, -1, -1).float() / 127.5 - 1.0


@final
class QuarterTurns(PretextTask):
    hidden: int = Field(default=64, ge=1, description="hidden units of the head")

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        features = int(backbone.num_features)  # type: ignore[arg-type]
        return nn.ModuleDict({"turns": nn.Sequential(nn.Linear(features, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 4))})

    def transform(self) -> Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]:
        def turn(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            turns = torch.randint(4, (len(images),), generator=generator)
            views = torch.stack([plain(images).rot90(k, (2, 3)) for k in range(4)])
            return views[turns, torch.arange(len(images))], turns

        return turn

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        views, turns = batch
        return cross_entropy(heads["turns"](backbone(views)), turns)


@final
class Parity(DownstreamTask):
    shift: int = Field(default=1, ge=0, description="largest shift of a training image (px)")

    def build(self, backbone: nn.Module) -> nn.Module:
        return nn.Linear(int(backbone.num_features), 1)  # type: ignore[arg-type]

    def transform(self, train: bool) -> Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]:
        def view(images: Tensor, digit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            if train:
                by = torch.randint(-self.shift, self.shift + 1, (2,), generator=generator).tolist()
                images = images.roll(by, (2, 3))
            return plain(images), (digit % 2).float()

        return view

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(outputs.squeeze(1), targets)

    def metrics(self) -> dict[str, Metric]:
        return {"auroc": Metric(collect, auroc)}


def collect(state: State | None, outputs: Tensor, targets: Tensor) -> State:
    """All scores and targets so far: ranks need the whole set."""
    new = (outputs.squeeze(1), targets)
    return new if state is None else (torch.cat([state[0], new[0]]), torch.cat([state[1], new[1]]))


def auroc(state: State) -> float:
    """Share of pairs (odd, even) in which the odd one has the higher score, in percent; ties count half."""
    scores, odd = state[0], state[1] > 0.5
    difference = scores[odd][:, None] - scores[~odd][None, :]
    return 50.0 * float((difference.sign() + 1.0).mean())


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage")
    quick = parser.parse_args(arguments).quick
    module = Path(__file__).stem if __name__ == "__main__" else __name__
    overrides = {
        "arms": ("bissl", "baseline", "scratch"),
        "pretext": {"task": f"{module}:QuarterTurns", "options": {"hidden": 32}},
        "downstream": {"task": f"{module}:Parity"},
    }
    short = {}
    config = build_config(digits(), overrides, short)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        context = Context(config, torch.device("cpu"), ArtifactStore(path / "artifacts"), path / "metrics.jsonl", Datasets(config), Console(quiet=True))
        results = summarise(context, run_pipeline(context))
    print(results)
    return results


if __name__ == "__main__":
    main()
