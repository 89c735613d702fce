"""BiSSL for a segmentation: which pixels belong to which of four handwritten digits on a noisy background.

    python examples/segmentation.py [--quick]

No file of the recipe knows the task or its images; from the repository's root its command line takes them by name:

    python recipes/bissl/run.py --data.{pretext,downstream}=examples.segmentation:PastedDigits --data.image-size 20 \
        --downstream.task examples.segmentation:Segmentation --data.{labels,val}-per-class=null
"""

import argparse
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from bilevel.recipes.bissl.outcome.console_table import plain_lines
from bilevel.recipes.bissl.outcome.temporary_run import results_of
from bilevel.recipes.bissl.settings.config import build_config
from bilevel.recipes.bissl.settings.presets import digits
from bilevel.recipes.bissl.tasks import Bound, DownstreamTask
from bilevel.recipes.vision.imagesets import IGNORED, DownstreamSets, ImageSet, LabelKind
from bilevel.recipes.vision.mean_iou import mean_iou
from bilevel.recipes.vision.metrics import Metric
from bilevel.recipes.vision.views.evaluation_view import EvalView
from bilevel.recipes.vision.views.view_policy import ViewPolicy

SIDE, CLASSES = 20, ("background", "0", "1", "2", "3")
HALF = (0.5, 0.5, 0.5)
PARTS = {"train": (0, 40), "val": (40, 60), "test": (60, 260), "pretext": (260, 500)}


class PastedDigits:
    """scikit-learn's digits 0 to 3 at 16 px, somewhere on a texture of 20 px; pixels at a digit's edge are no class."""

    def part(self, name: str) -> ImageSet:
        pixels, labels = (torch.from_numpy(array) for array in load_digits(n_class=4, return_X_y=True))
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))[slice(*PARTS[name])]
        drawn = interpolate(pixels[chosen].view(-1, 1, 8, 8).float() / 16, 16, mode="bilinear")
        generator = torch.Generator().manual_seed(PARTS[name][0])
        texture = 0.4 * interpolate(torch.rand(len(chosen), 1, 5, 5, generator=generator), SIDE, mode="bilinear")
        ink = torch.zeros_like(texture)
        for i, (y, x) in enumerate(torch.randint(SIDE - 15, (len(chosen), 2), generator=generator).tolist()):
            ink[i, :, y : y + 16, x : x + 16] = drawn[i]
        masks = torch.where(ink > 0.5, labels[chosen][:, None, None, None] + 1, torch.where(ink > 0.25, IGNORED, 0))
        images = torch.maximum(ink, texture + 0.2 * torch.rand(texture.shape, generator=generator))
        return ImageSet((255 * images).to(torch.uint8), masks[:, 0].to(torch.uint8), CLASSES, "pasted digits")

    def pretext(self) -> ImageSet:
        return self.part("pretext")

    def downstream(self) -> DownstreamSets:
        names = "train", "val", "test"
        return DownstreamSets(*map(self.part, names), indices={name: list(range(*PARTS[name])) for name in names})


class Segmentation(DownstreamTask):
    """A 1x1 convolution on the feature map, brought to the image's size; cross-entropy and mean IoU over pixels."""

    labels: ClassVar[LabelKind] = "segmentation"
    smallest_crop: float = Field(default=0.64, gt=0, le=1, description="smallest area of a crop (share of the image's)")
    flip_probability: float = Field(default=0.0, ge=0, le=1, description="share of images mirrored left to right")

    def build(self, backbone: nn.Module) -> nn.Module:
        scores = nn.Conv2d(int(backbone.num_features), len(self.classes), 1)  # type: ignore[arg-type]
        return nn.Sequential(scores, nn.Upsample(self.image_size, mode="bilinear"))

    def forward(self, backbone: Bound, head: Bound, inputs: Tensor) -> Tensor:
        return head(backbone(inputs, feature_map=True))

    # Masks take the same box and flip as their images, the nearest pixel: a mean of two classes is no class.
    def train_view(self) -> ViewPolicy:
        crop = {"crop_scale": (self.smallest_crop, 1.0), "crop_ratio": (1.0, 1.0), "interpolation": "bilinear"}
        rest = {"flip_probability": self.flip_probability, "jitter_probability": 0.0, "grey_probability": 0.0}
        return ViewPolicy.model_validate({"size": self.image_size, **crop, **rest, "mean": HALF, "std": HALF})

    def evaluation_view(self) -> EvalView:
        return EvalView(self.image_size, self.image_size, mean=HALF, std=HALF)

    def transform(
        self, images: Tensor, targets: Tensor, generator: torch.Generator, train: bool
    ) -> tuple[Tensor, Tensor]:
        return images, targets.long()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, ignore_index=IGNORED)

    def metrics(self) -> dict[str, Metric]:
        return {"miou": mean_iou(len(self.classes))}


FULL = {"seeds": 3, "pretext": {"epochs": 10}, "bissl": {"alternations": 4}, "finetune": {"epochs": 40}}
COST = {"pretext": {"batch_size": 60}, "bissl": {"lower_steps": 4, "damping": 5.0, "aggregate": True}}
ONE, SHORT = {"epochs": 1}, {"alternations": 1, "lower_steps": 2, "upper_steps": 1, "damping": 50.0}
QUICK = {"seeds": 2, "pretext": ONE, "head": ONE, "bissl": SHORT, "finetune": ONE}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage")
    module = Path(__file__).stem if __name__ == "__main__" else __name__
    images = {"pretext": f"{module}:PastedDigits", "downstream": f"{module}:PastedDigits", "image_size": SIDE}
    every_label = {"labels_per_class": None, "val_per_class": None}
    base = {"data": images | every_label, "downstream": {"task": f"{module}:Segmentation"}}
    length = QUICK if parser.parse_args(arguments).quick else FULL
    results = results_of(build_config(digits(), base, {"arms": ("bissl", "baseline", "scratch"), **COST}, length))
    print("\n".join(plain_lines(results)))
    return results


if __name__ == "__main__":
    main()
