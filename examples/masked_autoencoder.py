"""BiSSL on a masked autoencoder instead of SimCLR: most of an image is hidden and has to be filled in.

    python examples/masked_autoencoder.py [--quick]

No file of the recipe knows the class. Here a Config is made from the digits preset with overrides and goes through the
stages, 3 labels a digit; from the repository's root the command line takes the class by name:

    python recipes/bissl/run.py --pretext.task examples.masked_autoencoder:MaskedAutoencoder \
        --pretext.lr 0.003 --bissl.lower-lr 0.001 --pretext.epochs 20 --bissl.aggregate true
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bilevel.recipes.bissl.outcome.console_table import plain_lines
from bilevel.recipes.bissl.outcome.temporary_run import results_of
from bilevel.recipes.bissl.settings.config import build_config
from bilevel.recipes.bissl.settings.presets import digits
from bilevel.recipes.bissl.tasks import Bound, PretextTask
from bilevel.recipes.vision.views.view_policy import ViewPolicy


class Token(nn.Module):
    """Replaces pixels by a patch [3, side, side], the same at every place; it starts at mid-grey."""

    def __init__(self, side: int, grid: int, learned: bool) -> None:
        super().__init__()
        self.grid, self.patch = grid, nn.Parameter(torch.zeros(3, side, side), requires_grad=learned)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        return torch.where(hidden, self.patch.repeat(1, self.grid, self.grid), images)


class MaskedAutoencoder(PretextTask):
    """Mean squared error on the hidden patches alone (He et al. 2022, section 3), for a backbone with a feature map.

    A convolution cannot leave patches out as a transformer does: it sees a token in their place.
    """

    patch_size: int = Field(default=2, ge=1, description="side of a patch (px); divides image_size")
    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="share of the patches that are hidden")
    smallest_crop: float = Field(default=1.0, gt=0, le=1, description="smallest area of a crop (share of the image's)")
    learned_token: bool = Field(default=True, description="learn what stands in hidden places; false: mid-grey")
    normalise: bool = Field(default=False, description="scale every target patch to mean 0 and variance 1")
    decoder_width: int = Field(default=64, ge=1, description="channels of the decoder's hidden layer")

    @model_validator(mode="after")
    def _divides(self) -> "MaskedAutoencoder":
        if self.image_size % self.patch_size or self.image_size == self.patch_size:
            raise ValueError(f"patch_size must divide image_size={self.image_size} into parts, got {self.patch_size}")
        return self

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        features, width = int(backbone.num_features), self.decoder_width  # type: ignore[arg-type]
        layers = nn.Conv2d(features, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 3 * self.patch_size**2, 1)
        decoder = nn.Sequential(nn.Upsample(self.grid, mode="bilinear"), *layers)
        return nn.ModuleDict({"decoder": decoder, "token": Token(self.patch_size, self.grid, self.learned_token)})

    def random_views(self) -> tuple[ViewPolicy]:
        crop = {"crop_scale": (self.smallest_crop, 1.0), "crop_ratio": (1.0, 1.0), "flip_probability": 0.0}
        still, half = {"jitter_probability": 0.0, "grey_probability": 0.0}, (0.5, 0.5, 0.5)
        return (ViewPolicy.model_validate({"size": self.image_size, **crop, **still, "mean": half, "std": half}),)

    def transform(self, images: tuple[Tensor], generator: torch.Generator, *, rows: slice, count: int) -> Any:
        # Drawn here, not in the loss, so that a stored batch keeps its masks throughout a linear solve.
        hidden = min(max(1, round(self.mask_ratio * self.grid**2)), self.grid**2 - 1)
        order = torch.rand(count, self.grid**2, generator=generator).argsort(dim=1)
        return images[0], order[rows, :hidden].to(images[0].device)

    def outputs(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Errors of the hidden patches, [n, hidden patches, 3 * patch_size**2]."""
        images, places = batch
        hidden = torch.zeros(len(images), self.grid**2, dtype=torch.bool, device=images.device).scatter(1, places, True)
        cover = nn.functional.interpolate(hidden.view(-1, 1, self.grid, self.grid).float(), self.image_size) > 0
        found = heads["decoder"](backbone(heads["token"](images, cover), feature_map=True)).flatten(2)
        wanted = nn.functional.unfold(images, self.patch_size, stride=self.patch_size)
        if self.normalise:
            variance, mean = torch.var_mean(wanted, dim=1, keepdim=True)
            wanted = (wanted - mean) / (variance + 1e-6).sqrt()
        return (found - wanted).mT.gather(1, places[:, :, None].expand(-1, -1, wanted.shape[1]))

    def output_loss(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean()

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.output_loss(self.outputs(backbone, heads, batch))

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(parameters), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


FULL = {"seeds": 4, "pretext": {"epochs": 20}, "bissl": {"alternations": 5}, "finetune": {"epochs": 60}}
QUICK = {"seeds": 2, **{key: {"epochs": 1} for key in ("pretext", "head", "finetune")}, "bissl": {"alternations": 1}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage")
    module = Path(__file__).stem if __name__ == "__main__" else __name__
    task = {"task": f"{module}:MaskedAutoencoder", "batch_size": 128, "lr": 0.003}
    base = {"data": {"split_seed": 2}, "pretext": task, "bissl": {"lower_lr": 0.001, "damping": 5.0, "aggregate": True}}
    length = QUICK if parser.parse_args(arguments).quick else FULL
    results = results_of(build_config(digits(), base, {"arms": ("bissl", "baseline", "scratch")}, length))
    print("\n".join(plain_lines(results)))
    return results


if __name__ == "__main__":
    main()
